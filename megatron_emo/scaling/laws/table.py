"""A table of runs from any CSV: sizes, tokens, FLOPs and losses under names that the user gives."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_emo.scaling.laws.surfaces import FLOPS_PER_PARAM_TOKEN

ROLES = {
    "params": "N, parameters",
    "tokens": "D, training tokens",
    "flops": "C, training FLOPs",
    "loss": "held-out loss, nats/token",
    "curve": "name of the run's training curve, where one size has several",
    "budget": "nominal FLOPs, where measured ones scatter",
}
"""What a column can be."""
BUDGET_TOLERANCE = 0.2
"""Relative spread within one budget: neighbouring budgets of published studies differ by 1.6."""
SIZE_TOLERANCE = 1e-3
"""Relative spread within one model size."""


@dataclass(frozen=True)
class Dropped:
    """A point left out of a fit."""

    line: int
    """Of the CSV, the header being line 1."""
    reason: str


@dataclass(frozen=True)
class RunTable:
    """Points of a study; every array is [n]."""

    lines: np.ndarray
    """int64, lines of the CSV."""
    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    """float64, nats/token."""
    curves: np.ndarray
    """int64, equal for the points of one training curve."""
    budgets: np.ndarray
    """int64, equal for the points of one budget, ascending with FLOPs."""
    notes: tuple[str, ...] = ()
    """What was assumed."""
    dropped: tuple[Dropped, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: np.ndarray) -> RunTable:
        """Return the points of a mask [n] or of indices, which may repeat."""
        arrays = ("lines", "params", "tokens", "flops", "loss", "curves", "budgets")
        return replace(self, **{name: getattr(self, name)[index] for name in arrays})

    def drop(self, mask: np.ndarray, reason: str) -> RunTable:
        """Return the points outside `mask` [n], those inside being noted with the reason."""
        gone = tuple(Dropped(int(line), reason) for line in self.lines[mask])
        return replace(self.take(~mask), dropped=self.dropped + gone)


def make_run_table(
    params: np.ndarray,
    loss: np.ndarray,
    tokens: np.ndarray | None = None,
    flops: np.ndarray | None = None,
    *,
    lines: np.ndarray | None = None,
    curves: Sequence[str] | None = None,
    budgets: np.ndarray | None = None,
    budget_tolerance: float = BUDGET_TOLERANCE,
) -> RunTable:
    """Return the table of arrays [n]; what is missing of tokens and FLOPs follows from C = 6 N D.

    Args:
        curves: names of training curves; by default points of one size are one curve.
        budgets: nominal FLOPs; by default measured ones, `budget_tolerance` apart at most.

    Raises:
        ValueError: neither tokens nor FLOPs.
    """
    params, loss = np.asarray(params, float), np.asarray(loss, float)
    notes = []
    if tokens is None and flops is None:
        raise ValueError("--columns: expected flops=NAME or tokens=NAME, got neither")
    if tokens is None:
        tokens = np.asarray(flops, float) / (FLOPS_PER_PARAM_TOKEN * params)
        notes.append("no tokens column: D = C / (6 N)")
    if flops is None:
        flops = FLOPS_PER_PARAM_TOKEN * params * np.asarray(tokens, float)
        notes.append("no flops column: C = 6 N D")
    flops = np.asarray(flops, float)
    return RunTable(
        lines=np.arange(2, len(loss) + 2) if lines is None else np.asarray(lines),
        params=params,
        tokens=np.asarray(tokens, float),
        flops=flops,
        loss=loss,
        curves=group_values(params, SIZE_TOLERANCE)
        if curves is None
        else np.unique(np.asarray(curves, dtype=str), return_inverse=True)[1],
        budgets=group_values(
            flops if budgets is None else np.asarray(budgets, float), budget_tolerance
        ),
        notes=tuple(notes),
    )


def group_values(values: np.ndarray, tolerance: float) -> np.ndarray:
    """Return labels 0, 1, ... [n] ascending with values [n]; a group spans 1 + tolerance."""
    order = np.argsort(values, kind="stable")
    labels = np.empty(len(values), np.int64)
    label, first = -1, -math.inf
    for index in order:
        if label < 0 or values[index] > first * (1 + tolerance):
            label, first = label + 1, values[index]
        labels[index] = label
    return labels


def parse_columns(text: str) -> dict[str, str]:
    """Return {role: column}; a column's name may hold spaces, "=" and commas.

    Raises:
        ValueError: an unknown role, one given twice, or params, loss or both of tokens and flops
            missing.
    """
    found = re.split(rf"(?:^|,)\s*({'|'.join(ROLES)})=", text)
    if found[0] or len(found) < 3:
        raise ValueError(f"--columns: expected ROLE=NAME with {', '.join(ROLES)}, got {text!r}")
    pairs = list(zip(found[1::2], found[2::2], strict=True))
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise ValueError(f"--columns: expected each role once, got {text!r}")
    for role, name in columns.items():
        if not name:
            raise ValueError(f"--columns: {role}: expected a column's name, got ''")
    for role in ("params", "loss"):
        if role not in columns:
            raise ValueError(f"--columns: expected {role}=NAME, got {text!r}")
    if not {"flops", "tokens"} & set(columns):
        raise ValueError(f"--columns: expected flops=NAME or tokens=NAME, got {text!r}")
    return columns


def read_run_table(
    path: str | os.PathLike,
    columns: Mapping[str, str],
    *,
    where: Mapping[str, str] | None = None,
    budget_tolerance: float = BUDGET_TOLERANCE,
) -> RunTable:
    """Return the table of a CSV with a header; rows without a finite value are dropped and named.

    Args:
        columns: as `parse_columns`.
        where: {column: value}, rows of other values are not read; white space about a cell or a
            value counts for nothing.

    Raises:
        ValueError: a column that is not there, a cell that is no number or not above 0, no rows.
        FileNotFoundError: no such file.
    """
    kept, dropped = _read_cells(Path(path), columns, where or {})
    if not kept:
        raise ValueError(f"--csv {path}: expected rows, got none ({len(dropped)} dropped)")
    numbers = {
        role: np.array([row[role] for _, row in kept]) for role in columns if role != "curve"
    }
    table = make_run_table(
        numbers["params"],
        numbers["loss"],
        numbers.get("tokens"),
        numbers.get("flops"),
        lines=np.array([line for line, _ in kept]),
        curves=[row["curve"] for _, row in kept] if "curve" in columns else None,
        budgets=numbers.get("budget"),
        budget_tolerance=budget_tolerance,
    )
    return replace(table, dropped=tuple(dropped))


def _read_cells(
    path: Path, columns: Mapping[str, str], where: Mapping[str, str]
) -> tuple[list[tuple[int, dict]], list[Dropped]]:
    kept, dropped = [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = _of_csv(path, reader, lambda: reader.fieldnames) or []
        for flag, names in (("--columns", columns.values()), ("--where", where)):
            for name in names:
                if name not in header:
                    raise ValueError(f"{flag}: {name!r}: expected one of {header} of {path}")
        while (row := _of_csv(path, reader, lambda: next(reader, None))) is not None:
            if any(read_text(row[name]) != value.strip() for name, value in where.items()):
                continue
            cells = {
                role: read_text(row[name])
                if role == "curve"
                else _number(row[name], name, path, reader)
                for role, name in columns.items()
            }
            bad = [columns[role] for role, cell in cells.items() if cell is None]
            if bad:
                shown = row[bad[0]] or "empty"
                dropped.append(Dropped(reader.line_num, f"{bad[0]}: {shown}"))
            else:
                kept.append((reader.line_num, cells))
    return kept, dropped


def read_text(cell: str | None) -> str:
    """Return a cell's text without the white space about it; "" where a short row has no cell."""
    return (cell or "").strip()


