"""Whether one law would do for two objectives, or their laws differ: a bootstrapped ratio test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.comparison.joint import JointFit, exponents_of, fit_joint, points_of
from megatron_emo.scaling.comparison.pairs import Pairs, Runs
from megatron_emo.scaling.laws.bootstrap import percentile_interval
from megatron_emo.scaling.laws.fit import describe_doubts
from megatron_emo.scaling.laws.projection import fit_projection
from megatron_emo.scaling.laws.surfaces import Surface, SurfaceFit

FEWEST_PAIRS = 8
"""Two laws have nine numbers; what is left must say how large the noise is."""
NOTHING = 1e-12
"""Root mean square residual over the mean loss below which there is no noise to judge by."""
_TERMS = ("A", "alpha", "B", "beta")
_QUICK = {"xtol": 1e-9, "ftol": 1e-10, "gtol": 1e-12, "max_nfev": 100}
"""Of draws: a thousandth of a statistic's scatter is enough."""


@dataclass(frozen=True)
class LawTest:
    """One law for both objectives against two laws with the same E."""

    one: SurfaceFit
    two: JointFit
    statistic: float
    """n log(S_one / S_two), S the sums of squared errors over n runs of both."""
    p: float
    """Share of draws of the one law whose statistic is as large; (1 + hits) / (1 + draws)."""
    draws: np.ndarray
    """Statistics of draws under the one law [draws]."""
    intervals: Mapping[str, Interval]
    """Of the two laws: "E", then "base A", "other alpha" and so on."""
    n: int
    """Pairs."""


def check_pairs(pairs: Pairs) -> None:
    """Raise ValueError where pairs are fewer than FEWEST_PAIRS."""
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"{pairs.name}: expected at least {FEWEST_PAIRS} pairs for a joint fit, got "
            f"{len(pairs)}"
        )


def compare_laws(
    pairs: Pairs,
    draws: int,
    level: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> LawTest:
    """Return whether pairs of runs tell two laws of one E from one law for both objectives.

    A draw adds residuals of the two laws, those of a pair together, to the losses of a law, and
    fits anew: to the one law for the test, to the two laws for the intervals. So what the two runs
    of a pair share, their seed and data, is shared in draws too.

    Args:
        progress: takes the number of draws done since it was last called.

    Raises:
        ValueError: fewer than FEWEST_PAIRS pairs, or fewer than 2 draws.
    """
    check_pairs(pairs)
    if draws < 2:
        raise ValueError(f"--joint: expected at least 2 draws, got {draws}")
    one = fit_projection(*points_of(pairs.base, pairs.other))
    two = fit_joint(pairs.base, pairs.other)
    draw = _Draw(pairs, one, two, seed)
    statistics, rows = [], []
    for _ in range(draws):
        statistics.append(draw.statistic())
        rows.append(draw.laws())
        if progress is not None:
            progress(1)
    least = _statistic(one.objective, two.objective, pairs)
    drawn = np.array(statistics)
    names = ["E"] + [f"{side} {name}" for side in ("base", "other") for name in _TERMS]
    columns = zip(names, np.array(rows).T, strict=True)
    return LawTest(
        one=one,
        two=two,
        statistic=least,
        p=float(1 + (drawn >= least).sum()) / (1 + draws),
        draws=drawn,
        intervals={name: percentile_interval(values, level) for name, values in columns},
        n=len(pairs),
    )


def _statistic(one: float, two: float, pairs: Pairs) -> float:
    """0 where neither law leaves anything: rounding errors have no ratio."""
    count = 2 * len(pairs)
    scale = float(np.concatenate([pairs.base.loss, pairs.other.loss]).mean())
    least = count * (NOTHING * scale) ** 2
    return count * math.log(max(one, least) / max(two, least))


class _Draw:
    """Fits of losses drawn from a law."""

    def __init__(self, pairs: Pairs, one: SurfaceFit, two: JointFit, seed: int) -> None:
        self._pairs, self._one, self._two = pairs, one, two
        self._rng = np.random.default_rng(seed)
        count = 2 * len(pairs)
        # Residuals are smaller than the noise: the fit has followed some of it.
        swollen = math.sqrt(count / (count - 9)) if count > 9 else 1.0
        self._noise = [swollen * (values - values.mean()) for values in two.residuals]
        exponents = [exponents_of(law) for law in two.laws]
        self._starts = [np.concatenate(exponents), np.tile(exponents_of(one.surface), 2)]

    def _sides(self, laws: tuple[Surface, Surface]) -> list[Runs]:
        picked = self._rng.integers(0, len(self._pairs), len(self._pairs))
        return [
            replace(runs, loss=law.loss(runs.params, runs.tokens) - noise[picked])
            for runs, law, noise in zip(
                (self._pairs.base, self._pairs.other), laws, self._noise, strict=True
            )
        ]

    def statistic(self) -> float:
        """Return a statistic under the one law."""
        law = self._one.surface
        base, other = self._sides((law, law))
        one = fit_projection(*points_of(base, other), start=law)
        starts = [np.tile(exponents_of(one.surface), 2), self._starts[0]]
        two = fit_joint(base, other, starts, _QUICK)
        return _statistic(one.objective, two.objective, self._pairs)

    def laws(self) -> list[float]:
        """Return E, then A, alpha, B, beta of both laws, under the two laws."""
        base, other = self._sides(self._two.laws)
        laws = fit_joint(base, other, self._starts[:1], _QUICK).laws
        return [laws[0].E, *(getattr(law, name) for law in laws for name in _TERMS)]


def format_test(found: LawTest, baseline: str, name: str) -> list[str]:
    """Return lines for a reader."""
    lines = [
        f"one law    of {baseline} and {name}: statistic {found.statistic:.4g}, p = {found.p:.3g} "
        f"of {len(found.draws)} draws; two laws with one E = {found.two.laws[0].E:.4g} "
        f"{_span(found.intervals['E'])}"
    ]
    for side, label, law in zip(("base", "other"), (baseline, name), found.two.laws, strict=True):
        words = [
            f"{term} {getattr(law, term):.4g} {_span(found.intervals[f'{side} {term}'])}"
            for term in ("alpha", "beta")
        ]
        lines.append(f"two laws   {label}: {', '.join(words)}")
    doubts = describe_doubts(found.two.converged, found.two.at_bound)
    return lines + [f"WARNING    joint fit {doubt}" for doubt in doubts]


def _span(interval: Interval) -> str:
    return f"[{interval.low:.4g}, {interval.high:.4g}]"


def describe_test(found: LawTest) -> dict:
    """Return what --json holds of it."""
    return {
        "n": found.n,
        "statistic": found.statistic,
        "p": found.p,
        "draws": len(found.draws),
        "objective_one_law": found.one.objective,
        "objective_two_laws": found.two.objective,
        "one_law": found.one.surface.to_json(),
        "base": found.two.laws[0].to_json(),
        "other": found.two.laws[1].to_json(),
        "intervals": {name: vars(interval) for name, interval in found.intervals.items()},
        "converged": found.two.converged,
        "at_bound": list(found.two.at_bound),
    }
