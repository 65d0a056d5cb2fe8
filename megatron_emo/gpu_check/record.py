"""What a check is given and what it leaves: figures, each with the bound it must keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Value = float | int | bool | str | None | Sequence[str]


@dataclass(frozen=True)
class Settings:
    """Where the checks run and how large."""

    device: str = "cuda"
    """cuda or cpu; on cpu, checks of what only a GPU has are skipped."""
    small: bool = False
    """Sizes for seconds on a CPU; figures that mean nothing then carry no bound."""

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"--device: expected cuda or cpu, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch finds no CUDA device; --device cpu --small runs what makes "
                "sense without one"
            )

    @property
    def is_full(self) -> bool:
        """True where speed and memory are those that the bounds are about."""
        return self.device == "cuda" and not self.small


@dataclass(frozen=True)
class Figure:
    """One thing measured or found."""

    name: str
    value: Value
    at_most: float | None = None
    """The bound; None where there is none, or where the value is a verdict itself."""
    passed: bool | None = None
    """None where nothing is claimed."""


class SkippedCheck(Exception):
    """A check that cannot run here; the message says why."""


@dataclass
class Record:
    """What one check has found so far; kept when the check breaks off."""

    figures: list[Figure] = field(default_factory=list)

    def note(self, name: str, value: Value) -> None:
        """Add a figure that decides nothing."""
        self.figures.append(Figure(name, value))

    def bound(self, name: str, value: float, at_most: float, *, applies: bool = True) -> None:
        """Add a figure that fails the check above `at_most` (NaN does too), unless it is only
        shown."""
        if applies:
            self.figures.append(Figure(name, value, at_most, bool(value <= at_most)))
        else:
            self.note(name, value)

    def expect(self, name: str, holds: bool) -> None:
        """Add a statement that fails the check where it does not hold."""
        self.figures.append(Figure(name, bool(holds), None, bool(holds)))

    def skip(self, reason: str) -> None:
        """End the check as skipped.

        Raises:
            SkippedCheck: always.
        """
        raise SkippedCheck(reason)

    @property
    def failures(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.passed is False]
