"""Records into cells and tables: what is pooled, what a spread is, and which cell is the best.

The rules:
- A cell holds records of one metric that agree in every label but seeds. Records that differ in
  another label, or in the model, are never pooled: that is an error which names the label.
- Seeds are labels named seed or *_seed; where there are none, the seed of the record. Records of
  one seed label are averaged first, so that n counts runs and not samples of one run. A record
  over seeds that keeps settings.per_seed is taken apart into them.
- Several seeds give mean and standard deviation (n - 1 below the sum), and the interval
  mean +- t(n - 1) sd / sqrt(n), of 95%. One record keeps its own interval.
- Best is the cell whose interval overlaps with that of no competitor. Competitors stand in the same
  column, are of the same metric and definition, and differ in the compared label alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_emo.evaluation.records import Interval, Record
from megatron_emo.report.layout import (
    COMPARED,
    METRIC,
    MODEL,
    Layout,
    choose_layouts,
    find_names,
    find_varying,
    is_seed,
    label_of,
    order_keys,
)
from megatron_emo.report.student import t_quantile

LEVEL = 0.95

Key = tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One metric of one combination of labels."""

    metric: str
    unit: str
    value: float
    """The record's, or the mean over repetitions."""
    values: tuple[float, ...]
    """One for each repetition."""
    interval: Interval | None
    records: tuple[Record, ...]

    @property
    def n(self) -> int:
        """Number of repetitions."""
        return len(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over repetitions; None of one."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def definitions(self) -> tuple[str, ...]:
        """The definitions of its records."""
        return tuple(dict.fromkeys(record.definition for record in self.records))


@dataclass(frozen=True)
class Table:
    """Cells by row and column; a key has a value for each name of `rows` or `columns`."""

    layout: Layout
    row_keys: tuple[Key, ...]
    column_keys: tuple[Key, ...]
    cells: Mapping[tuple[Key, Key], Cell]
    shared: Mapping[str, str]
    """Labels that are the same in all records and no row or column."""
    best: frozenset[tuple[Key, Key]]
    compared: tuple[str, ...]
    """Labels in which competitors differ."""

    @property
    def metrics(self) -> list[str]:
        """Names, in the order of cells."""
        return list(dict.fromkeys(cell.metric for cell in self.cells.values()))

    def rivals(self) -> list[dict[tuple[Key, Key], Cell]]:
        """Return the cells in groups of those that compete."""
        return group_rivals(self.cells, self.layout, self.compared)


def make_tables(
    records: Sequence[Record],
    better: Mapping[str, str],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    compared: Sequence[str] | None = None,
) -> list[Table]:
    """Return the tables of all records; see `choose_layouts` for what is left out.

    Args:
        better: metric -> high or low; others have no best.
        compared: labels in which competitors differ; by default the first of `COMPARED` that is a
            row or a column, or else the only row.

    Raises:
        ValueError: labels that do not exist, or records that must not be pooled.
    """
    return [
        _make_table(layout, own, better, compared)
        for layout, own in choose_layouts(records, rows, columns, compared)
    ]


def _make_table(
    layout: Layout,
    records: Sequence[Record],
    better: Mapping[str, str],
    compared: Sequence[str] | None,
) -> Table:
    groups: dict[tuple[Key, Key], list[Record]] = {}
    for record in records:
        row = tuple(label_of(record, name) for name in layout.rows)
        column = tuple(label_of(record, name) for name in layout.columns)
        groups.setdefault((row, column), []).append(record)
    used = layout.rows + layout.columns
    cells = {key: make_cell(own, used) for key, own in groups.items()}
    compared = _find_compared(layout, compared)
    others = [name for name in find_names(records) if name not in used and not is_seed(name)]
    return Table(
        layout,
        tuple(order_keys((row for row, _ in cells), layout.rows)),
        tuple(order_keys((column for _, column in cells), layout.columns)),
        cells,
        {name: label_of(records[0], name) for name in others},
        find_best(cells, layout, better, compared),
        compared,
    )


def _find_compared(layout: Layout, compared: Sequence[str] | None) -> tuple[str, ...]:
    if compared:
        return tuple(name for name in compared if name in layout.rows + layout.columns)
    named = [name for name in COMPARED if name in layout.rows + layout.columns]
    return tuple(named[:1] or (layout.rows if len(layout.rows) == 1 else ()))


def make_cell(records: Sequence[Record], used: Sequence[str] = ()) -> Cell:
    """Return the cell of records that agree in the labels `used`.

    Raises:
        ValueError: records that differ in another label, in the model, in unit or definition, or
            that repeat a seed with another value.
    """
    unique = list({repr(record): record for record in records}.values())
    first = unique[0]
    _check_poolable(unique, used)
    values = _values_by_seed(unique, used)
    if len(values) == 1:
        interval = first.interval if len(unique) == 1 else None
        return Cell(first.metric, first.unit, values[0], values, interval, tuple(unique))
    mean = statistics.fmean(values)
    half = t_quantile(LEVEL, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    interval = Interval(mean - half, mean + half, LEVEL, "t")
    return Cell(first.metric, first.unit, mean, values, interval, tuple(unique))


def _check_poolable(records: Sequence[Record], used: Sequence[str]) -> None:
    first = records[0]
    where = _describe(first, used)
    names = [name for name in find_names(records) if not is_seed(name) and name not in used]
    for name in find_varying(records, names):
        values = ", ".join(dict.fromkeys(label_of(record, name) or "none" for record in records))
        raise ValueError(
            f"{where}: records differ in the label {name} ({values}): "
            f"put it into --rows or --columns, or choose with --where {name}=VALUE"
        )
    for name in ("unit", "definition"):
        values = list(dict.fromkeys(getattr(record, name) for record in records))
        if len(values) > 1:
            raise ValueError(f"{where}: records differ in {name}: {values[0]!r} and {values[1]!r}")
    has_seed_labels = any(is_seed(name) for record in records for name in record.labels)
    models = list(dict.fromkeys((record.model, record.model_sha256) for record in records))
    if len(models) > 1 and not has_seed_labels:
        names = ", ".join(f"{name} ({(sha or 'no hash')[:8]})" for name, sha in models)
        raise ValueError(
            f"{where}: records of different models, {names}, and no label for their seed: "
            f"put {MODEL} into --rows, or measure with --label seed=N"
        )


def _values_by_seed(records: Sequence[Record], used: Sequence[str]) -> tuple[float, ...]:
    if len(records) == 1:
        per_seed = records[0].settings.get("per_seed")
        if isinstance(per_seed, Mapping) and len(per_seed) == records[0].n > 1:
            return tuple(float(value) for value in per_seed.values())
        return (float(records[0].value),)
    names = [name for name in find_names(records) if is_seed(name) and name not in used]
    runs: dict[tuple, dict[int | None, Record]] = {}
    for record in records:
        key = tuple(label_of(record, name) for name in names) if names else (record.seed,)
        run = runs.setdefault(key, {})
        if record.seed in run:
            _refuse_repetition(run[record.seed], record, used)
        run[record.seed] = record
    return tuple(statistics.fmean(r.value for r in run.values()) for run in runs.values())


def _refuse_repetition(one: Record, other: Record, used: Sequence[str]) -> None:
    seed = ", ".join([f"seed {one.seed}"] + [f"{k}={v}" for k, v in one.labels.items()])
    names = sorted(set(one.settings) | set(other.settings))
    differing = [name for name in names if one.settings.get(name) != other.settings.get(name)]
    differing += [name for name in ("n", "data") if getattr(one, name) != getattr(other, name)]
    raise ValueError(
        f"{_describe(one, used)}: two records of one seed ({seed}), {one.value:.6g} and "
        f"{other.value:.6g}; they differ in {', '.join(differing) or 'when they were made'}: "
        "leave a file out, or give them labels"
    )


def _describe(record: Record, used: Sequence[str]) -> str:
    labels = [f"{name}={label_of(record, name) or 'none'}" for name in used if name != METRIC]
    return f"{record.metric} ({', '.join(labels)})" if labels else record.metric


def find_best(
    cells: Mapping[tuple[Key, Key], Cell],
    layout: Layout,
    better: Mapping[str, str],
    compared: Sequence[str],
) -> frozenset[tuple[Key, Key]]:
    """Return the keys of cells that are better than each competitor by more than the intervals."""
    found = set()
    for group in group_rivals(cells, layout, compared):
        metric = next(iter(group.values())).metric
        definitions = {definition for cell in group.values() for definition in cell.definitions}
        if metric in better and len(group) > 1 and len(definitions) == 1:
            sign = 1 if better[metric] == "high" else -1
            key = max(group, key=lambda key, group=group, sign=sign: sign * group[key].value)
            rest = [cell for other, cell in group.items() if other != key]
            if all(_is_apart(group[key], cell) for cell in rest):
                found.add(key)
    return frozenset(found)


def group_rivals(
    cells: Mapping[tuple[Key, Key], Cell], layout: Layout, compared: Sequence[str]
) -> list[dict[tuple[Key, Key], Cell]]:
    """Return groups of cells of a metric that differ in the labels `compared` alone."""
    groups: dict[tuple, dict[tuple[Key, Key], Cell]] = {}
    for (row, column), cell in cells.items():
        pairs = zip(layout.rows + layout.columns, row + column, strict=True)
        fixed = tuple(value for name, value in pairs if name not in compared)
        groups.setdefault((cell.metric, fixed), {})[row, column] = cell
    return list(groups.values())


def _is_apart(one: Cell, other: Cell) -> bool:
    a, b = one.interval, other.interval
    return a is not None and b is not None and (a.low > b.high or a.high < b.low)
