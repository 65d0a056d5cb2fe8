"""Numbers, headings and captions as words, the same in Markdown, in pictures and in HTML."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from megatron_emo.evaluation.records import Interval
from megatron_emo.report.layout import METRIC
from megatron_emo.report.tables import Cell, Key, Table, group_rivals

NOTHING = "–"
DIGITS = 4
"""Significant ones, where nothing says how sure a number is."""


def find_decimals(cells: Sequence[Cell]) -> int | None:
    """Return decimals that leave two digits of the usual spread of these cells.

    None asks for `DIGITS` significant digits: numbers too small to be written out.
    """
    spreads = [spread for cell in cells if (spread := _spread(cell)) > 0]
    if spreads:
        decimals = 1 - math.floor(math.log10(statistics.median(spreads)))
    else:
        largest = max((abs(cell.value) for cell in cells), default=0.0)
        decimals = DIGITS - 1 - math.floor(math.log10(largest)) if largest else 1
    return min(max(decimals, 0), 6) if decimals <= 8 else None


def _spread(cell: Cell) -> float:
    if cell.sd is not None:
        return cell.sd
    return (cell.interval.high - cell.interval.low) / 2 if cell.interval else 0.0


def format_number(value: float, decimals: int | None) -> str:
    """Return the number, with a true minus sign and no sign before zero."""
    text = f"{value:.{DIGITS}g}" if decimals is None else f"{value:.{decimals}f}"
    if text.startswith("-"):
        text = text[1:] if not float(text) else "−" + text[1:]
    return text


def format_cell(cell: Cell, decimals: int | None, with_n: bool = False) -> str:
    """Return "mean ± sd", "value [low, high]" or the value, with n where asked."""
    value = format_number(cell.value, decimals)
    if cell.sd is not None:
        count = f" (n={cell.n})" if with_n else ""
        return f"{value} ± {format_number(cell.sd, decimals)}{count}"
    return f"{value} {format_interval(cell.interval, decimals)}" if cell.interval else value


def format_interval(interval: Interval, decimals: int | None) -> str:
    """Return "[low, high]"."""
    ends = (format_number(end, decimals) for end in (interval.low, interval.high))
    return f"[{', '.join(ends)}]"


def cell_decimals(table: Table) -> dict[tuple[Key, Key], int | None]:
    """Return (row, column) -> decimals: the same for cells that compete, or for a whole column."""
    groups = table.rivals()
    if len(groups) == len(table.cells):
        groups = group_rivals(table.cells, table.layout, table.layout.rows)
    decimals = {}
    for group in groups:
        decimals.update(dict.fromkeys(group, find_decimals(list(group.values()))))
    return decimals


def with_unit(name: str, unit: str) -> str:
    """Return the name, its unit in brackets; a pure number has none."""
    return name if unit in ("1", "") else f"{name} ({unit})"


def show_key(key: Key, names: Sequence[str], units: Mapping[str, str]) -> tuple[str, ...]:
    """Return a key's values for people: units at metrics, a dash for nothing."""
    return tuple(
        (with_unit(value, units.get(value, "1")) if name == METRIC else value) or NOTHING
        for name, value in zip(names, key, strict=True)
    )


def find_units(table: Table) -> dict[str, str]:
    """Return metric -> unit."""
    return {cell.metric: cell.unit for cell in table.cells.values()}


def format_span(dates: Sequence[str]) -> str:
    """Return the first and the last of sorted dates (UTC), to the minute."""
    pattern = r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ"
    first, last = (re.sub(f"^{pattern}$", r"\1 \2", date) for date in (dates[0], dates[-1]))
    return first if first == last else f"{first} to {last}"


def table_heading(table: Table) -> str:
    """Return what the table is of."""
    units = find_units(table)
    names = [with_unit(name, units[name]) for name in table.metrics]
    used = table.layout.rows + table.layout.columns
    by = _join([name for name in used if name != METRIC])
    shown = ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and others"
    return f"{shown}, by {by}"


def table_caption(table: Table, better: Mapping[str, str]) -> list[str]:
    """Return sentences: what cells hold, what they share, which rule makes a number bold."""
    lines = []
    counts = {cell.n for cell in table.cells.values() if cell.n > 1}
    if counts:
        n = str(min(counts)) if len(counts) == 1 else "n"
        lines.append(f"Mean ± standard deviation over {n} seeds.")
    singles = [c.interval for c in table.cells.values() if c.n == 1 and c.interval]
    if singles:
        lines.append(f"[low, high]: {_join(describe_intervals(singles))}.")
    shared = [f"{name} {value}" for name, value in table.shared.items() if value]
    if shared:
        lines.append(f"The same in all: {', '.join(shared)}.")
    ends = {better[name] for name in table.metrics if name in better}
    if ends and table.compared:
        lines.append(_best_rule(table, better, ends))
    return lines


def describe_intervals(intervals: Iterable[Interval]) -> list[str]:
    """Return each kind of interval once."""
    kinds = {
        "range": "the least and the largest single value",
        "wilson": "Wilson's interval of a share",
        "bootstrap": "bootstrap interval",
        "normal": "normal interval",
        "t": "Student's interval of the mean",
    }
    return list(
        dict.fromkeys(
            kinds.get(i.method, i.method) + ("" if i.method == "range" else f" ({i.level:.0%})")
            for i in intervals
        )
    )


def _best_rule(table: Table, better: Mapping[str, str], ends: set[str]) -> str:
    high = [name for name in table.metrics if better.get(name) == "high"]
    low = [name for name in table.metrics if better.get(name) == "low"]
    which = "highest" if not low else "lowest" if not high else "best"
    aside = f" (highest {_join(high)}, lowest {_join(low)})" if high and low else ""
    over = _join(table.compared)
    is_row = set(table.compared).isdisjoint(table.layout.rows)
    line, names = ("row", table.layout.columns) if is_row else ("column", table.layout.rows)
    others = [name for name in names if name not in (*table.compared, METRIC)]
    within = f" within one {_join(others)}" if others else ""
    return (
        f"Bold: the {which} of a {line}{within}{aside}, compared by {over}, where its interval "
        "overlaps with no other's; over seeds that is the mean's 95% interval (Student's t). "
        "No bold: the measurements do not tell them apart."
    )


def _join(words: Sequence[str]) -> str:
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
