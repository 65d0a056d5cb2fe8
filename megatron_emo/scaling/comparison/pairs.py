"""Runs of two objectives that differ in nothing else, side by side, from any CSV."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_emo.scaling.laws.surfaces import FLOPS_PER_PARAM_TOKEN
from megatron_emo.scaling.laws.table import (
    BUDGET_TOLERANCE,
    SIZE_TOLERANCE,
    RunTable,
    group_values,
    make_run_table,
    read_text,
)

ROLES = {
    "objective": "name of the training objective",
    "params": "N, parameters",
    "tokens": "D, training tokens",
    "flops": "C, training FLOPs, the loss's own share included",
    "loss": "held-out loss, nats/token, of the same text for all",
    "seed": "pairs runs of one seed; all are one without it",
    "hours": "measured GPU-hours, or any other cost that grows with tokens",
    "budget": "nominal FLOPs, which pairs runs whose tokens differ",
    "run": "name of the run, by which evaluation records find it",
    "documents": "file that `evaluate.py perplexity --per-document` wrote, from the CSV's folder",
}
"""What a column can be."""
LARGEST = 1e60
"""Of a cell: products of larger ones leave what a float holds."""
_NEEDED = ("objective", "params", "tokens", "loss")
_TEXTS = ("objective", "seed", "run", "documents")


@dataclass(frozen=True)
class Runs:
    """Runs of one objective; every array is [n]."""

    lines: np.ndarray
    """int64, of the CSV, the header being line 1."""
    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    """float64, nats/token."""
    hours: np.ndarray | None
    budgets: np.ndarray | None
    """Nominal FLOPs."""
    seeds: tuple[str, ...]
    names: tuple[str, ...] | None
    documents: tuple[Path, ...] | None

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Sequence[int] | np.ndarray) -> Runs:
        """Return the runs of indices, which may repeat."""
        changed = {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                changed[name] = value[index]
            elif value is not None:
                changed[name] = tuple(value[i] for i in index)
        return replace(self, **changed)

    def to_table(self) -> RunTable:
        """Return the table that `fit` takes."""
        return make_run_table(
            self.params, self.loss, self.tokens, self.flops, lines=self.lines, budgets=self.budgets
        )


@dataclass(frozen=True)
class Pairs:
    """Runs of a baseline and of another objective, pair by pair."""

    name: str
    """Of the other objective."""
    base: Runs
    other: Runs
    sizes: np.ndarray
    """int64 [n], equal for one size, ascending with N."""
    cells: np.ndarray
    """int64 [n], equal for the seeds of one size and budget."""
    unpaired: tuple[int, ...]
    """Lines of runs without a partner."""

    def __len__(self) -> int:
        return len(self.base)

    def take(self, index: Sequence[int] | np.ndarray) -> Pairs:
        """Return the pairs of indices, which may repeat."""
        return replace(
            self,
            base=self.base.take(index),
            other=self.other.take(index),
            sizes=self.sizes[index],
            cells=self.cells[index],
        )


def parse_roles(text: str) -> dict[str, str]:
    """Return {role: column}; a column's name may hold spaces, "=" and commas.

    Raises:
        ValueError: an unknown role, one given twice, a needed one missing.
    """
    found = re.split(rf"(?:^|,)\s*({'|'.join(ROLES)})=", text)
    if found[0] or len(found) < 3:
        raise ValueError(f"--columns: expected ROLE=NAME with {', '.join(ROLES)}, got {text!r}")
    pairs = list(zip(found[1::2], found[2::2], strict=True))
    columns = dict(pairs)
    if len(columns) < len(pairs) or not all(columns.values()):
        raise ValueError(f"--columns: expected each role once, with a name, got {text!r}")
    for role in _NEEDED:
        if role not in columns:
            raise ValueError(f"--columns: expected {role}=NAME, got {text!r}")
    return columns


def read_runs(path: str | os.PathLike, columns: Mapping[str, str]) -> dict[str, Runs]:
    """Return {objective: its runs} of a CSV with a header, in the order of first rows.

    Raises:
        ValueError: a column that is not there, a cell that is no number above 0, no rows.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    rows: dict[str, list[tuple[int, dict]]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for line, cells in _read_rows(reader, columns, path):
                rows.setdefault(cells["objective"], []).append((line, cells))
        except csv.Error as error:
            raise ValueError(f"--csv {path}: line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"--csv {path}: expected rows, got none")
    return {name: _make_runs(own, path.parent) for name, own in rows.items()}


def _read_rows(
    reader: csv.DictReader, columns: Mapping[str, str], path: Path
) -> Iterator[tuple[int, dict]]:
    header = reader.fieldnames or []
    for name in columns.values():
        if name not in header:
            raise ValueError(f"--columns: {name!r}: expected one of {header} of {path}")
    for row in reader:
        yield (
            reader.line_num,
            {
                role: _read_cell(role, row[name], name, path, reader.line_num)
                for role, name in columns.items()
            },
        )


def _read_cell(role: str, cell: str | None, name: str, path: Path, line: int) -> str | float:
    text = read_text(cell)
    if role in _TEXTS:
        if not text:
            raise ValueError(f"--csv {path}: line {line}, {name!r}: expected a text, got none")
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # A missing measurement is no measurement: a pair without it would be a pair that is left out.
    if not 0 < number < LARGEST:
        raise ValueError(
            f"--csv {path}: line {line}, {name!r}: expected a number above 0, got {cell!r}"
        )
    return number


def _make_runs(rows: list[tuple[int, dict]], folder: Path) -> Runs:
    def numbers(role: str) -> np.ndarray | None:
        return np.array([cells[role] for _, cells in rows]) if role in rows[0][1] else None

    def texts(role: str) -> tuple[str, ...] | None:
        return tuple(cells[role] for _, cells in rows) if role in rows[0][1] else None

    params, tokens = numbers("params"), numbers("tokens")
    flops = numbers("flops")
    documents = texts("documents")
    return Runs(
        lines=np.array([line for line, _ in rows]),
        params=params,
        tokens=tokens,
        flops=FLOPS_PER_PARAM_TOKEN * params * tokens if flops is None else flops,
        loss=numbers("loss"),
        hours=numbers("hours"),
        budgets=numbers("budget"),
        seeds=texts("seed") or ("",) * len(rows),
        names=texts("run"),
        documents=documents and tuple(folder / name for name in documents),
    )


def pair_runs(base: Runs, other: Runs, name: str) -> Pairs:
    """Return runs of equal size, seed and budget (or, without budgets, of about equal tokens).

    Raises:
        ValueError: two runs of one objective for one place, or no pair.
    """
    count = len(base)
    sizes = group_values(np.concatenate([base.params, other.params]), SIZE_TOLERANCE)
    goals = _group_goals(base, other, sizes)
    seeds = (*base.seeds, *other.seeds)
    places: list[dict[tuple, int]] = [{}, {}]
    for row, key in enumerate(zip(sizes.tolist(), goals.tolist(), seeds, strict=True)):
        side = int(row >= count)
        own = other if side else base
        if key in places[side]:
            lines = [own.lines[i] for i in (places[side][key], row - side * count)]
            raise ValueError(
                f"--csv: lines {lines[0]} and {lines[1]}: two runs of one size, budget and seed of "
                "one objective; expected one (name a seed= or a budget= column)"
            )
        places[side][key] = row - side * count
    shared = sorted(places[0].keys() & places[1].keys())
    lone = [base.lines[places[0][key]] for key in places[0].keys() - places[1].keys()]
    lone += [other.lines[places[1][key]] for key in places[1].keys() - places[0].keys()]
    if not shared:
        raise ValueError(f"{name}: expected runs of the baseline's sizes and budgets, got none")
    cells = {key[:2]: None for key in shared}
    number = {cell: index for index, cell in enumerate(cells)}
    return Pairs(
        name=name,
        base=base.take([places[0][key] for key in shared]),
        other=other.take([places[1][key] for key in shared]),
        sizes=np.unique([key[0] for key in shared], return_inverse=True)[1],
        cells=np.array([number[key[:2]] for key in shared]),
        unpaired=tuple(sorted(map(int, lone))),
    )


def _group_goals(base: Runs, other: Runs, sizes: np.ndarray) -> np.ndarray:
    """Equal for the runs of one budget, or of about as many tokens for one size."""
    if base.budgets is not None:
        return group_values(np.concatenate([base.budgets, other.budgets]), SIZE_TOLERANCE)
    tokens = np.concatenate([base.tokens, other.tokens])
    goals = np.empty(len(tokens), np.int64)
    for size in np.unique(sizes):
        here = sizes == size
        goals[here] = group_values(tokens[here], BUDGET_TOLERANCE)
    return goals
