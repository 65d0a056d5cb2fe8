"""What pictures are drawn from: a table of runs, by objective, with the laws fitted to it once."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_emo.scaling.comparison.compare import CompareSettings, Comparison, compare_objectives
from megatron_emo.scaling.comparison.joint_compare import LawTest, compare_laws
from megatron_emo.scaling.comparison.pairs import Pairs, Runs, pair_runs, parse_roles, read_runs
from megatron_emo.scaling.laws.bootstrap import Bootstrap, bootstrap_fit, has_survived
from megatron_emo.scaling.laws.fit import Fit, FitSettings, check_table, fit_runs, leave_out_largest
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.laws.table import (
    ROLES,
    RunTable,
    parse_columns,
    read_run_table,
    read_text,
)
from megatron_emo.scaling.pictures.picture import join
from megatron_emo.scaling.pictures.vertices import Vertices, find_vertices

DEFAULT_COLUMNS = (
    ("objective", ("label", "objective")),
    ("params", ("params",)),
    ("tokens", ("tokens",)),
    ("flops", ("flops_all", "flops")),
    ("loss", ("loss",)),
    ("seed", ("seed",)),
    ("hours", ("gpu_hours",)),
    ("budget", ("budget",)),
)
"""Role -> columns of runs.csv, the first that is there; seed, hours, budget need not be."""
OPTIONAL = ("seed", "hours", "budget")
GRID = 48
"""Places on a line or band."""


@dataclass(frozen=True)
class PictureSettings:
    """How laws and intervals are found."""

    baseline: str = "mle"
    approach: str = "vpnls"
    """Of the surface: 3 or vpnls."""
    draws: int = 200
    level: float = 0.9
    seed: int = 0
    reach: float = 4.0
    """How far beyond the largest C the frontier is drawn, as a factor."""

    def __post_init__(self) -> None:
        if self.approach not in ("3", "vpnls"):
            raise ValueError(f"--approach: expected 3 or vpnls, got {self.approach}")
        if self.draws < 20:
            raise ValueError(f"--bootstrap: expected at least 20 draws, got {self.draws}")
        if not 0 < self.level < 1:
            raise ValueError(f"--level: expected between 0 and 1, got {self.level}")
        if not self.reach >= 1:
            raise ValueError(f"--reach: expected at least 1, got {self.reach}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected at least 0, got {self.seed}")


@dataclass(frozen=True)
class SurfaceLaw:
    """A surface of an objective's runs, with what is known of its error."""

    table: RunTable
    fit: Fit
    bootstrap: Bootstrap
    without_largest: Surface | None
    held_out: Mapping
    """As `leave_out_largest`."""

    @property
    def draws(self) -> list[Surface]:
        """Surfaces of resamples that have an optimum at each C; [] where they are too few."""
        count = len(self._surfaces)
        return self._surfaces if has_survived(count, count + self.num_lost) else []

    @property
    def num_lost(self) -> int:
        """Resamples without a surface that has an optimum at each C."""
        return len(self.bootstrap.draws["E"]) - len(self._surfaces)

    @cached_property
    def _surfaces(self) -> list[Surface]:
        names = ("E", "A", "B", "alpha", "beta")
        rows = np.array([self.bootstrap.draws[name] for name in names]).T
        return [
            Surface(*row) for row in rows.tolist() if min(row[1:]) > 0 and np.isfinite(row).all()
        ]


