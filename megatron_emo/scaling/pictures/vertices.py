"""Best sizes of IsoFLOP curves with intervals, and the power laws through them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_emo.scaling.laws.fit import MIN_POINTS
from megatron_emo.scaling.laws.frontier import Optima
from megatron_emo.scaling.laws.isoflop import Refused, find_vertex
from megatron_emo.scaling.laws.table import RunTable
from megatron_emo.scaling.pictures.frontier import tails


@dataclass(frozen=True)
class Curve:
    """One budget with its parabola over log N."""

    flops: float
    """Geometric mean of its points'."""
    table: RunTable
    places: np.ndarray
    losses: np.ndarray
    """Of the parabola at sizes `places` [k]."""


@dataclass(frozen=True)
class Vertices:
    """Best sizes by budget."""

    curves: tuple[Curve, ...]
    """Of budgets with a vertex, as `optima`."""
    optima: Optima
    draws: np.ndarray
    """float64 [draws, budgets, 3]: log N*, log D*, loss; NaN where a draw has no vertex."""
    refused: tuple[Refused, ...]
    n: int
    """Points of curves with a vertex."""

    def intervals(self, level: float) -> np.ndarray:
        """Return low and high ends [2, budgets, 3] of N*, D* and the loss; NaN of few draws."""
        ends = np.stack([tails(self.draws[:, :, q], level) for q in range(3)], axis=-1)
        ends[:, :, :2] = np.exp(ends[:, :, :2])
        return ends

    def law(self, quantity: int) -> tuple[float, float]:
        """Return (slope, intercept) of log N* (0) or log D* (1) against log C."""
        values = (self.optima.params, self.optima.tokens)[quantity]
        return tuple(np.polyfit(np.log(self.optima.flops), np.log(values), 1))

    def law_draws(self, quantity: int) -> np.ndarray:
        """Return (slope, intercept) of draws with two vertices or more, [draws, 2]."""
        x = np.log(self.optima.flops)
        lines = []
        for row in self.draws[:, :, quantity]:
            here = np.isfinite(row)
            if here.sum() > 1:
                lines.append(np.polyfit(x[here], row[here], 1))
        return np.array(lines).reshape(-1, 2)


def find_vertices(table: RunTable, draws: int, seed: int) -> Vertices:
    """Return the vertices of parabolas over log N and log D of each budget.

    Draws are of residuals about the parabolas, all budgets' together, put back on the parabolas:
    curves of four or five sizes are too short for points to be drawn from.

    Raises:
        ValueError: no budget of `MIN_POINTS` points has a vertex between two sizes.
    """
    curves, optima, refused, fits = [], [], [], []
    for budget in np.unique(table.budgets):
        rows = table.take(table.budgets == budget)
        flops = float(np.exp(np.log(rows.flops).mean()))
        try:
            found = _find(rows)
        except ValueError as error:
            refused.append(Refused(f"C = {flops:.3g}", len(rows), str(error), flops))
            continue
        (params, loss, fitted), (tokens, _, by_tokens) = found
        curves.append(Curve(flops, rows, *_trace(np.log(rows.params), fitted)))
        optima.append((flops, math.exp(params), math.exp(tokens), loss))
        fits.append((fitted, by_tokens))
    if not curves:
        shown = "; ".join(f"{r.name} ({r.num_points} points): {r.reason}" for r in refused)
        raise ValueError(f"expected a budget with a best size, got none: {shown}")
    return Vertices(
        tuple(curves),
        Optima(*np.array(optima).T),
        _draw(curves, fits, draws, seed),
        tuple(refused),
        sum(len(curve.table) for curve in curves),
    )


def _find(rows: RunTable) -> list[tuple[float, float, np.ndarray]]:
    if len(rows) < MIN_POINTS:
        raise ValueError(f"fewer than {MIN_POINTS} points")
    return [find_vertex(np.log(x), rows.loss, "parabola") for x in (rows.params, rows.tokens)]


def _trace(x: np.ndarray, fitted: np.ndarray, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return the parabola through points of it, at sizes between the outermost."""
    middle = x.mean()
    places = np.linspace(x.min(), x.max(), count)
    return np.exp(places), np.polyval(np.polyfit(x - middle, fitted, 2), places - middle)


def _draw(curves: list[Curve], fits: list[tuple], draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pools = []
    for side in range(2):
        misses = [c.table.loss - f[side] for c, f in zip(curves, fits, strict=True)]
        count = sum(map(len, misses))
        # Each parabola has followed three degrees of freedom of the noise.
        pools.append(np.concatenate(misses) * math.sqrt(count / (count - 3 * len(curves))))
    found = np.full((draws, len(curves), 3), np.nan)
    for draw in range(draws):
        for at, (curve, fitted) in enumerate(zip(curves, fits, strict=True)):
            picked = rng.integers(0, len(pools[0]), len(curve.table))
            try:
                by_params, by_tokens = (
                    find_vertex(np.log(x), fitted[side] + pools[side][picked], "parabola")
                    for side, x in enumerate((curve.table.params, curve.table.tokens))
                )
            except ValueError:
                continue
            found[draw, at] = by_params[0], by_tokens[0], by_params[1]
    return found
