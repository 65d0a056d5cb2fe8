"""The plan that labels alone decide: order, distinct targets, buckets; losses that follow it."""

from __future__ import annotations

import pytest
import torch

from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss
from megatron_emo.loss import fused_linear
from megatron_emo.loss.statistics import make_shard
from megatron_emo.loss.target_plan import PlannedTargets, plan_targets

EMO1 = build_objective("emo1")
SHARD = make_shard(61, None)


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 20, (29,), generator=generator)
    mask = (torch.rand(29, generator=generator) > 0.3).double()
    target[mask == 0] = -100
    return target, mask


@pytest.mark.parametrize("bucket", [1, 8])
def test_a_plan_names_every_counted_token_once(bucket):
    target, mask = example()
    plan = plan_targets(target, mask, bucket=bucket)
    counted = [i for i in range(29) if mask[i] != 0]
    assert plan.num_tokens == 29 and plan.num_counted == len(counted)
    assert sorted(plan.order[: plan.num_counted].tolist()) == counted
    assert (plan.order[plan.num_counted :] == 29).all()
    assert plan.target[: plan.num_counted].tolist() == sorted(target[counted].tolist())
    distinct = sorted(set(target[counted].tolist()))
    assert plan.distinct.tolist()[: len(distinct)] == distinct
    assert torch.equal(plan.distinct[plan.cost_row], plan.target)
    assert len(plan.order) % bucket == 0 and len(plan.distinct) % bucket == 0
    assert len(plan.order) - plan.num_counted < bucket
    assert plan.is_padded == (bucket == 8)


@pytest.mark.parametrize("bucket", [1, 8])
def test_runs_of_tokens_find_their_distinct_targets(bucket):
    plan = plan_targets(*example(), bucket=bucket)
    for start in range(len(plan.order)):
        for stop in range(start + 1, len(plan.order) + 1):
            found = plan.distinct_of(slice(start, stop))
            ids = plan.distinct[found]
            rows = plan.cost_row[start:stop] - found.start
            assert torch.equal(ids[rows], plan.target[start:stop])
            # Whole buckets, unless the table of distinct targets ends before.
            assert len(ids) % bucket == 0 or found.stop == len(plan.distinct)
            assert len(ids) < len(set(plan.target[start:stop].tolist())) + bucket


@pytest.mark.parametrize("bucket", [1, 8])
def test_restore_undoes_select(bucket):
    target, mask = example()
    plan = plan_targets(target, mask, bucket=bucket)
    values = torch.randn(29, 3)
    kept = values * (mask != 0)[:, None].float()
    assert torch.equal(plan.restore(plan.select(values)), kept)


def test_no_token_counts():
    plan = plan_targets(torch.full((5,), -100), torch.zeros(5), bucket=8)
    assert len(plan.order) == 0 and len(plan.distinct) == 1 and not plan.is_padded
    assert torch.equal(plan.restore(torch.zeros(0, 2)), torch.zeros(5, 2))


@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
def test_a_padded_plan_gives_the_same_loss_and_gradients(monkeypatch, path):
    target, mask = example()
    x, w = torch.randn(29, 7).double(), torch.randn(61, 7).double()
    x[mask == 0] = torch.nan  # whatever padding reads, it is not this
    embedding = torch.nn.functional.normalize(torch.randn(61, 5).double(), dim=1)
    monkeypatch.setitem(fused_linear._CHUNK_BYTES, "cpu", 5 * 2 * 61 * 8)
    results = []
    for bucket in (1, 8):
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        plan = plan_targets(target, mask, bucket=bucket)
        out = fused_linear_loss(
            *leaves,
            target,
            EMO1,
            embedding,
            mask,
            path=path,
            cost_embedding_is_normalized=True,
            return_entropy=True,
            return_argmax=True,
            planned=PlannedTargets(plan, embedding, SHARD),
        )
        results.append([*out, *torch.autograd.grad((out.loss * mask).sum() / 7, leaves)])
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-14)


def test_a_padded_plan_serves_logits_too():
    target, mask = example()
    logits, embedding = torch.randn(29, 61).double(), torch.randn(61, 5).double()
    embedding = torch.nn.functional.normalize(embedding, dim=1)
    planned = PlannedTargets(plan_targets(target, mask, bucket=8), embedding, SHARD)
    call = {"cost_embedding": embedding, "loss_mask": mask}
    expected = vocab_parallel_loss(logits, target, EMO1, **call).loss
    found = vocab_parallel_loss(logits, target, EMO1, **call, planned=planned).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
