"""Where the runs of a study stand: what runners noted, and what the files themselves say."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_emo.launch.events import event_file, read_events, read_last_events
from megatron_emo.launch.finished_steps import count_finished_steps
from megatron_emo.launch.run_result import ResultError, RunResult, read_result
from megatron_emo.launch.status import FAILED, PREEMPTED, read_status
from megatron_emo.scaling.running.study_files import (
    RANKS_LOCK,
    RUN_LOCK,
    checkpoints_of,
    is_locked,
    result_file,
    run_folder,
    to_json,
    write_durably,
)

PLANNED, RUNNING, DONE, FAILED_RUN, INTERRUPTED = "planned running done failed interrupted".split()


@dataclass(frozen=True)
class RunState:
    """What a runner notes of a run; `result.json` alone says whether it is done."""

    state: str = PLANNED
    attempts: int = 0
    """Starts, over all runners."""
    exit_code: int | None = None
    """Of the last start; negative for a signal."""
    host: str | None = None
    pid: int | None = None
    """Of the run's first process."""
    started: str | None = None
    """UTC, of the last start."""
    ended: str | None = None
    runner_pid: int | None = None


def read_state(folder: Path) -> RunState:
    """Return a run's state; planned where none is written."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        known = {field.name for field in fields(RunState)}
        return RunState(**{key: value for key, value in content.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return RunState()


def write_state(folder: Path, state: RunState) -> None:
    """Write a run's state, whole or not at all."""
    write_durably(folder / "state.json", to_json(asdict(state)))


def find_result(output: Path, entry: Mapping[str, Any]) -> RunResult:
    """Return the result of a run of the manifest.

    Raises:
        ResultError: none, or not that of this run's configuration, steps and tokens.
    """
    return read_result(
        result_file(run_folder(output, entry["name"])),
        name=entry["name"],
        hash=entry["hash"],
        iteration=entry["config"]["steps"],
        tokens=entry["tokens"],
    )


def is_begun(folder: Path) -> bool:
    """Return whether training has left anything in a run's folder."""
    return (
        read_state(folder).attempts > 0
        or (folder / "train").exists()
        or result_file(folder).exists()
    )


def is_at_work(folder: Path) -> bool:
    """Return whether a process of a run lives, as far as its locks say."""
    return is_locked(folder / RUN_LOCK) or is_locked(folder / RANKS_LOCK)


def steps_done(folder: Path) -> int:
    """Return the iterations that a run has finished, by the end of its first rank's event log."""
    log = event_file(checkpoints_of(folder) / "events", 0)
    with contextlib.suppress(OSError):
        kinds = ("step", "heartbeat", "load")
        events = [event for event in read_last_events(log) if event["kind"] in kinds]
        return events[-1]["iteration"] if events else 0
    return 0


def describe_end(folder: Path) -> str:
    """Return in words how a run ended, as tools/run_status.py has it.

    "" where it did not say: of one that was killed, the files alone look as if it ran.
    """
    try:
        status = read_status(checkpoints_of(folder))
    except OSError:
        return ""
    if status.state not in (FAILED, PREEMPTED):
        return ""
    words = ", ".join(filter(None, (status.state, status.detail)))
    if status.state == FAILED and status.failure is not None:
        failure = status.failure
        first = (failure.message.strip().splitlines() or [""])[0]
        words += f", rank {failure.rank} first: {failure.error} {first}".rstrip()
    return words


@dataclass(frozen=True)
class Standing:
    """One run as it stands."""

    name: str
    state: str
    steps: int
    planned_steps: int
    attempts: int
    seconds: float | None
    """Of the finished steps, each once; None where none is known."""
    note: str


def observe(output: Path, entry: Mapping[str, Any]) -> Standing:
    """Return how a run of the manifest stands, by its files rather than by what was noted."""
    name, planned = entry["name"], entry["config"]["steps"]
    folder = run_folder(output, name)
    noted = read_state(folder)
    try:
        result = find_result(output, entry)
        return Standing(name, DONE, planned, planned, noted.attempts, result.seconds, "")
    except ResultError as error:
        note = "" if not result_file(folder).exists() else str(error)
    state = noted.state if noted.state != DONE else INTERRUPTED
    if is_at_work(folder):
        state = RUNNING
    elif state == RUNNING or (state == PLANNED and is_begun(folder)):
        state, note = INTERRUPTED, note or "its runner was killed"
    elif state == FAILED_RUN:
        note = note or describe_end(folder) or f"exit code {noted.exit_code}"
    steps = steps_done(folder)
    return Standing(name, state, steps, planned, noted.attempts, _seconds(folder, steps), note)


def _seconds(folder: Path, steps: int) -> float | None:
    if not steps:
        return None
    log = event_file(checkpoints_of(folder) / "events", 0)
    try:
        return count_finished_steps(read_events(log), steps).seconds
    except (OSError, ValueError):
        return None
