"""Tables beside the pictures: laws, best sizes, comparisons, all with intervals.

A table is {"name", "caption", "heads": [text], "rows": [[cell]]}; a cell is a text, a number, None,
or {"value", "low", "high"}, a number with its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.comparison.compare import Estimate, Group
from megatron_emo.scaling.laws.fit import describe_doubts
from megatron_emo.scaling.pictures.study import (
    Study,
    describe_draws,
    describe_dropped,
    describe_lost,
)

MOST_SIZES = 8
"""Of the comparison's table: where each budget has sizes of its own they are too many to read."""
_SURFACE = ("E", "alpha", "beta", "a", "A", "B")
_RESOURCES = {"tokens": "tokens", "flops": "FLOPs", "hours": "GPU-hours"}


def make_tables(study: Study) -> tuple[list[dict], list[tuple[str, str]]]:
    """Return the tables that the runs suffice for, and (name, why) of those they do not."""
    makers: dict[str, Callable[[Study], tuple[list[str], list[str], list[list]]]] = {
        "Law of each objective": _surfaces,
        "Best size of each budget": _vertices,
        f"Against {study.settings.baseline}": _comparisons,
        "One law or two": _joint,
    }
    tables, refused = [], []
    for name, make in makers.items():
        try:
            tables.append(_table(name, *make(study)))
        except ValueError as error:
            refused.append((f"table {name}", str(error)))
    return tables, refused


def _cell(value: float | None, interval: Interval | None = None) -> dict | float | None:
    if value is None or not math.isfinite(value):
        return None
    if interval is None or not all(map(math.isfinite, (interval.low, interval.high))):
        return float(value)
    return {"value": float(value), "low": float(interval.low), "high": float(interval.high)}


def _surfaces(study: Study) -> tuple[list[str], list[str], list[list]]:
    """Return the caption's sentences, heads and rows, as the other tables do."""
    found, without = study.gather(study.surface)
    rows = []
    for name, law in found.items():
        intervals = law.bootstrap.intervals(study.settings.level) if law.draws else {}
        cells = [_cell(law.fit.parameters[key], intervals.get(key)) for key in _SURFACE]
        doubts = describe_doubts(law.fit.converged, law.fit.at_bound)
        held = law.held_out.get("rms_error")
        rows.append(
            [name, *cells, law.fit.objective, _cell(held), len(law.table), "; ".join(doubts)]
        )
    words = [
        f"L = E + A/N^alpha + B/D^beta by {study.settings.approach}; a is the exponent of N*(C). A "
        "and B are flat directions. Intervals: "
        f"{study.settings.level:.0%} of {study.settings.draws} resamples of runs. Misfit: "
        f"{next(iter(found.values())).fit.loss_name}. Held out: root mean square error at the "
        "largest budget of the surface of the others.",
        *describe_lost(found),
        *without,
        describe_dropped(study.tables),
    ]
    heads = ["objective", *_SURFACE, "misfit", "held out, nats/token", "runs", "doubts"]
    return words, heads, rows


def _vertices(study: Study) -> tuple[list[str], list[str], list[list]]:
    found, without = study.gather(study.vertices)
    rows = []
    for name, own in found.items():
        ends = own.intervals(study.settings.level)
        for at, curve in enumerate(own.curves):
            values = [own.optima.params[at], own.optima.tokens[at], own.optima.loss[at]]
            cells = [
                _cell(value, Interval(*map(float, ends[:, at, column]), study.settings.level))
                for column, value in enumerate(values)
            ]
            rows.append([name, curve.flops, *cells, values[1] / values[0], len(curve.table)])
        rows += [[name, r.flops, *[None] * 4, r.num_points] for r in own.refused]
    words = [
        "Vertices of parabolas over log N and log D. A budget without a best size has a dash.",
        f"Intervals: {study.settings.level:.0%} of {study.settings.draws} draws of residuals.",
        *without,
    ]
    heads = ["objective", "C, FLOPs", "N*", "D*", "loss, nats/token", "D*/N*", "runs"]
    return words, heads, rows


def _comparisons(study: Study) -> tuple[list[str], list[str], list[list]]:
    if study.runs is None:
        raise ValueError(study.no_pairs)
    found, without = study.gather(study.comparison, study.others)
    resources = list(next(iter(found.values())).overall.differences)
    rows = []
    for name, one in found.items():
        sizes = one.sizes if len(one.sizes) <= MOST_SIZES else ()
        for group in (one.overall, *sizes, *one.budgets):
            rows.append(
                [name, group.name, group.differences["tokens"].n, *_cells(group, resources)]
            )
    baseline = study.settings.baseline
    words = [
        f"Loss minus that of {baseline} at equal resource, nats/token, and how many times the "
        f"resource {baseline} would need. {study.settings.level:.0%} intervals.",
        *describe_draws(found),
        *dict.fromkeys(
            f"{note}." for one in found.values() for note in one.notes if "trend" not in note
        ),
        *without,
    ]
    heads = ["objective", "pairs of", "pairs"]
    heads += [f"loss at equal {_RESOURCES[r]}" for r in resources]
    heads += [f"speedup in {_RESOURCES[r]}" for r in resources]
    return words, heads, rows


def _cells(group: Group, resources: list[str]) -> list:
    estimates: list[Estimate] = [group.differences[r] for r in resources]
    estimates += [group.speedups[r] for r in resources]
    return [_cell(found.value, found.interval) for found in estimates]


def _joint(study: Study) -> tuple[list[str], list[str], list[list]]:
    if study.runs is None:
        raise ValueError(study.no_pairs)
    found, without = study.gather(study.law_test, study.others)
    rows = []
    for name, test in found.items():
        for side, label, law in zip(
            ("base", "other"), (study.settings.baseline, name), test.two.laws, strict=True
        ):
            cells = [
                _cell(getattr(law, key), test.intervals[f"{side} {key}"])
                for key in ("alpha", "beta", "A", "B")
            ]
            tested = [test.statistic, test.p] if side == "other" else [None, None]
            rows.append([label, _cell(law.E, test.intervals["E"]), *cells, *tested, test.n])
    words = [
        "Laws with one E for both objectives. p: share of draws under one law for both in which "
        "two laws gain as much; small where the objectives have different laws.",
        *without,
    ]
    heads = ["objective", "E", "alpha", "beta", "A", "B", "statistic", "p", "pairs"]
    return words, heads, rows


def _table(name: str, words: list[str], heads: list[str], rows: list[list]) -> dict:
    plain = [
        [cell.item() if isinstance(cell, np.generic) else cell for cell in row] for row in rows
    ]
    caption = " ".join(filter(None, words))
    return {"name": name, "caption": caption, "heads": heads, "rows": plain}
