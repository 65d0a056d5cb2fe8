"""Approach 1: the envelope of training curves of fixed sizes, or which size is best at each C."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from megatron_emo.scaling.laws.frontier import Optima
from megatron_emo.scaling.laws.isoflop import Refused
from megatron_emo.scaling.laws.table import SIZE_TOLERANCE, RunTable, group_values

GRID_POINTS = 1500
"""FLOPs at which sizes are compared, evenly spaced in the log (Hoffmann et al.)."""


@dataclass(frozen=True)
class _Curve:
    params: float
    first: float
    last: float
    loss: PchipInterpolator
    tokens: PchipInterpolator

    def covers(self, x: np.ndarray) -> np.ndarray:
        return (x >= self.first) & (x <= self.last)


def find_envelope_optima(table: RunTable) -> tuple[Optima, list[Refused], np.ndarray]:
    """Return the best size at each C of a grid, parts of the grid refused, and which size [k].

    Curves are interpolated in log C. A size counts as the best only where the next smaller and the
    next larger size have curves too: at the ends of the range of sizes, or of their curves, the
    best of those at hand says nothing of the optimum. Of curves of one size the lowest counts.
    """
    curves = _make_curves(table)
    x = np.linspace(
        min(curve.first for curve in curves), max(curve.last for curve in curves), GRID_POINTS
    )
    losses, tokens = np.full((2, len(curves), len(x)), np.nan)
    for row, curve in enumerate(curves):
        here = curve.covers(x)
        losses[row, here], tokens[row, here] = curve.loss(x[here]), curve.tokens(x[here])
    sizes = group_values(np.array([curve.params for curve in curves]), SIZE_TOLERANCE)
    known = np.array(
        [np.isfinite(losses[sizes == size]).any(axis=0) for size in range(sizes[-1] + 1)]
    )
    x, losses, tokens, known = _drop_gaps(x, losses, tokens, known)
    best = np.nanargmin(losses, axis=0)
    size, points = sizes[best], np.arange(len(x))
    at_end = (size == 0) | (size == sizes[-1])
    is_open = ~at_end & ~(
        known[np.maximum(size - 1, 0), points] & known[np.minimum(size + 1, sizes[-1]), points]
    )
    refused = [
        Refused("envelope", int(mask.sum()), reason)
        for mask, reason in (
            (at_end, "edge optimum: the smallest or the largest size is the best"),
            (is_open, "the next smaller or larger size has no curve there"),
        )
        if mask.any()
    ]
    keep = ~at_end & ~is_open
    params = np.array([curve.params for curve in curves])[best]
    optima = Optima(np.exp(x), params, np.exp(tokens[best, points]), losses[best, points])
    return optima.take(keep), refused, size[keep]


def _drop_gaps(x, losses, tokens, known):
    """Leave out FLOPs that no curve reaches."""
    here = known.any(axis=0)
    return x[here], losses[:, here], tokens[:, here], known[:, here]


def _make_curves(table: RunTable) -> list[_Curve]:
    """Return curves by size; a curve's loss at repeated FLOPs is the mean."""
    curves = []
    for label in np.unique(table.curves):
        rows = table.take(table.curves == label)
        x, inverse = np.unique(np.log(rows.flops), return_inverse=True)
        if len(x) < 2:
            continue
        counts = np.bincount(inverse)
        loss, tokens = (
            np.bincount(inverse, values) / counts for values in (rows.loss, np.log(rows.tokens))
        )
        curves.append(
            _Curve(
                float(np.median(rows.params)),
                x[0],
                x[-1],
                PchipInterpolator(x, loss),
                PchipInterpolator(x, tokens),
            )
        )
    return sorted(curves, key=lambda curve: curve.params)
