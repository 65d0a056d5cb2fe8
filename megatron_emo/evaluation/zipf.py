"""How steeply word frequency falls with rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_emo.evaluation.ngrams import Words

TOP = 5000
"""Ranks looked at, the most frequent words first."""
STEPS = 15
"""Points on the line per e-fold of rank."""


def fit_zipf_slope(texts: Sequence[Words]) -> tuple[float, int]:
    """Return (slope, number of distinct words): least squares of log frequency on log rank.

    Ranks are those below min(distinct words, TOP), rounded on the log axis to 1/STEPS, and of equal
    ones the first is kept: unthinned, the tail would weigh most. About -1 for prose.

    Raises:
        ValueError: fewer than 3 distinct words, which have no line.

    References:
        Pillutla et al. (2021), mauve-experiments, src/metrics.py: the last rank is left out there.
    """
    counts = Counter(word for words in texts for word in words)
    if len(counts) < 3:
        raise ValueError(f"zipf: expected at least 3 distinct words, found {len(counts)}")
    frequencies = np.sort(np.fromiter(counts.values(), dtype=np.float64))[::-1]
    ranks = np.arange(1, min(len(counts), TOP), dtype=np.float64)
    points, first = np.unique(np.round(STEPS * np.log(ranks)) / STEPS, return_index=True)
    slope = np.polyfit(points, np.log(frequencies[first]), 1)[0]
    return float(slope), len(counts)
