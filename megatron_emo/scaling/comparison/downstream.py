"""Other measurements of paired runs, from evaluation records, beside their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_emo.evaluation.records import Interval, Record
from megatron_emo.scaling.comparison.pairs import Pairs
from megatron_emo.scaling.comparison.resampling import mean_interval

MAX_SHOWN = 5


@dataclass(frozen=True)
class MetricComparison:
    """One metric of two objectives."""

    metric: str
    unit: str
    difference: float
    """Mean over pairs of the other's minus the baseline's."""
    interval: Interval | None
    """Of resampled pairs; None of one pair."""
    slope: float
    """Metric per nat/token, one line for both objectives."""
    at_equal_loss: float
    """How far the other objective's line lies above the baseline's: what the loss does not say."""
    at_equal_loss_interval: Interval
    """Student's t of n - 3, of n runs."""
    n: int
    """Pairs."""


def select_values(records: Sequence[Record], metric: str, labels: Mapping[str, str]) -> dict:
    """Return {name of a run: its record} of a metric: the record's label `run`, else its model.

    Raises:
        ValueError: no such record, or two of one run.
    """
    found: dict[str, Record] = {}
    for record in records:
        if record.metric != metric or any(record.labels.get(k) != v for k, v in labels.items()):
            continue
        run = record.labels.get("run") or record.model
        if run in found:
            raise ValueError(
                f"--metric {metric}: two records of run {run}: expected one (--labels NAME=VALUE "
                f"chooses; this one has {dict(record.labels)})"
            )
        found[run] = record
    if not found:
        known = ", ".join(sorted({record.metric for record in records}))
        raise ValueError(f"--metric {metric}: expected one of {known} with labels {dict(labels)}")
    return found


def compare_metric(
    pairs: Pairs, values: Mapping[str, Record], level: float, draws: int, seed: int
) -> MetricComparison:
    """Return the paired difference of a metric, and that at equal loss.

    At equal loss: metric = a + b loss + c [other], least squares over all runs; c is returned.

    Raises:
        ValueError: runs without a record, named; a table without names; fewer than 4 runs.
    """
    if pairs.base.names is None:
        raise ValueError("--columns: expected run=NAME with --records, got none")
    lacking = [n for n in (*pairs.base.names, *pairs.other.names) if n not in values]
    if lacking:
        more = f" and {len(lacking) - MAX_SHOWN} more" if len(lacking) > MAX_SHOWN else ""
        raise ValueError(
            f"--records: expected a record of every run, got none of "
            f"{', '.join(lacking[:MAX_SHOWN])}{more}"
        )
    sides = [
        np.array([values[name].value for name in runs.names]) for runs in (pairs.base, pairs.other)
    ]
    differences = sides[1] - sides[0]
    loss = np.concatenate([pairs.base.loss, pairs.other.loss])
    is_other = np.repeat([0.0, 1.0], len(pairs))
    columns = np.stack([np.ones_like(loss), loss - loss.mean(), is_other], axis=1)
    measured = np.concatenate(sides)
    freedom = len(loss) - 3
    if freedom < 1 or np.linalg.matrix_rank(columns) < 3:
        raise ValueError(f"--records: expected at least 4 runs of different loss, got {len(loss)}")
    found, *_ = np.linalg.lstsq(columns, measured, rcond=None)
    scatter = np.square(measured - columns @ found).sum() / freedom
    error = float(np.sqrt(scatter * np.linalg.inv(columns.T @ columns)[2, 2]))
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    record = values[pairs.base.names[0]]
    return MetricComparison(
        metric=record.metric,
        unit=record.unit,
        difference=float(differences.mean()),
        interval=mean_interval(differences, pairs.cells, draws, level, seed),
        slope=float(found[1]),
        at_equal_loss=float(found[2]),
        at_equal_loss_interval=Interval(
            float(found[2] - half), float(found[2] + half), level, "student"
        ),
        n=len(pairs),
    )
