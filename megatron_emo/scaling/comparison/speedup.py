"""How much of a baseline's training another objective saves, on the baseline's own law.

At one size N the baseline's law is L(D) = F + B D^-beta with F = E + A N^-alpha: a loss below the
baseline's is worth as many tokens as the baseline would need to get there. E, A, alpha and beta are
the baseline's; fitted for each objective apart, two asymptotes would decide the comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.comparison.pairs import Pairs
from megatron_emo.scaling.laws.frontier import Optima
from megatron_emo.scaling.laws.surfaces import Surface

RESOURCES = ("tokens", "flops", "hours")


@dataclass(frozen=True)
class Line:
    """y = level + slope (x - centre), with Student's t of n - 2 on the scatter about it."""

    centre: float
    level: float
    slope: float
    scatter: float
    """Standard deviation about the line."""
    n: int
    spread: float
    """Sum of (x - centre)^2."""

    def at(self, x: float, level: float) -> tuple[float, Interval]:
        """Return (y, its interval) at x: where the line is, not where a further point would be."""
        value = self.level + self.slope * (x - self.centre)
        error = self.scatter * math.sqrt(1 / self.n + (x - self.centre) ** 2 / self.spread)
        return value, _student(value, error, self.n - 2, level)

    def slope_interval(self, level: float) -> Interval:
        """Return the interval of the slope."""
        return _student(self.slope, self.scatter / math.sqrt(self.spread), self.n - 2, level)


def _student(value: float, error: float, freedom: int, level: float) -> Interval:
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return Interval(value - half, value + half, level, "student")


def fit_line(x: np.ndarray, y: np.ndarray) -> Line:
    """Return the line of least squares through points [n].

    Raises:
        ValueError: fewer than 3 points, or one x alone.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(f"expected at least 3 points at different C, got {len(np.unique(x))}")
    centre = float(x.mean())
    spread = float(np.square(x - centre).sum())
    slope = float(((x - centre) * y).sum() / spread)
    misses = y - y.mean() - slope * (x - centre)
    scatter = math.sqrt(float(np.square(misses).sum()) / (len(x) - 2))
    return Line(centre, float(y.mean()), slope, scatter, len(x), spread)


def floors(law: Surface, params: np.ndarray) -> np.ndarray:
    """Return F = E + A N^-alpha [n], to which a size's loss falls with tokens, nats/token."""
    return law.E + law.A * np.asarray(params, float) ** -law.alpha


def effective_speedup(
    base_loss: np.ndarray, other_loss: np.ndarray, floor: np.ndarray, exponent: float
) -> np.ndarray:
    """Return ((L_base - floor) / (L_other - floor))^(1 / exponent) [n].

    Above 1 where the other is better: the baseline would need as many times its resource. NaN where
    a loss is not above the floor.

    References:
        Marin's comparison of recipes (issue 8096), with the asymptote and exponent pinned.
    """
    above = [np.asarray(loss, float) - floor for loss in (base_loss, other_loss)]
    good = (above[0] > 0) & (above[1] > 0)
    ratio = np.where(good, above[0], np.nan) / np.where(good, above[1], np.nan)
    return ratio ** (1 / exponent)


def resource_ratios(pairs: Pairs) -> dict[str, np.ndarray]:
    """Return {resource: the other's over the baseline's [n]}, hours where they were measured."""
    found = {
        "tokens": pairs.other.tokens / pairs.base.tokens,
        "flops": pairs.other.flops / pairs.base.flops,
    }
    if pairs.base.hours is not None:
        found["hours"] = pairs.other.hours / pairs.base.hours
    return found


def pair_speedups(pairs: Pairs, law: Surface) -> dict[str, np.ndarray]:
    """Return {resource: the baseline's need of it to reach the other's loss, over the other's [n]}.

    The baseline goes on at its own size, so that its FLOPs and hours grow with its tokens. NaN
    where a loss is not above the size's floor.
    """
    floor = floors(law, pairs.base.params)
    need = effective_speedup(pairs.base.loss, pairs.other.loss, floor, law.beta)
    return {name: need / ratio for name, ratio in resource_ratios(pairs).items()}


def pair_differences(pairs: Pairs, law: Surface) -> dict[str, np.ndarray]:
    """Return {resource: the other's loss minus the baseline's at equal resource [n]}, nats/token.

    Where the two of a pair used different amounts, the baseline's loss is moved along its law to
    the other's: with equal tokens, the difference at equal tokens is that of the losses.
    """
    floor = floors(law, pairs.base.params)
    above = pairs.base.loss - floor
    return {
        name: pairs.other.loss - (floor + above * ratio**-law.beta)
        for name, ratio in resource_ratios(pairs).items()
    }


def frontier_exponent(law: Surface) -> float:
    """Return gamma of L*(C) = E + K C^-gamma."""
    return law.alpha * law.beta / (law.alpha + law.beta)


def frontier_speedup(
    base: Optima, other: Optima, law: Surface, level: float
) -> tuple[float, Interval]:
    """Return how many times the FLOPs the baseline needs at its best sizes, with an interval.

    L* = E + K C^-gamma through the optima of each objective, E and gamma pinned to the baseline's
    law and K fitted in the log for each; the interval is of the lack of fit, Student's t of n - 2
    for n optima in all.

    Raises:
        ValueError: fewer than 3 optima in all, or one whose loss is not above E.
    """
    gamma = frontier_exponent(law)
    heights = []
    for optima in (base, other):
        above = optima.loss - law.E
        if len(optima) < 1 or not (above > 0).all():
            raise ValueError(f"expected optima above E = {law.E:.4g}, got {optima.loss.tolist()}")
        heights.append(np.log(above) + gamma * np.log(optima.flops))
    total = len(heights[0]) + len(heights[1])
    if total < 3:
        raise ValueError(f"expected at least 3 optima in all, got {total}")
    squares = sum(float(np.square(h - h.mean()).sum()) for h in heights)
    error = math.sqrt(squares / (total - 2) * sum(1 / len(h) for h in heights)) / gamma
    value = float(heights[0].mean() - heights[1].mean()) / gamma
    found = _student(value, error, total - 2, level)
    low, high = (math.exp(min(x, 700)) for x in (found.low, found.high))
    return math.exp(value), Interval(low, high, level, "student")
