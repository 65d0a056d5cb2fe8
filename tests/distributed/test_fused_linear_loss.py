"""The fused output layer over vocabulary shards against the unsharded reference, on 2 and 4
ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from collectives import CollectiveCounter

from megatron_emo import build_objective, fused_linear_loss
from megatron_emo.loss import fused_linear
from megatron_emo.reference import reference_loss

VOCAB, PADDED, HIDDEN, WIDTH = 101, 128, 6, 5


def build_case(dtype):
    """The same full tensors on every rank."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w = normal(6, 4, HIDDEN), normal(PADDED, HIDDEN)
    embedding = torch.cat([normal(VOCAB, WIDTH), torch.zeros(PADDED - VOCAB, WIDTH)])
    target = torch.randint(0, VOCAB, (6, 4), generator=generator)
    mask = (torch.rand(6, 4, generator=generator) > 0.3).double()
    upstream = torch.rand(6, 4, generator=generator, dtype=torch.float64) * mask
    return x.to(dtype), w.to(dtype), embedding.to(dtype), target, mask, upstream


def run(path, dtype, uniform, chunk_rows, name="emo1"):
    rank, size = dist.get_rank(), dist.get_world_size()
    x, w, embedding, target, mask, upstream = build_case(dtype)
    upstream = mask * 0.5 if uniform else upstream
    shard = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    local_x, local_w = x.clone().requires_grad_(), w[shard].clone().requires_grad_()
    fused_linear._CHUNK_BYTES["cpu"] = chunk_rows * 2 * (PADDED // size) * dtype.itemsize
    with CollectiveCounter() as forward:
        out = fused_linear_loss(
            local_x,
            local_w,
            target,
            build_objective(name),
            embedding[shard],
            mask,
            dist.group.WORLD,
            path,
            vocab_size=VOCAB,
        )
    with CollectiveCounter() as backward:
        grads = torch.autograd.grad((out.loss * upstream).sum(), (local_x, local_w))
    fused_linear._CHUNK_BYTES["cpu"] = 64 << 20
    full_x, full_w = (v.double().requires_grad_() for v in (x, w))
    expected = reference_loss(full_x @ full_w.T, target, name, embedding.double(), loss_mask=mask)
    exact_x, exact_w = torch.autograd.grad((expected.loss * upstream).sum(), (full_x, full_w))
    return out, grads, expected, (exact_x, exact_w[shard]), forward.calls, backward.calls


def check_matches_reference(path, dtype, uniform, tolerance):
    out, grads, expected, exact, _, _ = run(path, dtype, uniform, chunk_rows=5)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=tolerance, atol=tolerance)
    for grad, true in zip(grads, exact, strict=True):
        assert (grad.double() - true).norm() / true.norm() <= tolerance


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per token"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_matches_reference(run_distributed, world_size, path, uniform, dtype, tolerance):
    run_distributed(world_size)(
        check_matches_reference, path=path, dtype=dtype, uniform=uniform, tolerance=tolerance
    )


def check_collectives(path):
    _, _, _, _, forward, backward = run(path, torch.float32, True, chunk_rows=1000)
    _, _, _, target, mask, _ = build_case(torch.float32)
    counted = target[mask != 0]
    rows = ("all_reduce", counted.unique().numel() * WIDTH)
    statistics = ("all_gather", counted.numel() * 4)
    hidden = ("all_reduce", counted.numel() * HIDDEN)
    in_forward = [rows, statistics, hidden] if path == "forward" else [rows, statistics]
    assert [call[:2] for call in forward] == in_forward
    assert [call[:2] for call in backward] == ([] if path == "forward" else [hidden])


@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
def test_collectives_are_as_the_docstring_says(run_distributed, path):
    run_distributed(2)(check_collectives, path=path)
