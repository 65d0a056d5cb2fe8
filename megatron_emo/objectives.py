"""Training objectives as functions of three scalars per token.

    m    = -log q_t               cross-entropy of the target t, in nats
    q_t  = exp(-m)                probability of the target
    d    = sum_{j != t} q_j c_j   expected cost, c_j = 1 - cos(e_j, e_t), in [0, 2]

An objective returns its loss f(m, q_t, d) and two detached weights (a, b) with

    dloss/dz_j = q_j (a + b (c_j - d)) - a [j = t]

for the logits z, so the code that forms gradients never knows which objective runs.
The settings reach every variant that was released with or after the paper (arXiv 2310.04691).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_emo.config import ObjectiveConfig


class ObjectiveTerms(NamedTuple):
    """What an objective gives for each token; all three have the shape of `m`, none carries
    gradient."""

    loss: Tensor
    mle_weight: Tensor
    """a, the weight of (q - onehot(t)) in the gradient."""
    emo_weight: Tensor
    """b, the weight of q * (c - d) in the gradient."""


Function = Callable[..., ObjectiveTerms]


@dataclass(frozen=True)
class Objective:
    """A named objective with its settings bound; call it with (m, q_t, d)."""

    name: str
    function: Function
    uses_cost: bool
    """Whether d enters the loss; without it no cost embedding is needed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    """The loss is (1 - share) m + share f: a schedule that starts from MLE raises it from 0 to
    1."""

    def __call__(self, m: Tensor, q_t: Tensor, d: Tensor) -> ObjectiveTerms:
        terms = self.function(m, q_t, d, **self.settings)
        if self.share == 1.0:
            return terms
        return ObjectiveTerms(
            *(torch.lerp(x, y, self.share) for x, y in zip(mle(m, q_t, d), terms, strict=True))
        )

    def dynamic_weight(self, m: Tensor, q_t: Tensor, d: Tensor) -> Tensor:
        """Return the per-token weight the objective computes, as if its share were 1.

        For emo1 it is w = min(m / D, w_max) on d, for emo2 w = min(D / m, w_max) on m, for emo 1,
        for the target-only objectives the factor on the cross-entropy gradient.
        """
        _, mle_weight, emo_weight = self.function(m, q_t, d, **self.settings)
        factor = 0.5 if self.settings.get("half") else 1.0
        return emo_weight / factor if self.name in ("emo1", "emo") else mle_weight / factor

    @property
    def weight_max(self) -> float:
        """The cap on `dynamic_weight`; infinite when the objective has none."""
        return self.settings.get("weight_max", math.inf)


def mle(m: Tensor, q_t: Tensor, d: Tensor) -> ObjectiveTerms:
    """Maximum likelihood: loss m."""
    return ObjectiveTerms(m, torch.ones_like(m), torch.zeros_like(m))


def emo(m: Tensor, q_t: Tensor, d: Tensor, *, detach_target: bool) -> ObjectiveTerms:
    """The expected cost alone: loss D. Too slow from scratch: its gradient carries a factor q."""
    return ObjectiveTerms(_cost_value(q_t, d, detach_target), torch.zeros_like(m), _ones(m))


def emo1(
    m: Tensor,
    q_t: Tensor,
    d: Tensor,
    *,
    weight_max: float,
    half: bool,
    detach_target: bool,
    ratio_eps: float,
) -> ObjectiveTerms:
    """MLE-anchored EMO, the paper's form: loss 1/2 [m + w D] with w = min(m / (D + eps), w_max).

    w is detached, so the value is close to m by construction: log D beside it.
    """
    cost = _cost_value(q_t, d, detach_target)
    weight = (m / (cost + ratio_eps)).clamp(max=weight_max)
    factor = 0.5 if half else 1.0
    return ObjectiveTerms(factor * (m + weight * cost), _ones(m) * factor, factor * weight)


def emo2(
    m: Tensor,
    q_t: Tensor,
    d: Tensor,
    *,
    weight_max: float,
    half: bool,
    detach_target: bool,
    ratio_eps: float,
    emo_scale: float,
) -> ObjectiveTerms:
    """EMO-anchored EMO: loss s D + w m with w = min(D / (m + eps), w_max) detached, s = emo_scale.

    With `detach_target` D tends to 1, not 0, as q_t tends to 1: w grows without bound and the
    gradient does not vanish on tokens already learnt. `build_objective` warns about that pair.
    """
    cost = _cost_value(q_t, d, detach_target)
    weight = (cost / (m + ratio_eps)).clamp(max=weight_max)
    factor = 0.5 if half else 1.0
    loss = factor * (emo_scale * cost + weight * m)
    return ObjectiveTerms(loss, factor * weight, _ones(m) * (factor * emo_scale))


def mixce(m: Tensor, q_t: Tensor, d: Tensor, *, eta: float) -> ObjectiveTerms:
    """MixCE (Zhang et al., ACL 2023): loss [eta + (1 - eta) q_t] m, the bracket detached."""
    weight = eta + (1.0 - eta) * q_t
    return ObjectiveTerms(weight * m, weight, torch.zeros_like(m))


