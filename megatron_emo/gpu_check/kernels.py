"""The Triton row kernels on the card: exactness, infinities, 64-bit offsets, the same bits twice.

Through the loss that calls them, on the sizes where a kernel goes wrong: a vocabulary that fills no
block, one element past a block, past 2^16, and more than 2^31 logits. On a CPU they are proved by
Triton's interpreter, in the tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_emo.cost_embedding import unit_rows
from megatron_emo.gpu_check.dense import dense_loss
from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import build_objective

_WIDTH = 16
_GIB = 1 << 30

# (vocabulary, dtype, scale of the logits)
_CASES = (
    (301, torch.float32, 3.0),
    (301, torch.float32, 1e4),
    (301, torch.bfloat16, 3.0),
    (301, torch.float16, 3.0),
    (4097, torch.float32, 3.0),
    (65539, torch.float32, 3.0),
    (65539, torch.bfloat16, 3.0),
)
LOSS_BOUND = 2e-6
GRADIENT_BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Over the largest entry. Rounding a correct gradient to bf16 is off by up to 2^-8 of an entry, to
fp16 by 2^-11."""


class Example(NamedTuple):
    """Rows of logits with what the loss asks for."""

    logits: Tensor
    """[N, V]"""
    target: Tensor
    """[N]"""
    unit_embedding: Tensor
    """[V, D] fp32."""
    upstream: Tensor
    """[N] fp32, another number for each token."""


def check_kernels(settings: Settings, record: Record) -> None:
    """Triton row kernels against float64; infinities; 64-bit offsets; the same bits twice."""
    if settings.device == "cpu":
        record.skip("no CUDA device; tests/unit/test_triton_kernels.py runs them interpreted")
    if importlib.util.find_spec("triton") is None:
        record.skip("triton is not installed; the loss runs without its kernels")
    with launched_kernels() as launched:
        for vocab_size, dtype, scale in _CASES:
            compare_with_dense(settings, record, vocab_size, dtype, scale)
        compare_infinities(settings, record)
        compare_two_runs(settings, record)
        check_wide_offsets(settings, record)
    record.expect("both kernels were launched", launched == {"row_statistics", "row_gradient"})


@contextmanager
def launched_kernels() -> Iterator[set[str]]:
    """Collect the names of the kernels that are launched inside."""
    from megatron_emo.loss import triton_kernels

    launched: set[str] = set()
    originals = {name: getattr(triton_kernels, name) for name in ("row_statistics", "row_gradient")}

    def counted(name: str):
        def launch(*args, **kwargs):
            launched.add(name)
            return originals[name](*args, **kwargs)

        return launch

    for name in originals:
        setattr(triton_kernels, name, counted(name))
    try:
        yield launched
    finally:
        for name, function in originals.items():
            setattr(triton_kernels, name, function)


def make_example(
    device: str, num_tokens: int, vocab_size: int, dtype: torch.dtype, scale: float = 3.0
) -> Example:
    """Return random rows, made on the device, with a distinct target for each token where there
    are enough."""
    normal = torch.Generator(device).manual_seed(4)
    logits = torch.randn(num_tokens, vocab_size, device=device, dtype=dtype, generator=normal)
    embedding = torch.randn(vocab_size, _WIDTH, device=device, generator=normal)
    upstream = torch.rand(num_tokens, device=device, generator=normal)
    target = torch.arange(num_tokens, device=device) * 7919 % vocab_size
    return Example(logits.mul_(scale), target, unit_rows(embedding), upstream)


def loss_and_gradient(example: Example) -> tuple[Tensor, Tensor]:
    """Return (loss [N], gradient [N, V]) of EMO-1 for the example's upstream gradient."""
    leaf = example.logits.detach().requires_grad_()
    loss = vocab_parallel_loss(
        leaf,
        example.target,
        build_objective("emo1"),
        example.unit_embedding,
        cost_embedding_is_normalized=True,
        check_target=False,
    ).loss
    (gradient,) = torch.autograd.grad((loss * example.upstream).sum(), leaf)
    return loss.detach(), gradient


