"""Intervals of means and shares: by resampling what was measured, or Wilson's for a share."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from megatron_emo.evaluation.records import Interval


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the score interval of a share, which stays within [0, 1] and has a width at 0 and 1.

    Raises:
        ValueError: n below 1, successes outside 0 to n, or a level outside (0, 1).

    References:
        Wilson (1927), without continuity correction.
    """
    _check_level(level)
    if n < 1:
        raise ValueError(f"wilson: n: expected at least 1, got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: successes: expected 0 to n = {n}, got {successes}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is 0 or 1 by algebra, and a rounding error away from it in floats.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high, level, "wilson")


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of a statistic over resamples of the rows of `values`.

    Args:
        values: [n] or [n, ...], one row for each independent thing measured, as a text.
        statistic: maps resampled rows, of the shape of `values`, to a number. A resample for which
            it gives NaN is left out.
        draws: number of resamples.

    Raises:
        ValueError: fewer than two rows, a value that is not finite, draws below 1, a level outside
            (0, 1), or a statistic that is NaN for all resamples.
    """
    values = np.asarray(values)
    _check_level(level)
    if draws < 1:
        raise ValueError(f"bootstrap: draws: expected at least 1, got {draws}")
    if values.ndim < 1 or len(values) < 2:
        found = len(values) if values.ndim else 1
        raise ValueError(f"bootstrap: values: expected at least 2, got {found}")
    if not np.isfinite(values).all():
        raise ValueError("bootstrap: values: expected finite numbers, got NaN or infinity")
    rng = np.random.default_rng(seed)
    size = len(values)
    results = [float(statistic(values[rng.integers(0, size, size)])) for _ in range(draws)]
    results = [result for result in results if not math.isnan(result)]
    if not results:
        raise ValueError(f"bootstrap: statistic: NaN for all {draws} resamples of {size} values")
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "bootstrap")


def bootstrap_mean(
    values: np.ndarray, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return `bootstrap` of the mean."""
    return bootstrap(values, np.mean, draws, level, seed)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the interval of mean(a - b), where a[i] and b[i] were measured on the same thing.

    Raises:
        ValueError: a and b of different or of two-dimensional shapes, or what `bootstrap` raises.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired_bootstrap: expected two [n], got {a.shape} and {b.shape}")
    return bootstrap(a - b, np.mean, draws, level, seed)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected between 0 and 1, got {level}")
