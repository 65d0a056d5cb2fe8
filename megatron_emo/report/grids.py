"""What the tables of the page hold, cell by cell: results, definitions, runs, inputs, records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_emo.evaluation.records import Json, Record
from megatron_emo.report.layout import METRIC, find_names, label_of
from megatron_emo.report.tables import Cell, Table
from megatron_emo.report.text import (
    NOTHING,
    cell_decimals,
    find_units,
    format_interval,
    format_number,
    format_span,
    show_key,
    table_caption,
    table_heading,
)


@dataclass(frozen=True)
class Item:
    """One cell of a table of the page."""

    text: str
    kind: str = ""
    """number, long, code, or nothing."""
    sort: float | None = None
    aside: str = ""
    is_head: bool = False
    is_best: bool = False


@dataclass(frozen=True)
class Grid:
    """One table of the page."""

    name: str
    heads: Sequence[Item]
    rows: Sequence[Sequence[Item]]
    caption: str = ""


def _heads(*words: str, numbers: Iterable[str] = ()) -> list[Item]:
    return [Item(word, kind="number" if word in numbers else "") for word in words]


def make_result_grid(table: Table, better: Mapping[str, str]) -> Grid:
    """Return the cells of a table, intervals beneath values."""
    units, decimals, layout = find_units(table), cell_decimals(table), table.layout
    with_n = len({cell.n for cell in table.cells.values()}) > 1
    columns = [" / ".join(show_key(key, layout.columns, units)) for key in table.column_keys]
    heads = [Item("metric" if name == METRIC else name) for name in layout.rows]
    rows = []
    for row in table.row_keys:
        line = [Item(text, is_head=True) for text in show_key(row, layout.rows, units)]
        for column in table.column_keys:
            cell = table.cells.get((row, column))
            is_best = (row, column) in table.best
            line.append(
                _number_item(cell, decimals[row, column], with_n, is_best)
                if cell
                else Item(NOTHING, "number")
            )
        rows.append(line)
    caption = " ".join(table_caption(table, better))
    heads += [Item(text, "number") for text in columns]
    return Grid(table_heading(table), heads, rows, caption)


def _number_item(cell: Cell, decimals: int | None, with_n: bool, is_best: bool) -> Item:
    text = format_number(cell.value, decimals)
    if cell.sd is not None:
        text += f" ± {format_number(cell.sd, decimals)}"
    asides = [format_interval(cell.interval, decimals)] if cell.interval else []
    asides += [f"n = {cell.n}"] if with_n else []
    return Item(text, "number", cell.value, ", ".join(asides), is_best=is_best)


def make_definition_grid(records: Sequence[Record], better: Mapping[str, str]) -> Grid:
    """Return a row for each metric, unit and definition."""
    seen = dict.fromkeys((r.metric, r.unit, r.definition) for r in records)
    rows = [
        [
            Item(metric, is_head=True),
            Item("a number" if unit == "1" else unit),
            Item(better.get(metric, NOTHING)),
            Item(definition, "long"),
        ]
        for metric, unit, definition in seen
    ]
    return Grid("Definitions of metrics", _heads("metric", "unit", "better", "definition"), rows)


def make_run_grid(records: Sequence[Record]) -> Grid:
    """Return a row for each command, commit and set of versions."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        about = record.provenance
        key = (_say(about.get("command")), _say(about.get("commit")), _say(about.get("versions")))
        groups.setdefault(key, []).append(_say(about.get("date")))
    rows = [
        [
            Item(command, "code", is_head=True),
            Item(format_span(sorted(dates))),
            Item(str(len(dates)), "number", len(dates)),
            Item(commit, "code"),
            Item(versions, "long"),
        ]
        for (command, commit, versions), dates in groups.items()
    ]
    names = ("command", "date (UTC)", "records", "commit", "versions")
    return Grid("Commands", _heads(*names, numbers=("records",)), rows)


def _say(value: Json) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_say(each)}" for name, each in value.items()) or NOTHING
    return str(value) if value not in (None, "") else NOTHING


def make_input_grids(records: Sequence[Record]) -> list[Grid]:
    """Return models and data files with their hashes."""
    models = dict.fromkeys((r.model, r.model_sha256) for r in records if r.model)
    files = dict.fromkeys(pair for record in records for pair in record.data.items())
    return [
        Grid(
            name,
            _heads("name", "sha256"),
            [[Item(one, is_head=True), Item(sha or NOTHING, "code")] for one, sha in found],
        )
        for name, found in (("Models", models), ("Data", files))
        if found
    ]


def make_record_grid(records: Sequence[Record]) -> Grid:
    """Return a row for each record."""
    names = find_names(records)
    heads = _heads(
        *("metric", *names, "value", "interval", "unit", "n", "seed", "model folder", "seconds"),
        numbers=("value", "n", "seed", "seconds"),
    )
    name = f"{len(records)} records" if len(records) != 1 else "1 record"
    return Grid(name, heads, [_record_row(record, names) for record in records])


def _record_row(record: Record, names: Sequence[str]) -> list[Item]:
    interval = record.interval
    ends = f"[{interval.low:.5g}, {interval.high:.5g}] {interval.method}" if interval else NOTHING
    return [
        Item(record.metric, is_head=True),
        *(Item(label_of(record, name) or NOTHING) for name in names),
        Item(f"{record.value:.6g}", "number", record.value),
        Item(ends),
        Item(record.unit),
        Item(f"{record.n} {record.n_unit}", "number", record.n),
        _optional(record.seed, "d"),
        Item(record.model or NOTHING),
        _optional(record.seconds, ".1f"),
    ]


def _optional(value: float | None, form: str) -> Item:
    return Item(NOTHING, "number") if value is None else Item(format(value, form), "number", value)
