"""Vocabulary-sharded loss and gradient against the unsharded reference, on 2 and 4 gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_emo import build_objective, vocab_parallel_loss
from megatron_emo.benchmark.collectives import CollectiveCounter
from megatron_emo.reference import reference_loss

OBJECTIVES = {
    "mle": {},
    "emo1": {},
    "emo2": {"weight_max": 2.0},
    "emo": {"detach_target": True},
    "mixce": {"eta": 0.2},
    "focal": {},
}


def build_case(vocab, padded, dtype, scale, seed=0, masked=0.3):
    """The same full tensors on every rank: nothing is gathered to be compared."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, padded, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(0, vocab, (6, 4), generator=generator)
    embedding = torch.randn(vocab, 5, generator=generator, dtype=torch.float64)
    embedding = torch.cat([embedding, embedding.new_zeros(padded - vocab, 5)])
    mask = (torch.rand(6, 4, generator=generator) >= masked).float()
    upstream = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    return logits.to(dtype), target, embedding.to(dtype), mask, upstream


def check_matches_reference(name, vocab, padded, dtype, scale, masked, tolerance):
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, target, embedding, mask, upstream = build_case(
        vocab, padded, dtype, scale, masked=masked
    )
    shard = slice(rank * padded // size, (rank + 1) * padded // size)

    full = logits.double().requires_grad_()
    expected = reference_loss(
        full, target, name, embedding.double(), loss_mask=mask, **OBJECTIVES[name]
    )
    (expected_grad,) = torch.autograd.grad((expected.loss * upstream).sum(), full)

    local = logits[..., shard].clone().requires_grad_()
    before = local.detach().clone()
    out = vocab_parallel_loss(
        local,
        target,
        build_objective(name, **OBJECTIVES[name]),
        cost_embedding=embedding[shard],
        loss_mask=mask,
        tp_group=dist.group.WORLD,
        vocab_size=vocab,
        return_entropy=True,
        return_argmax=True,
    )
    assert torch.equal(out.argmax, logits.argmax(dim=-1) * (mask != 0))
    (grad,) = torch.autograd.grad((out.loss * upstream).sum(), local)
    for field in ("loss", "mle_loss", "emo_loss", "entropy"):
        torch.testing.assert_close(
            getattr(out, field).double(),
            getattr(expected, field),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, field=field: f"{field}: {text}",
        )
    torch.testing.assert_close(
        grad.double(), expected_grad[..., shard], rtol=tolerance, atol=tolerance
    )
    assert torch.equal(local.detach(), before)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"]
)
def test_matches_reference(run_distributed, world_size, name, dtype, tolerance):
    run_distributed(world_size)(
        check_matches_reference,
        name=name,
        vocab=101,
        padded=128,
        dtype=dtype,
        scale=3.0,
        masked=0.3,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("vocab", "padded", "scale", "masked"),
    [
        (64, 64, 3.0, 0.0),  # no padding
        (33, 64, 3.0, 0.0),  # a last shard of padding alone at 4 ranks
        (101, 128, 1e4, 0.3),
        (101, 128, 3.0, 1.1),  # every token masked
    ],
    ids=["unpadded", "padding-only shard", "1e4 logits", "all masked"],
)
def test_shapes_and_extremes(run_distributed, world_size, vocab, padded, scale, masked):
    run_distributed(world_size)(
        check_matches_reference,
        name="emo1",
        vocab=vocab,
        padded=padded,
        dtype=torch.float64,
        scale=scale,
        masked=masked,
        tolerance=1e-12,
    )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_at_logits_of_1e4(run_distributed, world_size, name):
    run_distributed(world_size)(
        check_matches_reference,
        name=name,
        vocab=101,
        padded=128,
        dtype=torch.float32,
        scale=1e4,
        masked=0.3,
        tolerance=2e-6,
    )


def check_ranks_agree_to_the_bit(dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, target, embedding, mask, _ = build_case(101, 128, dtype, 3.0)
    shard = slice(rank * 128 // size, (rank + 1) * 128 // size)
    out = vocab_parallel_loss(
        logits[..., shard],
        target,
        build_objective("emo1"),
        embedding[shard],
        mask,
        dist.group.WORLD,
        return_entropy=True,
    )
    for value in out[:5]:
        gathered = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(gathered, value)
        assert all(torch.equal(gathered[0], other) for other in gathered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_hold_the_same_bits(run_distributed, dtype):
    run_distributed(4)(check_ranks_agree_to_the_bit, dtype=dtype)


def check_infinite_shard():
    """A shard of -inf logits, and a target on it, must not make NaN of the others."""
    rank = dist.get_rank()
    logits = torch.randn(3, 8, dtype=torch.float64)
    logits[0, 4:] = -torch.inf
    target = torch.tensor([1, 2, 6])
    out = vocab_parallel_loss(
        logits[:, rank * 4 : rank * 4 + 4],
        target,
        build_objective("emo1"),
        torch.eye(8, dtype=torch.float64)[rank * 4 : rank * 4 + 4],
        tp_group=dist.group.WORLD,
        return_entropy=True,
    )
    m = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(out.mle_loss, m)
    torch.testing.assert_close(out.emo_loss, 1 - torch.exp(-m))
    assert torch.isfinite(out.entropy).all()


def test_shard_without_finite_logits(run_distributed):
    run_distributed(2)(check_infinite_shard)


def check_collectives(with_cost, with_entropy):
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)))
    logits, target, embedding, mask, _ = build_case(101, 128, torch.float32, 3.0, masked=0.0)
    shard = slice(rank * 128 // size, (rank + 1) * 128 // size)
    objective = build_objective("emo1" if with_cost else "mle")
    local = logits[..., shard].clone().requires_grad_()
    with CollectiveCounter() as forward:
        out = vocab_parallel_loss(
            local,
            target,
            objective,
            embedding[shard] if with_cost else None,
            mask,
            group,
            return_entropy=with_entropy,
        )
    with CollectiveCounter() as backward:
        out.loss.sum().backward()
    tokens, distinct, width = target.numel(), target.unique().numel(), embedding.shape[1]
    expected = [("all_reduce", distinct * width)] if with_cost else []
    expected += [("all_gather", tokens * (3 + with_cost + with_entropy))]
    assert [call[:2] for call in forward.calls] == expected
    assert all(call[2] is group for call in forward.calls)
    assert backward.calls == []


@pytest.mark.parametrize("with_cost", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_collectives_are_as_the_docstring_says(run_distributed, with_cost, with_entropy):
    run_distributed(2)(check_collectives, with_cost=with_cost, with_entropy=with_entropy)


def check_bad_target_raises_everywhere():
    rank = dist.get_rank()
    target = torch.tensor([3, 9, 8])
    try:
        vocab_parallel_loss(
            torch.randn(3, 4),
            target,
            build_objective("emo1"),
            torch.randn(4, 2),
            tp_group=dist.group.WORLD,
        )
    except ValueError as error:
        assert "got 2 outside, the first 9 at flat position 1" in str(error), (rank, error)
    else:
        raise AssertionError("a target no rank owns was accepted")


def test_target_no_rank_owns_is_refused_on_all_ranks(run_distributed):
    run_distributed(2)(check_bad_target_raises_everywhere)