@dataclass(frozen=True)
class Study:
    """Runs of one or more objectives of one study."""

    csv: Path
    columns: str
    """As --columns, roles and names."""
    tables: Mapping[str, RunTable]
    """By objective, rows without a finite value left out."""
    settings: PictureSettings
    runs: Mapping[str, Runs] | None = None
    """By objective, for pairs."""
    no_pairs: str = ""
    """Why there are no runs for pairs."""
    notes: tuple[str, ...] = ()
    progress: Callable[[str], None] = lambda what: None
    """Takes what is begun."""
    _kept: dict = field(default_factory=dict, repr=False)

    def _once(self, what: str, name: str, make: Callable):
        """Laws are fitted once; a refusal is kept too."""
        if (what, name) not in self._kept:
            self.progress(f"{what} of {name}")
            try:
                self._kept[what, name] = make()
            except ValueError as error:
                self._kept[what, name] = error
        found = self._kept[what, name]
        if isinstance(found, ValueError):
            raise ValueError(str(found))
        return found

    def vertices(self, name: str) -> Vertices:
        """Return the best sizes of an objective's budgets.

        Raises:
            ValueError: no budget has one.
        """
        return self._once(
            "best sizes",
            name,
            lambda: find_vertices(self.tables[name], self.settings.draws, self.settings.seed),
        )

    def surface(self, name: str) -> SurfaceLaw:
        """Return the surface of an objective's runs.

        Raises:
            ValueError: runs that are too few, or vary too little.
        """
        return self._once("surface", name, lambda: self._fit_surface(self.tables[name]))

    def _fit_surface(self, table: RunTable) -> SurfaceLaw:
        settings, chosen = FitSettings(self.settings.approach), self.settings
        table = check_table(table, settings)
        fit = fit_runs(table, settings)
        if not min(fit.surface.A, fit.surface.B, fit.surface.alpha, fit.surface.beta) > 0:
            raise ValueError(f"its surface has no least loss at a C: {fit.surface}")
        held_out = leave_out_largest(table, settings)
        rest = table.take(table.budgets != table.budgets.max())
        return SurfaceLaw(
            table=table,
            fit=fit,
            bootstrap=bootstrap_fit(table, settings, fit, chosen.draws, seed=chosen.seed),
            without_largest=None if "reason" in held_out else fit_runs(rest, settings).surface,
            held_out=held_out,
        )

    @cached_property
    def others(self) -> list[str]:
        """Objectives beside the baseline."""
        return [name for name in self.tables if name != self.settings.baseline]

    def pairs(self, name: str) -> Pairs:
        """Return the pairs of the baseline and another objective.

        Raises:
            ValueError: no baseline, or no pairs.
        """
        if self.runs is None:
            raise ValueError(self.no_pairs)
        if self.settings.baseline not in self.runs:
            raise ValueError(
                f"--baseline: expected one of {', '.join(self.runs)}, got {self.settings.baseline}"
            )
        return pair_runs(self.runs[self.settings.baseline], self.runs[name], name)

    def comparison(self, name: str) -> Comparison:
        """Return the comparison of an objective with the baseline, trends at `GRID` places.

        Raises:
            ValueError: no pairs, or no law of the baseline.
        """
        return self._once("comparison", name, lambda: self._compare(name))

    def _compare(self, name: str) -> Comparison:
        pairs, chosen = self.pairs(name), self.settings
        grid = spread(pairs.base.flops.min(), pairs.base.flops.max())
        settings = CompareSettings(
            chosen.approach, chosen.draws, chosen.level, chosen.seed, tuple(grid.tolist())
        )
        base = self.runs[chosen.baseline]
        return compare_objectives(pairs, base, self.runs[name], settings)

    def law_test(self, name: str) -> LawTest:
        """Return the test of one law for the baseline and another objective.

        Raises:
            ValueError: too few pairs.
        """
        chosen = self.settings
        return self._once(
            "joint law",
            name,
            lambda: compare_laws(self.pairs(name), chosen.draws, chosen.level, chosen.seed),
        )

    def gather(self, find: Callable[[str], object], names=None) -> tuple[dict, list[str]]:
        """Return {objective: what was found}, and for those without it a sentence why.

        Raises:
            ValueError: none has it, with the reasons.
        """
        found, refused = {}, []
        for name in self.tables if names is None else names:
            try:
                found[name] = find(name)
            except ValueError as error:
                refused.append(f"{name}: {error}")
        if not found:
            raise ValueError("; ".join(refused) or "expected two objectives, got one")
        return found, [f"Without {text}." for text in refused]


def spread(low: float, high: float) -> np.ndarray:
    """Return `GRID` places from low to high, evenly in the log."""
    return np.geomspace(low, high, GRID) if high > low else np.array([low])


