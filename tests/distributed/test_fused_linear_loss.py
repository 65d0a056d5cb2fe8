"""The fused output layer over vocabulary shards against the unsharded reference, on 2 and 4
ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_emo import build_objective, fused_linear_loss
from megatron_emo.benchmark.collectives import CollectiveCounter
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import DTYPES, narrow_rows, widen_rows
from megatron_emo.loss import fused_linear
from megatron_emo.loss.statistics import make_shard
from megatron_emo.loss.target_cost import gather_target_rows
from megatron_emo.loss.target_plan import PlannedTargets, plan_targets, share_targets
from megatron_emo.reference import reference_loss

VOCAB, PADDED, HIDDEN, WIDTH, SEQUENCE = 101, 128, 6, 5, 8


def build_case(dtype):
    """The same full tensors on every rank."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w = normal(SEQUENCE, 4, HIDDEN), normal(PADDED, HIDDEN)
    embedding = torch.cat([normal(VOCAB, WIDTH), torch.zeros(PADDED - VOCAB, WIDTH)])
    target = torch.randint(0, VOCAB, (SEQUENCE, 4), generator=generator)
    mask = (torch.rand(SEQUENCE, 4, generator=generator) > 0.3).double()
    upstream = torch.rand(SEQUENCE, 4, generator=generator, dtype=torch.float64) * mask
    return x.to(dtype), w.to(dtype), embedding.to(dtype), target, mask, upstream