def tailr(m: Tensor, q_t: Tensor, d: Tensor, *, gamma: float, weight_min: float) -> ObjectiveTerms:
    """TaiLr (Ji et al., ICLR 2023): loss clamp(q_t / (gamma + (1 - gamma) q_t), weight_min, 1)
    m."""
    weight = _tailr_weight(q_t, gamma, weight_min)
    return ObjectiveTerms(weight * m, weight, torch.zeros_like(m))


def tvd(
    m: Tensor, q_t: Tensor, d: Tensor, *, mixing_ratio: float, weight_min: float
) -> ObjectiveTerms:
    """The EMO authors' TVD baseline: loss [r + (1 - r) TaiLr(gamma = 1 - r)] m.

    Not TaiLr itself: gamma is swapped for 1 - r and MLE is mixed in once more.
    """
    inner = _tailr_weight(q_t, 1.0 - mixing_ratio, weight_min)
    weight = mixing_ratio + (1.0 - mixing_ratio) * inner
    return ObjectiveTerms(weight * m, weight, torch.zeros_like(m))


def focal(m: Tensor, q_t: Tensor, d: Tensor, *, gamma: float) -> ObjectiveTerms:
    """Focal loss (Lin et al., ICCV 2017): (1 - q_t)^gamma m, not detached, gradient in closed
    form."""
    # -expm1(-m) is 1 - q_t without cancellation; the floor keeps 0^(gamma - 1) finite for gamma <
    # 1.
    miss = (-torch.expm1(-m)).clamp(min=torch.finfo(m.dtype).tiny)
    modulation = miss.pow(gamma)
    weight = modulation + gamma * miss.pow(gamma - 1.0) * q_t * m
    return ObjectiveTerms(modulation * m, weight, torch.zeros_like(m))


def _ones(m: Tensor) -> Tensor:
    return torch.ones_like(m)


def _cost_value(q_t: Tensor, d: Tensor, detach_target: bool) -> Tensor:
    """Return D: d, or d + q_t when the target's own probability is detached from the sum."""
    return d + q_t if detach_target else d


def _tailr_weight(q_t: Tensor, gamma: float, weight_min: float) -> Tensor:
    # gamma = 0 at q_t = 0 would be 0/0; the ratio is 1 for every q_t > 0 then, so the floor says 1.
    denominator = (gamma + (1.0 - gamma) * q_t).clamp(min=torch.finfo(q_t.dtype).tiny)
    return (q_t / denominator).clamp(min=weight_min, max=1.0)


class _Entry(NamedTuple):
    function: Function
    uses_cost: bool
    defaults: Mapping[str, Any]


_RATIO = {"weight_max": math.inf, "detach_target": False, "ratio_eps": 1e-10}

OBJECTIVES: Mapping[str, _Entry] = {
    "mle": _Entry(mle, False, {}),
    "emo1": _Entry(emo1, True, {**_RATIO, "half": True}),
    "emo2": _Entry(emo2, True, {**_RATIO, "half": False, "emo_scale": 1.0}),
    "emo": _Entry(emo, True, {"detach_target": False}),
    "mixce": _Entry(mixce, False, {"eta": 0.5}),
    "tailr": _Entry(tailr, False, {"gamma": 1e-7, "weight_min": 0.2}),
    "tvd": _Entry(tvd, False, {"mixing_ratio": 0.5, "weight_min": 0.2}),
    "focal": _Entry(focal, False, {"gamma": 2.0}),
}


class ObjectiveWarning(UserWarning):
    """Settings that run but are known to train badly."""


def build_objective(name: str | ObjectiveConfig = "emo1", **settings: Any) -> Objective:
    """Return the named objective with its settings bound.

    Args:
        name: a key of `OBJECTIVES`, or a whole `ObjectiveConfig`.
        settings: fields of `ObjectiveConfig`; what is left out or None takes the objective's
            default.

    Raises:
        ValueError: unknown name, a setting the objective does not have, or a value out of range.
    """
    config = name if isinstance(name, ObjectiveConfig) else _config(name, settings)
    entry = OBJECTIVES.get(config.name)
    if entry is None:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {config.name!r}")
    given = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name != "name" and getattr(config, f.name) is not None
    }
    foreign = sorted(set(given) - set(entry.defaults))
    if foreign:
        raise ValueError(
            f"objective {config.name}: does not have {', '.join(foreign)}; "
            f"it has {', '.join(entry.defaults) or 'no settings'}"
        )
    bound = {**entry.defaults, **given}
    if config.name == "emo2" and bound["detach_target"] and math.isinf(bound["weight_max"]):
        warnings.warn(
            "emo2 with detach_target and no weight_max keeps a gradient of order 1 on tokens that "
            "are already learnt (D/m grows like 1/m); set weight_max or leave detach_target off",
            ObjectiveWarning,
            stacklevel=2,
        )
    return Objective(config.name, entry.function, entry.uses_cost, bound)


def _config(name: str, settings: Mapping[str, Any]) -> ObjectiveConfig:
    known = {f.name for f in fields(ObjectiveConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"objective {name}: unknown setting {', '.join(unknown)}; known: "
            f"{', '.join(sorted(known - {'name'}))}"
        )
    return ObjectiveConfig(name=name, **settings)


def blend_with_mle(objective: Objective, share: float) -> Objective:
    """Return the objective with loss (1 - share) m + share f; loss, a and b are linear in share."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: expected a number in [0, 1], got {share}")
    return replace(objective, share=share)
