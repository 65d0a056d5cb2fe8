"""Approach 2: the size of least loss at each budget, by a parabola in log N or Akima's spline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from megatron_emo.scaling.laws.frontier import Optima
from megatron_emo.scaling.laws.table import RunTable

VERTICES = ("parabola", "akima")


@dataclass(frozen=True)
class Refused:
    """A budget or curve without an optimum that can be used."""

    name: str
    num_points: int
    reason: str
    flops: float | None = None
    """Of a budget: the geometric mean of its points'."""


def find_isoflop_optima(
    table: RunTable, vertex: str = "parabola"
) -> tuple[Optima, list[Refused], np.ndarray]:
    """Return optima by budget, budgets refused, and residuals [n] of the curves (NaN if refused).

    A curve's C is the geometric mean of its points'. N* and D* are found apart, over log N and
    over log D. Refused are curves that open downwards, and optima at or beyond the outermost point:
    a minimum that is not bracketed is a guess.
    """
    optima, refused, residuals = [], [], np.full(len(table), np.nan)
    for budget in np.unique(table.budgets):
        mask = table.budgets == budget
        curve = table.take(mask)
        flops = float(np.exp(np.log(curve.flops).mean()))
        try:
            params, loss, fitted = find_vertex(np.log(curve.params), curve.loss, vertex)
            tokens, _, _ = find_vertex(np.log(curve.tokens), curve.loss, vertex)
        except ValueError as error:
            refused.append(Refused(f"budget {flops:.3g}", len(curve), str(error), flops))
            continue
        residuals[mask] = fitted - curve.loss
        optima.append((flops, np.exp(params), np.exp(tokens), loss))
    columns = np.array(optima, float).reshape(-1, 4).T
    return Optima(*columns), refused, residuals


def find_vertex(x: np.ndarray, loss: np.ndarray, kind: str) -> tuple[float, float, np.ndarray]:
    """Return (place, loss) of the least loss between points (x, loss), and the curve at x, [n].

    Raises:
        ValueError: too few different x, a curve without a minimum, or one at an outermost point.
    """
    different, inverse = np.unique(x, return_inverse=True)
    fewest = 3 if kind == "parabola" else 4
    if len(different) < fewest:
        raise ValueError(f"{kind}: expected {fewest} different sizes, got {len(different)}")
    place, least, fitted = (_parabola if kind == "parabola" else _akima)(
        different, inverse, x, loss
    )
    if not different[0] < place < different[-1]:
        raise ValueError("edge optimum: the least loss is not between two sizes")
    return float(place), float(least), fitted


def _parabola(
    different: np.ndarray, inverse: np.ndarray, x: np.ndarray, loss: np.ndarray
) -> tuple[float, float, np.ndarray]:
    middle = different.mean()
    square, slope, level = np.polyfit(x - middle, loss, 2)
    if not square > 0:
        raise ValueError("parabola: opens downwards")
    place = -slope / (2 * square)
    return place + middle, level + slope * place / 2, np.polyval([square, slope, level], x - middle)


def _akima(
    different: np.ndarray, inverse: np.ndarray, x: np.ndarray, loss: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Through the mean loss of each size; the modified weights, which do not overshoot at flats."""
    means = np.bincount(inverse, loss) / np.bincount(inverse)
    curve = Akima1DInterpolator(different, means, method="makima")
    flat = curve.derivative().roots(extrapolate=False)
    places = np.concatenate([different, flat[np.isfinite(flat)]])
    values = curve(places)
    best = int(np.argmin(values))
    return places[best], values[best], curve(x)
