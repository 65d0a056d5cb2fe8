"""Percentile intervals of a law's parameters: the fit repeated on resampled runs."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.laws.fit import PARAMETERS, Fit, FitSettings, fit_runs
from megatron_emo.scaling.laws.table import RunTable

UNITS = ("point", "curve")
LEVEL = 0.8
SURVIVING = 0.8
"""Share of draws that must have a value: an interval of fewer is of those that went well."""
_CHUNK = 10


def percentile_ends(values: np.ndarray, level: float) -> np.ndarray:
    """Return the ends [2, ...] between which `level` of the values [draws, ...] lie.

    Quantile p is taken at rank p (draws + 1), at which an interval of few draws is as wide, on
    average, as one of many.
    """
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")


def percentile_interval(values: np.ndarray, level: float) -> Interval:
    """Return the interval that holds `level` of the values [draws], as `percentile_ends`."""
    low, high = percentile_ends(values, level)
    return Interval(float(low), float(high), level, "bootstrap")


def has_survived(count: int, draws: int) -> bool:
    """Return whether `count` of `draws` are enough for an interval."""
    return count > 1 and count >= SURVIVING * draws


def surviving_interval(values: np.ndarray, level: float) -> Interval | None:
    """Return the interval of the draws [draws] that are no NaN; None where they are too few."""
    there = values[np.isfinite(values)]
    return percentile_interval(there, level) if has_survived(len(there), len(values)) else None


@dataclass(frozen=True)
class Bootstrap:
    """Parameters of the fits of resamples."""

    draws: dict[str, np.ndarray]
    """By PARAMETERS, [draws]; NaN where a resample had no fit, or the fit does not say."""
    unit: str
    """What was resampled."""
    failures: dict[str, int]
    """How many resamples had no fit, by reason."""

    def intervals(self, level: float = LEVEL) -> dict[str, Interval]:
        """Return percentile intervals of the parameters that at least two resamples have."""
        found = {}
        for name, values in self.draws.items():
            values = values[np.isfinite(values)]
            if len(values) > 1:
                found[name] = percentile_interval(values, level)
        return found


def resample(table: RunTable, approach: str, unit: str, rng: np.random.Generator) -> RunTable:
    """Return as many points (within each budget in approach 2), or as many whole curves.

    Whole curves are training curves, or budgets in approach 2; a curve drawn twice counts twice.
    Approach 1 resamples points within each curve.
    """
    labels = table.budgets if approach == "2" else table.curves
    if unit == "curve":
        chosen = rng.choice(np.unique(labels), len(np.unique(labels)))
        index = [np.flatnonzero(labels == label) for label in np.sort(chosen)]
        copies = np.repeat(np.arange(len(index)), [len(rows) for rows in index])
        drawn = table.take(np.concatenate(index))
        return replace(drawn, **{"budgets" if approach == "2" else "curves": copies})
    if approach in ("1", "2"):
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return table.take(np.concatenate([rng.choice(rows, len(rows)) for rows in groups]))
    return table.take(rng.integers(0, len(table), len(table)))


def bootstrap_fit(
    table: RunTable,
    settings: FitSettings,
    fit: Fit,
    draws: int,
    *,
    unit: str = "point",
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Bootstrap:
    """Return parameters of `draws` resamples of a table, descents starting from its own fit.

    Args:
        fit: of the whole table with the same settings.
        unit: one of UNITS, as `resample`.
        seed: with a draw's number it decides its resample, whatever the number of jobs.
        jobs: processes.
        progress: takes the number of draws done since it was last called.

    Raises:
        ValueError: draws or jobs below 1, an unknown unit.
    """
    if draws < 1:
        raise ValueError(f"--bootstrap: expected at least 1 draw, got {draws}")
    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    if unit not in UNITS:
        raise ValueError(f"--bootstrap-by: expected one of {UNITS}, got {unit!r}")
    chunks = [range(low, min(low + _CHUNK, draws)) for low in range(0, draws, _CHUNK)]
    work = partial(_fit_draws, table, settings, fit, unit, seed)
    rows: list[list[float]] = []
    failures: Counter[str] = Counter()
    for chunk_rows, chunk_failures in _map(work, chunks, jobs):
        rows += chunk_rows
        failures.update(chunk_failures)
        if progress is not None:
            progress(len(chunk_rows))
    columns = np.array(rows).T
    return Bootstrap(dict(zip(PARAMETERS, columns, strict=True)), unit, dict(failures))


def _map(work: Callable, chunks: list[range], jobs: int) -> Iterator:
    """As `map`, in `jobs` processes. Spawned ones: a fork of a process with threads may hang."""
    if jobs == 1 or len(chunks) == 1:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(chunks)), mp_context=context) as pool:
        yield from pool.map(work, chunks)


def _fit_draws(
    table: RunTable, settings: FitSettings, fit: Fit, unit: str, seed: int, chunk: range
) -> tuple[list[list[float]], list[str]]:
    rows, failures = [], []
    for draw in chunk:
        sample = resample(table, settings.approach, unit, np.random.default_rng([seed, draw]))
        try:
            found = fit_runs(sample, settings, start=fit.surface, fewest_optima=2)
            rows.append([found.parameters[name] for name in PARAMETERS])
        except ValueError as error:
            rows.append([np.nan] * len(PARAMETERS))
            failures.append(str(error).partition(":")[2].partition(":")[0].strip())
    return rows, failures
