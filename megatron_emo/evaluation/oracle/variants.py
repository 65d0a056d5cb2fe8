"""What is compared: objectives, each with the weights that are tried, and with their costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from megatron_emo.objectives import Objective, blend_with_mle, build_objective

GRID: Mapping[str, tuple[Mapping[str, float], ...]] = {
    "mle": ({},),
    "mixce": ({}, {"eta": 0.01}, {"eta": 0.1}, {"eta": 0.9}, {"eta": 0.99}),
    "tailr": ({}, {"gamma": 0.01}, {"gamma": 0.1}, {"gamma": 0.5}, {"gamma": 1.0}),
    "emo1": ({}, {"weight_max": 3.0}, {"weight_max": 1.0}, {"weight_max": 0.1}),
    "emo2": ({}, {"emo_scale": 0.2}, {"share": 0.5}, {"share": 0.1}),
    "emo": ({},),
}
"""Settings tried, the released defaults ({}) first. `share` blends with MLE: (1 - s) m + s f."""

COSTS = ("identity", "output-layer")
"""identity: every wrong token costs 1. output-layer: 1 - cosine of the rows of the output layer
that MLE learnt from the same data, frozen, as the paper takes a pretrained model's head."""

_SHOWN = {"mixce": "eta", "tailr": "gamma", "emo1": "weight_max", "emo2": "emo_scale"}


@dataclass(frozen=True)
class Variant:
    """An objective with its settings and its cost."""

    objective: str
    settings: Mapping[str, float] = field(default_factory=dict)
    cost: str = "none"
    """One of `COSTS`, or none for objectives without."""

    def build(self) -> Objective:
        settings = dict(self.settings)
        share = settings.pop("share", 1.0)
        return blend_with_mle(build_objective(self.objective, **settings), share)

    @property
    def is_default(self) -> bool:
        return not self.settings

    @property
    def weight(self) -> str:
        """The setting that is varied and its value, as "eta=0.5"; "-" where there is none."""
        if self.settings:
            return ", ".join(f"{name}={value:g}" for name, value in self.settings.items())
        name = _SHOWN.get(self.objective)
        return f"{name}={self.build().settings[name]:g}" if name else "-"

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.objective, self.cost, self.weight)


def build_variants(objectives: Iterable[str], costs: Collection[str] = COSTS) -> list[Variant]:
    """Return all variants of the named objectives; MLE comes first and always.

    Raises:
        ValueError: a name that is not in `GRID`, or not in `COSTS`.
    """
    if not costs or set(costs) - set(COSTS):
        raise ValueError(f"--costs: expected some of {', '.join(COSTS)}, got {sorted(costs)}")
    names = list(objectives)
    unknown = sorted(set(names) - set(GRID))
    if unknown:
        raise ValueError(f"--objectives: expected some of {', '.join(GRID)}, got {unknown}")
    variants = []
    for name in dict.fromkeys(["mle", *names]):
        own = costs if build_objective(name).uses_cost else ("none",)
        variants += [Variant(name, settings, cost) for cost in own for settings in GRID[name]]
    return variants
