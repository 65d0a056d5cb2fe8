"""A picture of a study: marks in panels, which are both what is drawn and what its CSV holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_emo.whole_files import write_csv

KINDS = ("run", "found", "law", "band", "forecast", "forecast band", "foretold", "reference")
"""run: a measurement; found: an estimate with intervals; law, band: a line and its interval;
forecast: a law from fewer runs, or beyond them; foretold: its value where a found one is;
reference: what to compare with, as no difference."""


@dataclass(frozen=True)
class Mark:
    """One row of the CSV: a point, a place on a line, or on a band's edge."""

    panel: str
    x_axis: str
    y_axis: str
    series: str
    kind: str
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None


@dataclass(frozen=True)
class Axis:
    """A quantity with its unit, drawn in its log or not."""

    label: str
    is_log: bool = False
    base: int = 10
    """Of the log: ticks are at its powers, or between them too where it is 10."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    name: str
    x: Axis
    y: Axis

    def points(self, series: str, kind: str, x, y, **ends) -> list[Mark]:
        """Return the marks of arrays [n], `ends` being x_low, x_high, y_low or y_high [n] too.

        An end that is NaN is not known; x and y are.
        """
        x, y = (np.asarray(values, float) for values in (x, y))
        if kind not in KINDS or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise RuntimeError(f"{self.name}: {kind}: expected one of {KINDS} at known places")
        marks = []
        for at, place in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
            known = {name: float(values[at]) for name, values in ends.items()}
            known = {name: end for name, end in known.items() if math.isfinite(end)}
            marks.append(Mark(self.name, self.x.label, self.y.label, series, kind, *place, **known))
        return marks


@dataclass(frozen=True)
class Picture:
    """What is drawn."""

    name: str
    """Of the files."""
    title: str
    caption: str
    """n, what was left out and why, and what bands are."""
    panels: tuple[Panel, ...]
    marks: tuple[Mark, ...]
    kinds: Mapping[str, str]
    """Kind of mark -> its name in the legend; those without are not in it."""
    is_ordered: bool = False
    """Series are steps of one quantity: shades of one scale, not colours apart."""
    shares_axes: bool = False
    """All panels have the same limits."""
    order: tuple[str, ...] = ()
    """All series of the study: each has one colour in all pictures."""

    @property
    def series(self) -> list[str]:
        """Names, in the order of marks; references are nobody's."""
        return list(dict.fromkeys(mark.series for mark in self.marks if mark.series))

    def place(self, series: str) -> int:
        """Return a series' place, by which it has its colour and shape."""
        return list(dict.fromkeys([*self.order, *self.series])).index(series)


def write_table(path: Path, marks: Iterable[Mark]) -> None:
    """Write the CSV of a picture, whole or not at all; numbers with all their digits."""
    write_csv(path, [field.name for field in fields(Mark)], map(vars, marks))


def join(words: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
