"""What is compared: ways to the mean loss of one output layer, each with its exactness check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_emo.benchmark import others
from megatron_emo.benchmark.ours import own_rows
from megatron_emo.benchmark.problem import MeanLoss, Problem, make_problem
from megatron_emo.benchmark.tokens import zipf_token_ids
from megatron_emo.cost_embedding.narrow import widen_rows
from megatron_emo.reference import reference_loss

GRADIENT_TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}
"""Bounds of `gradient_error`; in bf16 the logits have 8 bits, in whatever code."""

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Variant:
    """One way to compute the mean loss of a problem, with autograd."""

    build: Callable[[Problem], MeanLoss]
    """Prepares what is not to be timed; the function it returns is called once per repetition."""
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The objective's, for the float64 check."""
    baselines: tuple[str, ...] = ("torch-ce",)
    """Variants that ratios are taken against, where they run too."""
    is_available: Callable[[], bool] = lambda: True
    needs: str = ""
    """What `is_available` asks for, and where it comes from."""
    needs_gpu: bool = False
    compiles: bool = False
    """Whether parts of it go through torch.compile."""
    path: str = ""
    """logits, recompute or forward for this package's own; "" for others."""
    is_fused: bool = False
    """Whether `fused_linear_loss` takes the output layer in."""
    table: str = ""
    """fp8, or "" for a cost embedding in the run's dtype."""
    tolerances: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By (dtype, device), where GRADIENT_TOLERANCE does not hold; `note` says why."""
    note: str = ""
    """What a reader of its row must know."""

    @property
    def baseline(self) -> str:
        """The first of `baselines`: for this package's own, the same path without a cost."""
        return self.baselines[0]

    def tolerance(self, dtype: torch.dtype, device: str) -> float:
        """Return the bound of its `gradient_error`."""
        name = _DTYPE_NAMES[dtype]
        return self.tolerances.get((name, device), GRADIENT_TOLERANCE[name])

    def runs_on(self, device: str) -> bool:
        return self.is_available() and not (self.needs_gpu and device == "cpu")


def compile_stance(variants: Iterable[Variant], device: str) -> AbstractContextManager:
    """Let what variants compile run as written on a CPU, as Megatron's own CPU runs do.

    torch's setting holds for the whole process while the context lasts; a GPU compiles.
    """
    if device == "cpu" and any(variant.compiles for variant in variants):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def gradient_error(variant: Variant, dtype: torch.dtype, device: str) -> float:
    """Return the largest error of dX and dW on a small problem, over their largest entry.

    The truth is the reference in float64 on the same inputs, rounded to `dtype`; costs are those
    of the table's own values, so that fp8's rounding, which is chosen, is not taken for an error.
    """
    sizes = {"vocab_size": 311, "hidden": 24, "cost_dim": 20}
    target = zipf_token_ids(96, sizes["vocab_size"], seed=0)
    problem = make_problem(target, **sizes, seed=0).to(device, dtype)
    with compile_stance([variant], device):
        grads = problem.gradients(variant.build(problem)())
    exact = problem.to("cpu", torch.float64)
    expected = exact.gradients(_exact_loss(variant, exact))
    return max(
        ((a.cpu().double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(grads, expected, strict=True)
    )


def _exact_loss(variant: Variant, problem: Problem) -> Tensor:
    logits = F.linear(problem.hidden, problem.weight)
    if variant.table == "fp8":
        return _emo1_of_rows(logits, problem.target, problem.fp8_cost_embedding)
    return reference_loss(
        logits, problem.target, variant.objective, problem.cost_embedding, **variant.settings
    ).loss.mean()


def _emo1_of_rows(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """emo1 as reference.py writes it, but for rows whose length rounding has moved from 1."""
    wide = widen_rows(rows, logits.dtype)
    cost = (1.0 - wide[target] @ wide.T).clamp(min=0.0)
    cost.scatter_(1, target[:, None], 0.0)
    m = F.cross_entropy(logits, target, reduction="none")
    d = (logits.softmax(dim=1) * cost).sum(dim=1)
    return (0.5 * (m + (m / (d + 1e-10)).detach() * d)).mean()


_MEGATRON = {
    "objective": "mle",
    "is_available": lambda: others.is_importable("megatron.core"),
    "needs": "megatron-core (`make env` installs it)",
}

_OURS = {row.pop("name"): Variant(**row) for row in own_rows()}

VARIANTS: dict[str, Variant] = {
    **_OURS,
    "torch-ce": Variant(others.torch_cross_entropy, "mle"),
    "torch-linear-ce": Variant(
        others.torch_linear_cross_entropy,
        "mle",
        is_available=lambda: hasattr(torch.nn, "LinearCrossEntropyOptions"),
        needs="a torch with F.linear_cross_entropy (2.13 has it)",
    ),
    "megatron-ce": Variant(others.megatron_cross_entropy, **_MEGATRON),
    "megatron-fused-ce": Variant(
        others.megatron_fused_cross_entropy,
        **_MEGATRON,
        compiles=True,
        tolerances={("fp32", "cpu"): 1e-2, ("fp32", "cuda"): 1e-2},
        note="rounds the logits' gradient to bf16 whatever their dtype, so fp32 is held to 1e-2; "
        "compiled on a GPU, eager on a CPU",
    ),
    "liger-linear-ce": Variant(
        others.liger_linear_cross_entropy,
        "mle",
        is_available=lambda: others.is_importable("liger_kernel"),
        needs="liger-kernel from PyPI",
        needs_gpu=True,
    ),
    "emoloss-0.0.3": Variant(
        others.released_emo_loss,
        "emo1",
        {"weight_max": 3.0},
        baselines=("torch-ce", *(name for name, row in _OURS.items() if row.objective == "emo1")),
        is_available=lambda: others.released_path().is_file(),
        needs="EMOLoss 0.0.3 (`make env` installs it)",
    ),
}
"""OBJECTIVE-PATH[-TABLE] for this package's own: `logits` is F.linear and `vocab_parallel_loss`,
`fused-*` are the paths of `fused_linear_loss`; without a named table it is in the run's dtype."""

DEFAULT_VARIANTS = ("mle-logits", "emo1-logits", "torch-ce")


def available_variants(device: str = "cpu") -> tuple[str, ...]:
    """Return the names of what can run on the device."""
    return tuple(name for name, variant in VARIANTS.items() if variant.runs_on(device))


def check_variants(names: tuple[str, ...], device: str) -> tuple[str, ...]:
    """Return the names, with "all" alone replaced by all that can run.

    Raises:
        ValueError: an unknown name, or one that cannot run here.
    """
    if names == ("all",):
        return available_variants(device)
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"--variants: expected {', '.join(VARIANTS)}, got {name!r}")
        variant = VARIANTS[name]
        if not variant.is_available():
            raise ValueError(f"--variants: {name} is not installed; it needs {variant.needs}")
        if not variant.runs_on(device):
            raise ValueError(f"--variants: {name} needs --device cuda, got {device}")
    return names
