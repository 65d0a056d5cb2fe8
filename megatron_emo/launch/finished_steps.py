"""What a run's finished steps took, each counted once, from one rank's event log over restarts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FinishedSteps:
    """The steps of a run that are in its weights."""

    seconds: float
    """Sum of their wall time; evaluations, saves and starts are not in it."""
    rank_seconds: float
    """The same times the ranks each of them ran on."""
    starts: int
    """How often the run began or went on."""
    losses: Mapping[str, float | str]
    """By name, of the last step; empty of a rank that has none."""


def count_finished_steps(records: Iterable[Mapping[str, Any]], iteration: int) -> FinishedSteps:
    """Return what iterations 1 to `iteration` took.

    A step that was lost with a killed process and done again counts as it was done last. A record
    gives the mean of the steps since the one before it; the first of a start is one that the second
    counts again, as Megatron's interval timer does.

    Args:
        records: of one rank, in order, as `read_events` yields them.

    Raises:
        ValueError: iterations that no record tells the seconds of.
    """
    found: dict[int, tuple[float, int]] = {}
    losses: Mapping[str, float | str] = {}
    base = ranks = starts = 0
    is_first = True
    for record in records:
        kind = record["kind"]
        if kind == "start":
            base, is_first, ranks, starts = 0, True, record["world_size"], starts + 1
        elif kind == "load":
            base = record["iteration"]
        elif kind in ("step", "heartbeat"):
            now, seconds = record["iteration"], float(record["step_ms"]) / 1e3
            found |= dict.fromkeys(range(base + 1, now + 1), (seconds, ranks))
            base, is_first = (base if is_first else now), False
            if now == iteration and kind == "step":
                losses = record["losses"]
    wanted = range(1, iteration + 1)
    missing = [i for i in wanted if i not in found or not math.isfinite(found[i][0])]
    if missing:
        raise ValueError(
            f"expected the seconds of {iteration} iterations in the event log, found none of "
            f"{len(missing)} of them, iteration {missing[0]} the first"
        )
    return FinishedSteps(
        seconds=math.fsum(found[i][0] for i in wanted),
        rank_seconds=math.fsum(found[i][0] * found[i][1] for i in wanted),
        starts=starts,
        losses=losses,
    )
