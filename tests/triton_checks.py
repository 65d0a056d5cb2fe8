"""The Triton kernels against the reference, through Triton's interpreter where there is no GPU.

Run as a program: the interpreter must be chosen before the kernels are defined, and stays chosen.
"""

from __future__ import annotations

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss  # noqa: E402
from megatron_emo.loss import kernels, triton_kernels  # noqa: E402
from megatron_emo.reference import reference_loss  # noqa: E402

# Odd sizes; a row longer than one block of the kernels, set small for that below.
TOKENS, VOCAB, WIDTH = 11, 301, 7


def example(dtype: torch.dtype, scale: float = 3.0):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(TOKENS, VOCAB, generator=generator) * scale
    target = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    embedding = torch.randn(VOCAB, WIDTH, generator=generator)
    upstream = torch.rand(TOKENS, generator=generator)
    return tuple(x.to(DEVICE) for x in (logits.to(dtype), target, embedding, upstream))


def compare(name: str, dtype: torch.dtype, scale: float, tolerance: float) -> None:
    logits, target, embedding, upstream = example(dtype, scale)
    logits.requires_grad_()
    mask = torch.ones_like(upstream)
    mask[3] = 0
    extras = {"return_entropy": True, "return_argmax": True}
    out = vocab_parallel_loss(logits, target, build_objective(name), embedding, mask, **extras)
    assert torch.equal(out.argmax, logits.argmax(dim=1) * (mask != 0))
    (grad,) = torch.autograd.grad((out.loss * upstream).sum(), logits)
    exact = logits.detach().double().cpu().requires_grad_()
    expected = reference_loss(
        exact, target.cpu(), name, embedding.double().cpu(), loss_mask=mask.cpu()
    )
    (expected_grad,) = torch.autograd.grad((expected.loss * upstream.double().cpu()).sum(), exact)
    for field in ("loss", "mle_loss", "emo_loss", "entropy"):
        torch.testing.assert_close(
            getattr(out, field).double().cpu(), getattr(expected, field), rtol=2e-6, atol=2e-6
        )
    assert grad.dtype == dtype and (grad[3] == 0).all()
    torch.testing.assert_close(grad.double().cpu(), expected_grad, rtol=tolerance, atol=tolerance)


def check_vocab_parallel_loss() -> None:
    for name in ("mle", "emo1", "emo2"):
        compare(name, torch.float32, 3.0, 2e-6)
    compare("emo1", torch.float32, 1e4, 2e-6)
    compare("emo1", torch.bfloat16, 3.0, 4e-3)
    compare("emo1", torch.float16, 3.0, 5e-4)


def check_argmax_is_the_first_of_the_likeliest() -> None:
    logits, target, embedding, _ = example(torch.float32)
    logits = logits.round().clamp(max=2.0)  # the maximum stands in several blocks
    out = vocab_parallel_loss(
        logits, target, build_objective("emo1"), embedding, return_argmax=True
    )
    assert out.argmax.tolist() == [row.index(max(row)) for row in logits.tolist()]


def check_paths() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (
        torch.randn(n, 6, generator=generator).to(DEVICE).requires_grad_() for n in (TOKENS, VOCAB)
    )
    _, target, embedding, upstream = example(torch.float32)
    exact = [x.detach().double().cpu().requires_grad_() for x in (hidden, weight)]
    expected = reference_loss(exact[0] @ exact[1].T, target.cpu(), "emo1", embedding.double().cpu())
    expected_grads = torch.autograd.grad((expected.loss * upstream.double().cpu()).sum(), exact)
    for path in ("logits", "recompute", "forward"):
        out = fused_linear_loss(
            hidden, weight, target, build_objective("emo1"), embedding, path=path
        )
        grads = torch.autograd.grad((out.loss * upstream).sum(), (hidden, weight))
        for grad, true in zip(grads, expected_grads, strict=True):
            assert (grad.double().cpu() - true).norm() / true.norm() <= 1e-6


def check_infinities() -> None:
    logits, target, embedding, _ = example(torch.float32)
    target[:] = 5
    clean = vocab_parallel_loss(logits, target, build_objective("emo1"), embedding).loss
    logits[1], logits[2, ::2] = -torch.inf, -torch.inf
    logits[4, 9], logits[6, 0] = torch.nan, torch.inf
    loss = vocab_parallel_loss(logits, target, build_objective("emo1"), embedding).loss
    assert not torch.isfinite(loss[[1, 4, 6]]).any()
    assert torch.isfinite(loss[2])
    untouched = [i for i in range(TOKENS) if i not in (1, 2, 4, 6)]
    assert torch.equal(loss[untouched], clean[untouched])


def check_inputs_stay_and_bits_repeat() -> None:
    logits, target, embedding, _ = example(torch.float32)
    before = logits.clone()
    runs = []
    for _ in range(2):
        leaf = logits.detach().requires_grad_()
        loss = vocab_parallel_loss(leaf, target, build_objective("emo1"), embedding).loss
        runs.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    assert torch.equal(logits, before)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def main() -> None:
    triton_kernels._STATISTICS_BLOCK = triton_kernels._GRADIENT_BLOCK = 64
    launches = []
    for name in ("row_statistics", "row_gradient"):
        function = getattr(triton_kernels, name)

        def launch(*args, _name=name, _function=function):
            launches.append(_name)
            return _function(*args)

        setattr(triton_kernels, name, launch)
    if DEVICE == "cpu":
        kernels._runs_triton = lambda z: z.dtype != torch.float64
    for check in (
        check_vocab_parallel_loss,
        check_argmax_is_the_first_of_the_likeliest,
        check_paths,
        check_infinities,
        check_inputs_stay_and_bits_repeat,
    ):
        check()
        print(f"{check.__name__}: passed on {DEVICE}")
    assert {"row_statistics", "row_gradient"} <= set(launches), "the kernels were not reached"


if __name__ == "__main__":
    sys.exit(main())
