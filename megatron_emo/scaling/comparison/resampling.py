"""Which pairs a draw of the bootstrap has, and intervals of means from such draws."""

from __future__ import annotations

import numpy as np
from scipy import stats

from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.laws.bootstrap import percentile_interval

MIN_FREEDOM = 5
"""Of a bootstrap: one cell of two seeds has but two different draws."""


class PairSampler:
    """Draws of pairs: seeds within each cell of the study, or pairs where cells have one seed.

    Sizes and budgets were chosen, seeds happened: where every cell has two seeds or more, a draw
    takes as many less one from each, which gives the mean its right variance however few they are
    (Rao and Wu 1988), and what differs between cells counts for nothing.
    """

    def __init__(self, cells: np.ndarray, seed: int) -> None:
        """`cells`: int64 [n], equal for pairs that differ in their seed alone."""
        _, self._cells, counts = np.unique(cells, return_inverse=True, return_counts=True)
        self._counts, self._rng = counts, np.random.default_rng(seed)
        self.is_stratified = bool((counts > 1).all())
        self.unit = "seeds within cells" if self.is_stratified else "pairs"

    def draw(self) -> np.ndarray:
        """Return how often each pair counts, float64 [n], n in all."""
        return self.draw_many(1)[0]

    def draw_many(self, draws: int) -> np.ndarray:
        """Return the weights of several draws [draws, n]."""
        weights = np.zeros((draws, len(self._cells)))
        if not self.is_stratified:
            self._add(weights, np.arange(len(self._cells)), len(self._cells))
            return weights
        for cell, count in enumerate(self._counts):
            self._add(weights, np.flatnonzero(self._cells == cell), count - 1)
        return weights

    def _add(self, weights: np.ndarray, rows: np.ndarray, size: int) -> None:
        """Share the rows' whole weight out among `size` of them, drawn with replacement."""
        picked = self._rng.integers(0, len(rows), (len(weights), size))
        draws = np.arange(len(weights))[:, None]
        np.add.at(weights, (draws, rows[picked]), len(rows) / size)


def count_freedom(cells: np.ndarray) -> int:
    """Return the degrees of freedom of a mean: of seeds within cells, or of pairs."""
    counts = np.unique(cells, return_counts=True)[1]
    return len(cells) - (len(counts) if (counts > 1).all() else 1)


def student_interval(values: np.ndarray, cells: np.ndarray, level: float) -> Interval:
    """Return the interval of the mean of values [n] by Student's t, two values or more.

    The scatter is that of seeds within cells, pooled, where every cell has two; else that of pairs.
    """
    _, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    centre = values.mean()
    if (counts > 1).all():
        centre = (np.bincount(inverse, values) / counts)[inverse]
    freedom = count_freedom(cells)
    error = np.sqrt(np.square(values - centre).sum() / freedom / len(values))
    half = float(stats.t.ppf((1 + level) / 2, freedom) * error)
    return Interval(float(values.mean()) - half, float(values.mean()) + half, level, "student")


def mean_interval(
    values: np.ndarray, cells: np.ndarray, draws: int, level: float, seed: int
) -> Interval | None:
    """Return the interval of the mean of values [n], None of fewer than two.

    By Student's t below MIN_FREEDOM, where resamples are too few to be wide enough.
    """
    if len(values) < 2:
        return None
    if count_freedom(cells) < MIN_FREEDOM:
        return student_interval(values, cells, level)
    weights = PairSampler(cells, seed).draw_many(draws)
    return percentile_interval(weights @ values / len(values), level)
