"""Settings of an objective, of the cost embedding and of the schedule, checked once, where they
are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

OUTPUT_LAYER = "output-layer"
"""The cost embedding source that stands for the live language model head."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """How the cross-entropy m and the expected cost d of a token combine into its loss.

    A field set to None takes the named objective's own default; a field the objective does not have
    must stay None.
    """

    name: str = "emo1"
    """One of `megatron_emo.objectives.OBJECTIVES`."""
    weight_max: float | None = None
    """Cap on the detached ratio of emo1 (m/D) and emo2 (D/m). Uncapped by default, as in the paper;
    3.0 is what EMOLoss >= 0.0.2 and the continual fine-tuning scripts use."""
    half: bool | None = None
    """The factor 1/2 in front. On for emo1, off for emo2; EMOLoss <= 0.0.2 has it on for both."""
    detach_target: bool | None = None
    """Count the target's own probability as a constant in d (gt_q in the released code): D = d +
    q_t."""
    ratio_eps: float | None = None
    """Added to the denominator of the detached ratio (default 1e-10, the released value)."""
    emo_scale: float | None = None
    """emo2 only: factor on D (default 1; 5 is the first release's form)."""
    eta: float | None = None
    """mixce only: weight of forward cross-entropy, in [0, 1] (default 0.5)."""
    gamma: float | None = None
    """tailr: in [0, 1] (default 1e-7); focal: exponent >= 0 (default 2)."""
    weight_min: float | None = None
    """tailr, tvd: floor of the weight, in [0, 1] (default 0.2)."""
    mixing_ratio: float | None = None
    """tvd only: r in [0, 1] (default 0.5)."""

    def __post_init__(self) -> None:
        _check_range("weight_max", self.weight_max, above=0.0)
        _check_range("ratio_eps", self.ratio_eps, above=0.0)
        _check_range("emo_scale", self.emo_scale, above=0.0)
        _check_range("eta", self.eta, low=0.0, high=1.0)
        _check_range("gamma", self.gamma, low=0.0, high=1.0 if self.name == "tailr" else None)
        _check_range("weight_min", self.weight_min, low=0.0, high=1.0)
        _check_range("mixing_ratio", self.mixing_ratio, low=0.0, high=1.0)


@dataclass(frozen=True)
class CostEmbeddingConfig:
    """Where the cost embedding comes from and how it is held."""

    source: str = OUTPUT_LAYER
    """A safetensors file made by tools/prepare_cost_embedding.py, or "output-layer": the live head,
    detached and normalised anew at every step."""
    dtype: str = "fp32"
    """What a rank holds its rows in: fp32, bf16 or fp8 (e4m3, refused where it costs over 1%)."""
    dim: int | None = None
    """Principal components of a file's rows to keep; None for all columns."""

    def __post_init__(self) -> None:
        _check_range("dim", self.dim, low=1)
        if self.dim is not None and self.source == OUTPUT_LAYER:
            raise ValueError(
                f"dim: expected a file as source (tools/prepare_cost_embedding.py makes one), got "
                f"{OUTPUT_LAYER}, whose components change at every step"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """When the objective takes over from maximum likelihood; a function of the iteration alone, so
    a resumed run continues it."""

    start_iter: int = 0
    """Last iteration of plain MLE; the objective's share is above 0 from the next one on."""
    ramp_iters: int = 0
    """Iterations over which the objective's share grows linearly from 0 to 1; 0 switches at
    once."""

    def __post_init__(self) -> None:
        _check_range("start_iter", self.start_iter, low=0)
        _check_range("ramp_iters", self.ramp_iters, low=0)

    def share(self, iteration: int) -> float:
        """Return the objective's share in [0, 1] at a 1-based training iteration; the rest is
        MLE."""
        past = iteration - self.start_iter
        if past <= 0:
            return 0.0
        return 1.0 if past >= self.ramp_iters else past / self.ramp_iters


LOSS_PATHS = ("auto", "logits", "recompute", "forward")
DETERMINISTIC_BLOCKS = 8
"""As many as the tensor-parallel ranks of most machines."""


@dataclass(frozen=True)
class LossPathConfig:
    """What lives through the forward of the output layer and loss; the numbers are the same."""

    path: str = "auto"
    """logits: by Megatron's output layer, kept for the backward. recompute: formed a chunk at
    a time, twice. forward: formed once, with the gradients; for an upstream gradient that is the
    loss mask times one scalar, else as recompute. auto: logits where they and the cost rows fit
    workspace_mb, else recompute."""
    workspace_mb: int = 512
    """MiB that logits or their chunks may take on a rank."""
    deterministic_blocks: int | None = None
    """Blocks of the padded vocabulary that are summed in a fixed order, so that the loss and its
    gradient have the same bits at any tensor-parallel size that divides them. A power of two; None
    lets the order follow the ranks."""

    def __post_init__(self) -> None:
        if self.path not in LOSS_PATHS:
            raise ValueError(f"path: expected one of {', '.join(LOSS_PATHS)}, got {self.path!r}")
        _check_range("workspace_mb", self.workspace_mb, above=0)
        check_deterministic_blocks(self.deterministic_blocks)


def check_deterministic_blocks(count: int | None) -> None:
    """Raise ValueError unless it is None or a power of two, which the order of sums needs."""
    if count is not None and (count < 1 or count & (count - 1)):
        raise ValueError(f"deterministic_blocks: expected a power of two, got {count}")


def _check_range(
    name: str,
    value: float | None,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> None:
    """Raise ValueError naming the field, the value found and the range expected."""
    if value is None:
        return
    wrong = (
        math.isnan(value)
        or (low is not None and value < low)
        or (above is not None and value <= above)
        or (high is not None and value > high)
    )
    if wrong:
        bounds = [f">= {low}"] if low is not None else []
        bounds += [f"> {above}"] if above is not None else []
        bounds += [f"<= {high}"] if high is not None else []
        raise ValueError(f"{name}: expected {' and '.join(bounds)}, got {value}")
