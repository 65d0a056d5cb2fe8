"""Tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_emo.evaluation.records import Record
from megatron_emo.report.layout import METRIC
from megatron_emo.report.tables import Table
from megatron_emo.report.text import (
    NOTHING,
    cell_decimals,
    find_units,
    format_cell,
    show_key,
    table_caption,
    table_heading,
)


def format_markdown(
    tables: Sequence[Table], records: Sequence[Record], better: Mapping[str, str], title: str
) -> str:
    """Return a document: a heading and a caption for each table, and the definitions."""
    parts = [f"# {escape(title)}"]
    for table in tables:
        parts += [f"## {escape(table_heading(table))}", format_table(table)]
        parts += [escape(" ".join(table_caption(table, better)))]
    parts += ["## Definitions", "\n".join(_definition_lines(records))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _definition_lines(records: Sequence[Record]) -> list[str]:
    seen = dict.fromkeys((r.metric, r.unit, r.definition) for r in records)
    return [
        f"- **{escape(metric)}** ({escape('a number' if unit == '1' else unit)}): "
        f"{escape(definition)}"
        for metric, unit, definition in seen
    ]


def format_table(table: Table) -> str:
    """Return one table; numbers of a column have the same decimals."""
    units, decimals = find_units(table), cell_decimals(table)
    with_n = len({cell.n for cell in table.cells.values()}) > 1
    layout = table.layout
    heads = [" / ".join(show_key(key, layout.columns, units)) for key in table.column_keys]
    lines = [[*layout.rows, *heads], ["---"] * len(layout.rows) + ["---:"] * len(heads)]
    for row in table.row_keys:
        line = list(map(escape, show_key(row, layout.rows, units)))
        for column in table.column_keys:
            cell = table.cells.get((row, column))
            text = escape(format_cell(cell, decimals[row, column], with_n)) if cell else NOTHING
            line.append(f"**{text}**" if (row, column) in table.best else text)
        lines.append(line)
    lines[0] = [escape("" if name == METRIC else name) for name in lines[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A low line within a word, and brackets that no link follows, mean nothing.
    return re.sub(r"([\\`*|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
