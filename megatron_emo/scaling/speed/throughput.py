"""Run a throughput study's cells one after the other, and read what they took.

OUTPUT/
  plan.yaml         a copy of the study's file
  cells/NAME/       recipe.sh, and train/: train.sh's RUN_DIR with the run's event log
  logs/             what each run printed
  throughput.json   all rows; throughput.csv the same as a table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_emo.launch.events import read_events
from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.running.study_files import write_if_changed
from megatron_emo.scaling.speed.throughput_cells import (
    Cell,
    Timing,
    command_of,
    environment_of,
    recipe_text,
)
from megatron_emo.scaling.speed.throughput_file import StudySpec
from megatron_emo.study.tasks import Task, TaskError, run_tasks, why_run

EVENTS = Path("train", "tensorboard", "events")


@dataclass(frozen=True)
class Measured:
    """What one run took."""

    step_s: list[float]
    """Of every timed step."""
    loss_s: list[float]
    """Of output layer and loss in these steps, on the last rank."""
    peak_bytes: int
    """Most over ranks: of the allocator on a GPU, of the process on a CPU."""
    device: str
    """GPU's name, or CPU."""
    versions: dict[str, str]
    started: str
    """UTC, ISO 8601."""


def run_cells(
    cells: list[Cell], spec: StudySpec, timing: Timing, output: Path, plan: Path, resume: bool
) -> tuple[set[str], str]:
    """Run all cells that are not done; return (names of those that are, what failed in words).

    A cell that fails does not end the others.

    Raises:
        PlanError: OUTPUT holds something and is not to be resumed; a checkout without train.sh.
    """
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise PlanError(
            f"--output {output}: expected a new or empty folder, or --resume to go on with it"
        )
    tasks = [_make_task(cell, spec, timing, output) for cell in cells]
    write_if_changed(output / "plan.yaml", plan.read_text(encoding="utf-8"))
    logs, failure = output / "logs", ""
    try:
        run_tasks(tasks, logs, jobs=1, keep_going=True)
    except TaskError as error:
        failure = str(error)
    return {task.name for task in tasks if not why_run(task, logs)}, failure


def _make_task(cell: Cell, spec: StudySpec, timing: Timing, output: Path) -> Task:
    folder = (output / "cells" / cell.name).resolve()
    recipe = folder / "recipe.sh"
    # Written anew only where it differs: it is the task's input.
    write_if_changed(recipe, recipe_text(cell, spec, timing))
    return Task(
        cell.name,
        command_of(cell, spec, recipe),
        outputs=(folder / EVENTS,),
        inputs=(recipe,),
        env=environment_of(cell, spec, folder),
    )


def read_cell(cell: Cell, timing: Timing, output: Path) -> Measured:
    """Return what a finished cell's event log says.

    Raises:
        PlanError: no log, or not every step once; the cell is named.
    """
    folder = output / "cells" / cell.name / EVENTS
    last = folder / f"rank_{cell.layout.gpus - 1:05d}.jsonl"
    try:
        records = _last_start(last)
        others = [
            _last_start(folder / f"rank_{rank:05d}.jsonl") for rank in range(cell.layout.gpus - 1)
        ]
    except OSError as error:
        raise PlanError(f"{cell.name}: no measurement: {error}") from error
    wanted = range(timing.warmup + 1, timing.warmup + timing.steps + 1)
    steps = {r["iteration"]: r["step_ms"] for r in records if r["kind"] == "step"}
    losses = {
        r["iteration"]: r["forward_ms"] + r["backward_ms"]
        for r in records
        if r["kind"] == "loss_time" and r["forward_ms"] is not None
    }
    for what, found in (("steps", steps), ("times of the loss", losses)):
        missing = [i for i in wanted if not _is_positive(found.get(i))]
        if missing:
            raise PlanError(
                f"{cell.name}: expected {what} {wanted[0]} to {wanted[-1]} in {last.name}, "
                f"{len(missing)} are missing, the first {missing[0]}"
            )
    peaks = [r["peak_bytes"] for rank in (records, *others) for r in rank if "peak_bytes" in r]
    return Measured(
        step_s=[steps[i] / 1e3 for i in wanted],
        loss_s=[losses[i] / 1e3 for i in wanted],
        peak_bytes=max(peaks),
        device=next(r["device"] for r in records if r["kind"] == "loss_time"),
        versions=records[0]["versions"],
        started=records[0]["time"],
    )


def _last_start(path: Path) -> list[dict]:
    """The records since the newest start; a run that failed and was begun anew has several."""
    records = list(read_events(path))
    starts = [i for i, record in enumerate(records) if record["kind"] == "start"]
    if not starts:
        raise FileNotFoundError(f"{path.name}: no start in the event log")
    return records[starts[-1] :]


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
