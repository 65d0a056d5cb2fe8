"""The quantile of Student's t, by which a few seeds give an interval of their mean."""

from __future__ import annotations

import math


def t_quantile(level: float, degrees: int) -> float:
    """Return t such that a Student variable lies within (-t, t) with probability `level`.

    Raises:
        ValueError: a level outside (0, 1), or fewer than one degree of freedom.
    """
    if not 0 < level < 1 or degrees < 1:
        raise ValueError(f"t_quantile: expected 0 < level < 1 <= degrees, got {level}, {degrees}")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _central_mass(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_mass(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)).

    References:
        Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums for whole degrees of freedom.
    """
    cosine, is_odd = math.cos(angle), degrees % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for power in range(2 + is_odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total
