"""The least loss of a surface at each C of a table, by the FLOPs that the table itself counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from megatron_emo.scaling.laws.bootstrap import surviving_interval
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.laws.table import SIZE_TOLERANCE, RunTable, group_values

BEYOND = 30.0
"""How far beyond a table's sizes an optimum is looked for, as a factor."""
PLACES = 500


def tails(draws: np.ndarray, level: float) -> np.ndarray:
    """Return low and high ends [2, n] that hold `level` of draws [m, n] at each place.

    Draws without a value there are left out; NaN where too few have one (`surviving_interval`).
    """
    draws = np.asarray(draws, float)
    ends = np.full((2, draws.shape[1]), np.nan)
    for at, values in enumerate(draws.T):
        if (found := surviving_interval(values, level)) is not None:
            ends[:, at] = found.low, found.high
    return ends


@dataclass(frozen=True)
class FlopsRule:
    """C / (N D) by size, 6 only where a table counts so: exact counts depend on the shape."""

    log_params: np.ndarray
    """[sizes], ascending."""
    log_ratio: np.ndarray

    @classmethod
    def of_table(cls, table: RunTable) -> FlopsRule:
        """Return what a table's runs say, the median of each size."""
        ratio = np.log(table.flops / table.params / table.tokens)
        labels = group_values(table.params, SIZE_TOLERANCE)
        sizes = range(labels.max() + 1)
        return cls(
            np.array([np.log(table.params[labels == size]).mean() for size in sizes]),
            np.array([np.median(ratio[labels == size]) for size in sizes]),
        )

    def at(self, log_params: np.ndarray) -> np.ndarray:
        """Return log C / (N D) at sizes [n], without kinks between the table's."""
        if len(self.log_params) == 1:
            return np.full(np.shape(log_params), self.log_ratio[0])
        inside = np.clip(log_params, self.log_params[0], self.log_params[-1])
        return PchipInterpolator(self.log_params, self.log_ratio)(inside)

    def optimum(self, surface: Surface, flops: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return (N*, D*, loss), each [n], at flops [n]; NaN where none lies within `BEYOND`.

        Beyond the table's sizes C / (N D) is that of the outermost.
        """
        reach = np.log(BEYOND)
        x = np.linspace(self.log_params[0] - reach, self.log_params[-1] + reach, PLACES)
        ratio = self.at(x)
        tokens = np.log(np.asarray(flops, float))[:, None] - ratio - x
        term = surface.A * np.exp(-surface.alpha * x)
        loss = surface.E + term + surface.B * np.exp(-surface.beta * tokens)
        best = loss.argmin(axis=1)
        inside = (best > 0) & (best < PLACES - 1)
        rows, best = np.arange(len(loss)), np.clip(best, 1, PLACES - 2)
        left, here, right = (loss[rows, best + step] for step in (-1, 0, 1))
        bend = left - 2 * here + right
        shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1), 0)
        place = x[best] + shift * (x[1] - x[0])
        least = here - 0.25 * (left - right) * shift
        places = np.exp(place)
        tokens = np.asarray(flops, float) / places / np.exp(self.at(place))
        return tuple(np.where(inside, values, np.nan) for values in (places, tokens, least))
