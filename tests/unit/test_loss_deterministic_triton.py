"""Fixed vocabulary blocks through the Triton kernels, run by Triton's interpreter where there is no
GPU: the blocks that ranks hold, one rank after the other, have the bits of one rank's.

The interpreter must be chosen before the kernels are defined, so the checks are a program of their
own: this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 8
# Odd sizes; a block longer than one of the kernels', set small below.
TOKENS, VOCAB, WIDTH, HIDDEN = 5, 8 * 37, 5, 6


@pytest.mark.slow
def test_blocks_have_the_same_bits_whoever_holds_them():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


def example(device, dtype):
    generator = torch.Generator().manual_seed(8)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device)

    target = torch.randint(0, VOCAB, (TOKENS,), generator=generator).to(device)
    return (normal(TOKENS, VOCAB) * 3).to(dtype), target, normal(VOCAB, WIDTH)


def over_ranks(num_ranks, logits, target, table):
    """Return (merged statistics, dlogits), each rank's part formed from tensors it alone has."""
    from megatron_emo import build_objective
    from megatron_emo.loss.kernels import row_gradient, row_statistics
    from megatron_emo.loss.statistics import (
        Layout,
        Shard,
        apply_objective,
        locate,
        merge_statistics,
        token_gradient,
    )
    from megatron_emo.loss.target_cost import cost_of_targets
    from megatron_emo.loss.vocabulary_blocks import blocks_of

    layout, size = Layout(cost=True, entropy=True, argmax=True), VOCAB // num_ranks
    cost_row, statistics, ranks = torch.arange(TOKENS, device=logits.device), [], []
    for rank in range(num_ranks):
        part = slice(rank * size, (rank + 1) * size)
        shard = Shard(rank * size, size, None, BLOCKS // num_ranks, True)
        # One element past a round address, as a view of something larger may lie.
        buffer = torch.empty(TOKENS * size + 1, dtype=logits.dtype, device=logits.device)
        z = buffer[1:].view(TOKENS, size).copy_(logits[:, part])
        ranks.append((z, table[part].clone(), blocks_of(shard)))
    scores = [
        (
            block.columns_of(z),
            locate(target, block.shard),
            cost_of_targets(table[target], block.rows_of(rows), torch.float32),
            cost_row,
            block,
        )
        for z, rows, blocks in ranks
        for block in blocks
    ]
    for z, where, cost, cost_row, block in scores:
        local = row_statistics(z, where, cost, cost_row, layout)
        local[-1] += block.shard.vocab_start_index
        statistics.append(local)
    stats = merge_statistics(torch.stack(statistics), layout)
    _, mle_weight, emo_weight = apply_objective(stats, build_objective("emo1"))
    token = token_gradient(stats, mle_weight, emo_weight, torch.full_like(mle_weight, 0.37))
    grads = [
        row_gradient(z, z, where, token, cost, cost_row) for z, where, cost, cost_row, _ in scores
    ]
    return stats, torch.cat(grads, dim=1)


def check_bits(device):
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, table = example(device, dtype)
        table = torch.nn.functional.normalize(table, dim=1)
        stats, grad = over_ranks(1, logits, target, table)
        assert torch.equal(stats.argmax, logits.argmax(dim=1))
        for num_ranks in (2, 4, 8):
            others, other_grad = over_ranks(num_ranks, logits, target, table)
            assert all(torch.equal(a, b) for a, b in zip(stats, others, strict=True)), num_ranks
            assert torch.equal(grad, other_grad), num_ranks


def check_reference(device):
    from megatron_emo import build_objective, fused_linear_loss
    from megatron_emo.reference import reference_loss

    _, target, table = example(device, torch.float32)
    generator = torch.Generator().manual_seed(9)
    x, w = (torch.randn(n, HIDDEN, generator=generator).to(device) for n in (TOKENS, VOCAB))
    x, w = x.requires_grad_(), w.requires_grad_()
    exact = [v.detach().double().cpu().requires_grad_() for v in (x, w)]
    expected = reference_loss(exact[0] @ exact[1].T, target.cpu(), "emo1", table.double().cpu())
    true = torch.autograd.grad(expected.loss.sum(), exact)
    for path in ("logits", "forward"):
        out = fused_linear_loss(
            x, w, target, build_objective("emo1"), table, path=path, deterministic_blocks=BLOCKS
        )
        for grad, exact_grad in zip(torch.autograd.grad(out.loss.sum(), (x, w)), true, strict=True):
            error = (grad.double().cpu() - exact_grad).norm() / exact_grad.norm()
            assert error <= 1e-6, (path, error)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from megatron_emo.loss import kernels, triton_kernels

    triton_kernels._STATISTICS_BLOCK = triton_kernels._GRADIENT_BLOCK = 16
    launched = set()
    for name in ("row_statistics", "row_gradient"):
        function = getattr(triton_kernels, name)

        def launch(*args, _name=name, _function=function):
            launched.add(_name)
            return _function(*args)

        setattr(triton_kernels, name, launch)
    if device == "cpu":
        kernels._runs_triton = lambda z: True
    check_bits(device)
    check_reference(device)
    assert launched == {"row_statistics", "row_gradient"}, launched


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
