"""Whether small runs choose the objective that large ones would."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_emo.evaluation.intervals import wilson
from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.comparison.pairs import Pairs
from megatron_emo.scaling.comparison.resampling import mean_interval


@dataclass(frozen=True)
class Decision:
    """How often the pairs of one size choose as the largest size does."""

    params: float
    accuracy: float
    right: int
    n: int
    """Pairs: of all objectives against the baseline."""
    interval: Interval
    """Wilson's."""


@dataclass(frozen=True)
class Target:
    """What the largest size chooses between the baseline and one objective."""

    name: str
    difference: float
    """Mean of the other's loss minus the baseline's, nats/token."""
    interval: Interval | None
    """Of resampled pairs; None of one pair."""

    @property
    def is_decided(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def decide(
    compared: list[tuple[Pairs, np.ndarray]], level: float, draws: int, seed: int
) -> tuple[list[Target], list[Decision]]:
    """Return what the largest size chooses, and how often each smaller one chooses alike.

    A pair chooses the lower loss; the largest size by the mean over its pairs.

    Args:
        compared: each objective's pairs with its differences to the baseline [n].

    Raises:
        ValueError: fewer than two sizes.

    References:
        DataDecide: decision accuracy, there over pairs of corpora.
    """
    targets, right = [], {}
    for pairs, differences in compared:
        largest = pairs.sizes.max()
        if largest == 0:
            raise ValueError("decision accuracy: expected at least 2 sizes, got 1")
        here = pairs.sizes == largest
        chosen = differences[here]
        interval = mean_interval(chosen, pairs.cells[here], draws, level, seed)
        targets.append(Target(pairs.name, float(chosen.mean()), interval))
        agrees = np.sign(differences) == np.sign(chosen.mean())
        for size in range(largest):
            here = pairs.sizes == size
            params = float(np.median(pairs.base.params[here]))
            right.setdefault(params, []).extend(agrees[here].tolist())
    decisions = [
        Decision(
            params,
            float(np.mean(votes)),
            int(np.sum(votes)),
            len(votes),
            wilson(int(np.sum(votes)), len(votes), level),
        )
        for params, votes in sorted(right.items())
    ]
    return targets, decisions