def run(path, dtype, uniform, chunk_rows, name="emo1", sequence_parallel=False, bucket=1):
    rank, size = dist.get_rank(), dist.get_world_size()
    x, w, embedding, target, mask, upstream = build_case(dtype)
    upstream = mask * 0.5 if uniform else upstream
    shard = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    tokens = slice(rank * SEQUENCE // size, (rank + 1) * SEQUENCE // size)
    tokens = tokens if sequence_parallel else slice(None)
    local_x, local_w = x[tokens].clone().requires_grad_(), w[shard].clone().requires_grad_()
    fused_linear._CHUNK_BYTES["cpu"] = chunk_rows * 2 * (PADDED // size) * dtype.itemsize
    unit = unit_rows(embedding[shard])
    with CollectiveCounter() as prefetch:
        plan = plan_targets(target, mask, bucket=bucket)
        planned = PlannedTargets(plan, unit, make_shard(len(unit), dist.group.WORLD), wait=False)
    with CollectiveCounter() as forward:
        out = fused_linear_loss(
            local_x,
            local_w,
            target,
            build_objective(name),
            unit,
            mask,
            dist.group.WORLD,
            path,
            vocab_size=VOCAB,
            cost_embedding_is_normalized=True,
            sequence_parallel=sequence_parallel,
            planned=planned,
        )
    with CollectiveCounter() as backward:
        grads = torch.autograd.grad((out.loss * upstream).sum(), (local_x, local_w))
    fused_linear._CHUNK_BYTES["cpu"] = 64 << 20
    full_x, full_w = (v.double().requires_grad_() for v in (x, w))
    expected = reference_loss(full_x @ full_w.T, target, name, embedding.double(), loss_mask=mask)
    exact_x, exact_w = torch.autograd.grad((expected.loss * upstream).sum(), (full_x, full_w))
    calls = [[call[:2] for call in counter.calls] for counter in (prefetch, forward, backward)]
    return out, grads, expected, (exact_x[tokens], exact_w[shard]), calls


def check_matches_reference(path, dtype, uniform, sequence_parallel, bucket, tolerance):
    out, grads, expected, exact, _ = run(
        path, dtype, uniform, 5, sequence_parallel=sequence_parallel, bucket=bucket
    )
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=tolerance, atol=tolerance)
    for grad, true in zip(grads, exact, strict=True):
        assert grad.shape == true.shape
        assert (grad.double() - true).norm() / true.norm() <= tolerance


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per token"])
@pytest.mark.parametrize(
    ("sequence_parallel", "bucket"), [(False, 1), (True, 1), (True, 8)], ids=["", "sp", "sp padded"]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_matches_reference(
    run_distributed, world_size, path, uniform, sequence_parallel, bucket, dtype, tolerance
):
    run_distributed(world_size)(
        check_matches_reference,
        path=path,
        dtype=dtype,
        uniform=uniform,
        sequence_parallel=sequence_parallel,
        bucket=bucket,
        tolerance=tolerance,
    )


def check_collectives(path, sequence_parallel):
    size = dist.get_world_size()
    calls = run(path, torch.float32, True, 1000, sequence_parallel=sequence_parallel)[-1]
    _, _, _, target, mask, _ = build_case(torch.float32)
    counted, hidden = target[mask != 0], target.numel() * HIDDEN
    rows = ("all_reduce", counted.unique().numel() * WIDTH)
    statistics = ("all_gather", counted.numel() * 4)
    if sequence_parallel:
        gather, reduce = ("all_gather", hidden // size), ("reduce_scatter", hidden)
        assert calls == [[rows], [gather, statistics], REGATHER[path] * [gather] + [reduce]]
    else:
        assert calls == [[rows], [statistics], [("all_reduce", hidden)]]


# The gradients that the path forward keeps need no tokens.
REGATHER = {"logits": 1, "recompute": 1, "forward": 0}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_collectives_are_as_the_docstring_says(
    run_distributed, world_size, path, sequence_parallel
):
    run_distributed(world_size)(check_collectives, path=path, sequence_parallel=sequence_parallel)


def check_share_targets():
    target, group = torch.randint(0, 100, (30,)) - 1, dist.group.WORLD
    mine = target if dist.get_rank() == 0 else None
    shared = [None] * dist.get_world_size()
    dist.all_gather_object(shared, share_targets(mine, 30, group).tolist())
    assert all(one == shared[0] for one in shared)
    assert dist.get_rank() != 0 or shared[0] == target.tolist()


def test_targets_of_the_first_rank_reach_all(run_distributed):
    run_distributed(2)(check_share_targets)


def check_narrow_rows():
    generator = torch.Generator().manual_seed(3)
    unit = unit_rows(torch.randn(PADDED, 16, generator=generator))
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = torch.tensor([0, 5, 63, 64, 127])
    for name, dtype in DTYPES.items():
        table = narrow_rows(unit, dtype)
        shard = table[rank * PADDED // size : (rank + 1) * PADDED // size]
        with CollectiveCounter() as counter:
            rows, work = gather_target_rows(ids, shard, make_shard(len(shard), dist.group.WORLD))
        assert work is None and rows.dtype == dtype, name
        assert torch.equal(rows.float(), table[ids].float()), name
        assert [call[:2] for call in counter.calls] == [("all_reduce", 5 * table.shape[1])]


def test_narrow_rows_travel_as_they_are(run_distributed):
    run_distributed(2)(check_narrow_rows)


def check_narrow_table(path):
    x, w, _, target, _, _ = build_case(torch.float32)
    rank, size = dist.get_rank(), dist.get_world_size()
    shard = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    unit = unit_rows(torch.randn(PADDED, 16, generator=torch.Generator().manual_seed(3)))
    for dtype in DTYPES.values():
        table = narrow_rows(unit, dtype)
        out = fused_linear_loss(
            x,
            w[shard],
            target,
            build_objective("emo1"),
            table[shard],
            tp_group=dist.group.WORLD,
            path=path,
            cost_embedding_is_normalized=True,
        )
        wide = widen_rows(table, torch.float64)
        cost = (1 - wide[target] @ wide.T).clamp(min=0).scatter(-1, target[..., None], 0)
        expected = ((x.double() @ w.double().T).softmax(-1) * cost).sum(-1)
        torch.testing.assert_close(out.emo_loss.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
def test_narrow_tables_cost_what_their_values_say(run_distributed, path):
    run_distributed(2)(check_narrow_table, path=path)


def check_everything_masked():
    x, w, embedding, target, _, _ = build_case(torch.float32)
    rank, size = dist.get_rank(), dist.get_world_size()
    x = x[rank * SEQUENCE // size : (rank + 1) * SEQUENCE // size].requires_grad_()
    w = w[: PADDED // size].requires_grad_()
    for path in ("logits", "recompute", "forward"):
        out = fused_linear_loss(
            x,
            w,
            target,
            build_objective("emo1"),
            embedding[: PADDED // size],
            torch.zeros(target.shape),
            dist.group.WORLD,
            path,
            sequence_parallel=True,
        )
        grads = torch.autograd.grad(out.loss.sum(), (x, w))
        assert all((grad == 0).all() for grad in grads)


def test_everything_masked_under_sequence_parallelism(run_distributed):
    run_distributed(2)(check_everything_masked)