def describe_dropped(tables: Mapping[str, RunTable]) -> str:
    """Return a sentence on points left out, by reason; "" of none."""
    reasons = Counter(point.reason for table in tables.values() for point in table.dropped)
    if not reasons:
        return ""
    words = [f"{count} ({reason})" for reason, count in reasons.items()]
    return f"Left out: {join(words)}."


def describe_lost(laws: Mapping[str, SurfaceLaw]) -> list[str]:
    """Return sentences on resamples without a surface, by objective; [] of none."""
    words = []
    for name, law in laws.items():
        if law.num_lost:
            end = "" if law.draws else ", too many for intervals"
            count = len(law.bootstrap.draws["E"])
            words.append(
                f"{name}: {law.num_lost} of {count} resamples have no surface with a best size"
                f"{end}."
            )
    return words


def describe_draws(found: Mapping[str, Comparison]) -> list[str]:
    """Return sentences on resamples that comparisons lack, by objective; [] of none."""
    return [f"{name}: {words}." for name, one in found.items() for words in one.describe_lost()]


def read_study(
    path: str | os.PathLike,
    columns: str | None,
    settings: PictureSettings,
    progress: Callable[[str], None] = lambda what: None,
) -> Study:
    """Return the study of a CSV.

    Args:
        columns: as --columns of `compare`, or, of one objective, of `fit`; by default those of
            runs.csv.

    Raises:
        ValueError: columns that are not there, cells that are no numbers.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    rows, header = _read_rows(path)
    notes: tuple[str, ...] = ()
    if columns is None:
        columns, notes = _choose_columns(path, rows, header)
    if "objective=" not in columns:
        table = read_run_table(path, parse_columns(columns))
        why = "one objective: --columns has no objective="
        return Study(path, columns, {"runs": table}, settings, None, why, notes, progress)
    roles = parse_roles(columns)
    own = {role: name for role, name in roles.items() if role in ROLES}
    objective = roles["objective"]
    if objective not in header:
        raise ValueError(f"--columns: {objective!r}: expected one of {header} of {path}")
    names = dict.fromkeys(read_text(row[objective]) for row in rows)
    tables = {name: read_run_table(path, own, where={objective: name}) for name in names}
    if not tables:
        raise ValueError(f"--csv {path}: expected rows, got none")
    tables = _by_baseline(tables, settings.baseline)
    runs, no_pairs = None, "expected two objectives, got one: " + ", ".join(tables)
    if len(tables) > 1:
        try:
            runs = read_runs(path, roles)
        except ValueError as error:
            no_pairs = f"pairs need every measurement: {error}"
    return Study(path, columns, tables, settings, runs, no_pairs, notes, progress)


def _by_baseline(tables: dict[str, RunTable], baseline: str) -> dict[str, RunTable]:
    return dict(sorted(tables.items(), key=lambda item: item[0] != baseline))


def _read_rows(path: Path) -> tuple[list[dict], list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            return list(reader), list(reader.fieldnames or [])
        except csv.Error as error:
            raise ValueError(f"--csv {path}: line {reader.line_num}: {error}") from error


def _choose_columns(path: Path, rows: list[dict], header: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return --columns of a table with the names of runs.csv, and what it has not."""
    chosen, notes = {}, []
    for role, candidates in DEFAULT_COLUMNS:
        name = next((name for name in candidates if name in header), None)
        if name is None and role not in OPTIONAL:
            raise ValueError(
                f"--columns: {path} has no column {' or '.join(candidates)}: expected "
                f"{role}=NAME with one of {', '.join(header)}"
            )
        empty = [line for line, row in enumerate(rows, 2) if name and not read_text(row[name])]
        if role in OPTIONAL and (name is None or empty):
            where = f"{name} is empty in line {empty[0]}" if empty else f"no column {candidates[0]}"
            notes.append(f"without {role}: {where}")
            continue
        chosen[role] = name
    return ",".join(f"{role}={name}" for role, name in chosen.items()), tuple(notes)