def row_errors(
    example: Example, loss: Tensor, gradient: Tensor, rows: list[int]
) -> tuple[float, float]:
    """Return (largest |error| / (1 + |loss|), largest error over the largest gradient entry) of
    these rows, against float64 on the CPU."""
    logits, target, upstream = (
        x[rows].cpu() for x in (example.logits, example.target, example.upstream)
    )
    exact = logits.double().requires_grad_()
    expected = dense_loss(exact, target, example.unit_embedding.double().cpu(), "emo1")
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), exact)
    expected = expected.detach()
    loss_error = (loss[rows].double().cpu() - expected).abs() / (1 + expected.abs())
    error = (gradient[rows].double().cpu() - expected_gradient).abs().amax()
    return loss_error.amax().item(), (error / expected_gradient.abs().amax()).item()


def compare_with_dense(
    settings: Settings, record: Record, vocab_size: int, dtype: torch.dtype, scale: float
) -> None:
    """Compare 16 rows, the third of which is left as it is by a gradient of 0."""
    example = make_example(settings.device, 16, vocab_size, dtype, scale)
    example.upstream[2] = 0
    loss, gradient = loss_and_gradient(example)
    loss_error, gradient_error = row_errors(example, loss, gradient, list(range(16)))
    name = f"V={vocab_size} {str(dtype).removeprefix('torch.')} logits of {scale:g}"
    record.bound(f"{name}: loss error", loss_error, LOSS_BOUND)
    record.bound(f"{name}: gradient error", gradient_error, GRADIENT_BOUND[dtype])


def compare_infinities(settings: Settings, record: Record) -> None:
    """Rows of -inf, +inf and NaN must not reach others; -inf beside finite logits is harmless."""
    example = make_example(settings.device, 8, 4097, torch.float32)
    example.target.fill_(5)
    clean, _ = loss_and_gradient(example)
    example.logits[1] = -torch.inf
    example.logits[2, ::2] = -torch.inf
    example.logits[4, 9], example.logits[6, 0] = torch.nan, torch.inf
    loss, _ = loss_and_gradient(example)
    untouched = [0, 3, 5, 7]
    record.expect(
        "rows beside infinities keep their bits", torch.equal(loss[untouched], clean[untouched])
    )
    record.expect("-inf beside finite logits is finite", bool(torch.isfinite(loss[2])))
    record.expect(
        "all -inf, +inf and NaN are not finite", not torch.isfinite(loss[[1, 4, 6]]).any().item()
    )


def compare_two_runs(settings: Settings, record: Record) -> None:
    """The same call twice gives the same bits, and leaves the logits as they were."""
    example = make_example(
        settings.device, 256, 65539 if settings.is_full else 4097, torch.bfloat16
    )
    before = example.logits.clone()
    first, second = loss_and_gradient(example), loss_and_gradient(example)
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    record.expect("two runs give the same bits", repeats)
    record.expect("the logits are left as they were", torch.equal(example.logits, before))


def check_wide_offsets(
    settings: Settings, record: Record, vocab_size: int = 131072, limit: int = 1 << 31
) -> None:
    """Sample rows on both sides of the element `limit` of logits [N, V], gradient and costs."""
    boundary = limit // vocab_size
    num_tokens = boundary + 64
    elements = num_tokens * vocab_size
    if settings.device == "cuda":
        # bf16 logits and gradient, fp32 costs: one row for each token, as all targets differ.
        needed, free = 8 * elements + 2 * _GIB, torch.cuda.mem_get_info()[0]
        if needed > free:
            record.note(
                "offsets past 2^31 elements",
                f"not checked: takes {needed / _GIB:.1f} GiB, {free / _GIB:.1f} are free",
            )
            return
    example = make_example(settings.device, num_tokens, vocab_size, torch.bfloat16)
    example = example._replace(target=torch.arange(num_tokens, device=settings.device))
    loss, gradient = loss_and_gradient(example)
    rows = [0, 1, boundary - 1, boundary, boundary + 1, num_tokens - 1]
    loss_error, gradient_error = row_errors(example, loss, gradient, rows)
    name = f"{num_tokens} x {vocab_size} = 2^31 + {elements - limit} logits"
    if limit != 1 << 31:
        name = f"{num_tokens} x {vocab_size} logits"
    record.bound(f"{name}: loss error", loss_error, LOSS_BOUND)
    record.bound(f"{name}: gradient error", gradient_error, GRADIENT_BOUND[torch.bfloat16])
