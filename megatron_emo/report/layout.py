"""Which labels become rows, which columns: as asked for, or by what varies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_emo.evaluation.records import Record

METRIC, MODEL = "metric", "model"
COMPARED = ("objective", MODEL, "method")
"""Labels that name what is compared; the others say on what."""
FIRST = ("human", "reference", "base", "untouched", "mle")
"""Values that stand before others: what the others are held against."""
MOST_METRICS = 6
MOST_COLUMNS = 8


@dataclass(frozen=True)
class Layout:
    """Names of labels; `metric` and `model` count as labels too."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]


def label_of(record: Record, name: str) -> str:
    """Return a record's value of a label, "" where it has none."""
    if name == METRIC:
        return record.metric
    if name == MODEL and MODEL not in record.labels:
        return record.model or ""
    return str(record.labels.get(name, ""))


def is_seed(name: str) -> bool:
    """Say whether a label counts repetitions of one thing: seed, train_seed, data-seed..."""
    return re.search(r"(^|[_-])seed$", name) is not None


def select(
    records: Sequence[Record], metrics: Sequence[str], where: Mapping[str, Sequence[str]]
) -> list[Record]:
    """Return the records of `metrics` (all if empty) whose labels have one of the values asked.

    Raises:
        ValueError: a metric or a value that no record has, with those that there are.
    """
    if metrics:
        _check_known("--metric", metrics, [record.metric for record in records])
    for name, values in where.items():
        _check_known(f"--where {name}", values, [label_of(record, name) for record in records])
    kept = [
        record
        for record in records
        if (not metrics or record.metric in metrics)
        and all(label_of(record, name) in values for name, values in where.items())
    ]
    if not kept:
        raise ValueError("--metric, --where: expected records that satisfy all, found none")
    if metrics:
        kept.sort(key=lambda record: metrics.index(record.metric))
    return kept


def _check_known(flag: str, asked: Iterable[str], found: Iterable[str]) -> None:
    found = list(dict.fromkeys(found))
    unknown = [value for value in asked if value not in found]
    if unknown:
        known = ", ".join(repr(value) for value in found) or "none"
        raise ValueError(f"{flag}: expected any of {known}, got {unknown[0]!r}")


def find_names(records: Iterable[Record]) -> list[str]:
    """Return the names of labels, in the order in which they are met."""
    return list(dict.fromkeys(name for record in records for name in record.labels))


def find_varying(
    records: Sequence[Record], names: Iterable[str], compared: Sequence[str] = COMPARED
) -> list[str]:
    """Return the names whose values differ, those of `compared` last: rivals are neighbours."""
    varying = [name for name in names if len({label_of(r, name) for r in records}) > 1]
    return sorted(varying, key=lambda name: name in compared)


def order_keys(keys: Iterable[tuple[str, ...]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return keys without repetition: metrics as they come, values of `FIRST`, then by nature."""
    keys = list(dict.fromkeys(keys))
    met = {
        name: {value: place for place, value in enumerate(dict.fromkeys(key[at] for key in keys))}
        for at, name in enumerate(names)
        if name == METRIC
    }
    return sorted(
        keys,
        key=lambda key: [
            [(0, met[name][value], "")] if name in met else _nature(value)
            for name, value in zip(names, key, strict=True)
        ],
    )


def _nature(value: str) -> list[tuple]:
    """Sort emo2 before emo10, numbers by size."""
    if value in FIRST:
        return [(0, FIRST.index(value), "")]
    try:
        return [(1, float(value), value)]
    except ValueError:
        parts = re.split(r"(\d+)", value)
        return [(2, int(p), "") if p.isdecimal() else (3, 0, p) for p in parts if p] or [(4, 0, "")]


def choose_layouts(
    records: Sequence[Record],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    compared: Sequence[str] | None = None,
) -> list[tuple[Layout, list[Record]]]:
    """Return layouts, each with the records that it is for.

    With `rows` or `columns` there is one, or one for each metric where neither names `metric`.
    Rows left out are the labels that vary, columns left out the metrics. With neither, metrics of
    the same labels share a table; a row is a combination of what varies, seeds apart, or, for one
    metric, what is compared, against the label of most values.

    Args:
        compared: labels that come last among rows; by default `COMPARED`.

    Raises:
        ValueError: a name that no record has as a label, or one that is named twice.
    """
    if not rows and not columns:
        groups = _group_by_labels(records)
        return [each for group in groups for each in _choose(group, compared)]
    columns = tuple(columns or (METRIC,))
    if not rows:
        rows = [name for name in _find_rows(records, compared) if name not in columns]
    layout = Layout(tuple(rows), columns)
    _check_names(layout, records)
    if METRIC in layout.rows + layout.columns:
        return [(layout, list(records))]
    metrics = dict.fromkeys(record.metric for record in records)
    return [(layout, [record for record in records if record.metric == m]) for m in metrics]


def _check_names(layout: Layout, records: Sequence[Record]) -> None:
    names = layout.rows + layout.columns
    _check_known("--rows, --columns", names, [*find_names(records), METRIC, MODEL])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"--rows, --columns: expected different labels, got {twice!r} twice")


def _group_by_labels(records: Sequence[Record]) -> list[list[Record]]:
    """Metrics measured under the same labels."""
    by_metric: dict[str, list[Record]] = {}
    for record in records:
        by_metric.setdefault(record.metric, []).append(record)
    groups: dict[frozenset[str], list[Record]] = {}
    for own in by_metric.values():
        names = frozenset(name for name in find_names(own) if not is_seed(name))
        groups.setdefault(names, []).extend(own)
    return list(groups.values())


def _choose(
    records: list[Record], compared: Sequence[str] | None
) -> list[tuple[Layout, list[Record]]]:
    varying = _find_rows(records, compared)
    metrics = list(dict.fromkeys(record.metric for record in records))
    if len(metrics) == 1 and len(varying) > 1:
        counts = {name: len({label_of(r, name) for r in records}) for name in varying[:-1]}
        fitting = [name for name in counts if counts[name] <= MOST_COLUMNS]
        if fitting:
            column = max(fitting, key=counts.__getitem__)
            rows = tuple(name for name in varying if name != column)
            return [(Layout(rows, (column,)), records)]
    layout = Layout(tuple(varying) or (MODEL,), (METRIC,))
    chunks = [metrics[at : at + MOST_METRICS] for at in range(0, len(metrics), MOST_METRICS)]
    return [(layout, [r for r in records if r.metric in chunk]) for chunk in chunks]


def _find_rows(records: Sequence[Record], compared: Sequence[str] | None) -> list[str]:
    """What varies, with `model` where labels alone would put several models into one cell."""
    names = [name for name in find_names(records) if not is_seed(name)]
    varying = find_varying(records, names, compared or COMPARED)
    if MODEL in varying:
        return varying
    models: dict[tuple, set[str]] = {}
    for record in records:
        key = (record.metric, tuple(sorted(record.labels.items())))
        models.setdefault(key, set()).add(label_of(record, MODEL))
    return [*varying, MODEL] if any(len(found) > 1 for found in models.values()) else varying