def _of_csv[T](path: Path, reader: csv.DictReader, read: Callable[[], T]) -> T:
    try:
        return read()
    except csv.Error as error:
        raise ValueError(f"--csv {path}: line {reader.line_num}: {error}") from error


def _number(cell: str | None, name: str, path: Path, reader: csv.DictReader) -> float | None:
    """Return the number, or None of a cell that is empty, NaN or infinite."""
    try:
        number = float(cell) if cell and cell.strip() else math.nan
    except ValueError:
        number = -1.0
    if number <= 0 and math.isfinite(number):
        raise ValueError(
            f"--csv {path}: line {reader.line_num}, {name!r}: expected a number above 0, "
            f"got {cell!r}"
        )
    return number if math.isfinite(number) else None


def drop_highest(table: RunTable, count: int) -> RunTable:
    """Return the table without the `count` points of highest loss, noted by name.

    Raises:
        ValueError: a negative count, or one that leaves nothing.
    """
    if not 0 <= count < len(table):
        raise ValueError(f"--drop-highest: expected 0 to {len(table) - 1}, got {count}")
    mask = np.zeros(len(table), bool)
    mask[np.argsort(-table.loss, kind="stable")[:count]] = True
    return table.drop(mask, f"--drop-highest {count}: one of the highest losses")
