"""What is compared: ways to the mean loss of one output layer, each with its exactness check."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_emo.benchmark.tokens import zipf_token_ids
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import build_objective
from megatron_emo.reference import reference_loss


class Problem(NamedTuple):
    """One output layer with its batch."""

    hidden: Tensor
    """[N, h]"""
    weight: Tensor
    """[V, h]"""
    target: Tensor
    """[N]"""
    cost_embedding: Tensor
    """[V, D], rows at unit length."""

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """Return a copy whose hidden states and weight are leaves that ask for gradient."""
        hidden, weight, target, cost = (x.detach().to(device) for x in self)
        leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        return Problem(*leaves, target, cost.to(dtype))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return (dX, dW)."""
        return torch.autograd.grad(loss, (self.hidden, self.weight))


MeanLoss = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute the mean loss of a problem, with autograd."""

    build: Callable[[Problem], MeanLoss]
    """Prepares what is not to be timed; the function it returns is called once per repetition."""
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The objective's, for the float64 check."""
    baseline: str = "mle-logits"
    """The variant of the same path without a cost; ratios are taken against it."""
    is_available: Callable[[], bool] = lambda: True


def make_problem(target: Tensor, vocab_size: int, hidden: int, cost_dim: int, seed: int) -> Problem:
    """Return random fp32 tensors on the CPU: logits of standard deviation 2, a random table."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    weight = normal(vocab_size, hidden) * (2 / hidden**0.5)
    return Problem(
        normal(len(target), hidden), weight, target, unit_rows(normal(vocab_size, cost_dim))
    )


def gradient_error(variant: Variant, dtype: torch.dtype, device: str) -> float:
    """Return the largest error of dX and dW on a small problem, over their largest entry.

    The truth is the reference in float64 on the same inputs, rounded to `dtype`.
    """
    sizes = {"vocab_size": 311, "hidden": 24, "cost_dim": 20}
    target = zipf_token_ids(96, sizes["vocab_size"], seed=0)
    problem = make_problem(target, **sizes, seed=0).to(device, dtype)
    grads = problem.gradients(variant.build(problem)())
    exact = problem.to(device, torch.float64)
    expected = exact.gradients(
        reference_loss(
            F.linear(exact.hidden, exact.weight),
            exact.target,
            variant.objective,
            exact.cost_embedding,
            **variant.settings,
        ).loss.mean()
    )
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(grads, expected, strict=True)
    )


def _logits_path(objective_name: str, problem: Problem) -> MeanLoss:
    objective = build_objective(objective_name)
    hidden, weight, target, cost_embedding = problem

    def loss() -> Tensor:
        return vocab_parallel_loss(
            F.linear(hidden, weight),
            target,
            objective,
            cost_embedding if objective.uses_cost else None,
            cost_embedding_is_normalized=True,
        ).loss.mean()

    return loss


def _fused_path(objective_name: str, path: str, problem: Problem) -> MeanLoss:
    objective = build_objective(objective_name)
    hidden, weight, target, cost_embedding = problem

    def loss() -> Tensor:
        return fused_linear_loss(
            hidden,
            weight,
            target,
            objective,
            cost_embedding if objective.uses_cost else None,
            path=path,
            cost_embedding_is_normalized=True,
        ).loss.mean()

    return loss


def _fused_variants() -> dict[str, Variant]:
    return {
        f"{objective}-fused-{path}": Variant(
            partial(_fused_path, objective, path), objective, baseline=f"mle-fused-{path}"
        )
        for path in ("logits", "recompute", "forward")
        for objective in ("mle", "emo1")
    }


def _torch_cross_entropy(problem: Problem) -> MeanLoss:
    return lambda: F.cross_entropy(F.linear(problem.hidden, problem.weight), problem.target)


def _released_path() -> Path:
    """The wheel that `make env` puts beside the environment."""
    return Path(sys.prefix) / "oracles" / "EMOLoss-0.0.3" / "emo" / "loss.py"


def _released_emo_loss(problem: Problem) -> MeanLoss:
    """EMOLoss 0.0.3; one more position makes up for its shift of logits against labels."""
    spec = importlib.util.spec_from_file_location("emo_0_0_3", _released_path())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    labels = F.pad(problem.target, (1, 0))[None]

    def loss() -> Tensor:
        logits = F.linear(F.pad(problem.hidden, (0, 0, 0, 1)), problem.weight)
        return module.EMOLoss(logits[None], labels, problem.cost_embedding)

    return loss


VARIANTS: dict[str, Variant] = {
    "mle-logits": Variant(partial(_logits_path, "mle"), "mle"),
    "emo1-logits": Variant(partial(_logits_path, "emo1"), "emo1"),
    **_fused_variants(),
    "torch-ce": Variant(_torch_cross_entropy, "mle"),
    "emoloss-0.0.3": Variant(
        _released_emo_loss,
        "emo1",
        {"weight_max": 3.0},
        is_available=lambda: _released_path().is_file(),
    ),
}
"""OBJECTIVE-PATH for this package's own: `logits` is F.linear and `vocab_parallel_loss`, `fused-*`
are the paths of `fused_linear_loss`."""

DEFAULT_VARIANTS = ("mle-logits", "emo1-logits", "torch-ce")

PLAIN = "torch-ce"
"""What a user has without this package; ratios are taken against it too."""


def available_variants() -> tuple[str, ...]:
    return tuple(name for name, variant in VARIANTS.items() if variant.is_available())
