"""Run commands that make files from files: each once, in order, several at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_emo.study.stamps import Stamp, clear_stamp, find_change, read_stamp, write_stamp

__all__ = ["Task", "TaskError", "format_status", "order_tasks", "run_tasks"]


class TaskError(RuntimeError):
    """A task that failed; the message names its exit code and its log."""


@dataclass(frozen=True, eq=False)
class Task:
    """A command and the files it makes."""

    name: str
    """Unique; also the name of its log and stamp. May hold slashes."""
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    """Files or folders that exist once the command has ended well."""
    inputs: tuple[Path, ...] = ()
    """Files or folders it reads. The task runs again when one has changed."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of this process."""
    title: str = ""
    """For people; the name where empty."""
    seconds: float | None = None
    """What it is expected to take, for the time left that is printed; None: as the others did."""
    resumes: tuple[Path, ...] = ()
    """Files or folders from which the command goes on where it was ended. Removed before a run with
    another command, environment or inputs than those that began them."""

    def __post_init__(self) -> None:
        if not self.name or not self.command or not self.outputs:
            raise ValueError(f"task {self.name!r}: expected a name, a command and outputs")
        if self.name.startswith("/") or ".." in Path(self.name).parts:
            raise ValueError(f"task {self.name!r}: expected a relative name without ..")


def run_tasks(
    tasks: Sequence[Task],
    log_dir: str | os.PathLike,
    jobs: int = 1,
    keep_going: bool = False,
    dry_run: bool = False,
) -> None:
    """Run the tasks whose files are not up to date, at most `jobs` at a time.

    A task follows those that make its inputs. It is skipped where log_dir/NAME.json says that the
    same command made its outputs from the same inputs (their content); otherwise it runs, with
    its output in log_dir/NAME.log. When one fails its last lines are printed and the others are
    ended, or, with `keep_going`, all that does not build on it is run. Ctrl-C and SIGTERM end the
    tasks' process groups.

    Args:
        dry_run: print `format_status` and run nothing.

    Raises:
        ValueError: tasks that no order satisfies, or another runner at work in `log_dir`.
        TaskError: a task failed.
    """
    from megatron_emo.study.processes import Runner

    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    if dry_run:
        print(format_status(tasks, log_dir))
        return
    Runner(order_tasks(tasks), Path(log_dir), jobs, keep_going).run()


def order_tasks(tasks: Sequence[Task]) -> dict[Task, frozenset[str]]:
    """Return {task: names of the tasks it builds on}, in an order in which they can run.

    Among tasks that could run next, the one given first comes first.

    Raises:
        ValueError: one name or one output twice, a cycle, or an input that no task makes and that
            does not exist.
    """
    makers: dict[str, str] = {}
    names: set[str] = set()
    for task in tasks:
        if task.name in names:
            raise ValueError(f"task {task.name}: expected different names, found two")
        names.add(task.name)
        for output in map(_absolute, task.outputs):
            if output in makers:
                raise ValueError(f"{output}: made by two tasks, {makers[output]} and {task.name}")
            makers[output] = task.name
    needs = {task: _find_makers(task, makers) for task in tasks}
    return _sort(needs)


def _absolute(path: Path) -> str:
    return os.path.abspath(path)


def _find_makers(task: Task, makers: Mapping[str, str]) -> frozenset[str]:
    """A file in a folder that a task makes is made by that task."""
    found = set()
    for path in map(_absolute, task.inputs):
        above = [path, *map(str, Path(path).parents)]
        maker = next((makers[name] for name in above if name in makers), None)
        if maker is None and not os.path.exists(path):
            raise ValueError(f"task {task.name}: input {path}: no task makes it, nor does it exist")
        if maker is not None:
            found.add(maker)
    return frozenset(found)


def _sort(needs: Mapping[Task, frozenset[str]]) -> dict[Task, frozenset[str]]:
    ordered: dict[Task, frozenset[str]] = {}
    placed: set[str] = set()
    waiting = list(needs)
    while waiting:
        task = next((task for task in waiting if needs[task] <= placed), None)
        if task is None:
            raise ValueError(f"tasks build on each other in a circle: {_find_cycle(needs, placed)}")
        waiting.remove(task)
        ordered[task] = needs[task]
        placed.add(task.name)
    return ordered


def _find_cycle(needs: Mapping[Task, frozenset[str]], placed: set[str]) -> str:
    before = {task.name: sorted(names - placed) for task, names in needs.items()}
    path = [next(name for name, names in before.items() if names and name not in placed)]
    while path[-1] not in path[:-1]:
        path.append(before[path[-1]][0])
    return " <- ".join(path[path.index(path[-1]) :])


def make_stamp(task: Task) -> Stamp:
    """Return what this task would be stamped with now."""
    return Stamp.take(task.command, task.env, task.inputs)


def why_run(task: Task, log_dir: Path) -> str:
    """Return why the task has to run, or "" where its files are up to date."""
    stamp = read_stamp(log_dir, task.name)
    if stamp is None:
        return "not run yet"
    missing = next((path for path in task.outputs if not path.exists()), None)
    if missing is not None:
        return f"{missing.name} is missing"
    return find_change(stamp, make_stamp(task))


def open_task(task: Task, log_dir: Path) -> tuple[Stamp, Path]:
    """Make ready for a run, and return its stamp and its log's path.

    The stamp of an earlier run is forgotten, and what it left half made is removed where it was
    made otherwise.
    """
    clear_stamp(log_dir, task.name)
    log = log_dir / f"{task.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    stamp, begun = make_stamp(task), f"{task.name}.begun"
    earlier = read_stamp(log_dir, begun)
    if earlier is None or find_change(earlier, stamp):
        for path in task.resumes:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_stamp(log_dir, begun, stamp)
    for path in task.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    return stamp, log


def close_task(task: Task, log_dir: Path, before: Stamp, seconds: float) -> None:
    """Stamp a task that ended well with the inputs that it began with.

    Raises:
        TaskError: an output is missing.
    """
    missing = [str(path) for path in task.outputs if not path.exists()]
    if missing:
        raise TaskError(f"ended with 0 without making {', '.join(missing)}")
    write_stamp(log_dir, task.name, replace(before, seconds=seconds))


def format_status(tasks: Sequence[Task], log_dir: str | os.PathLike) -> str:
    """Return a table of all tasks in their order: name, state or why it is to run, title.

    Raises:
        ValueError: as `order_tasks`.
    """
    log_dir, rows, to_run = Path(log_dir), [], set()
    for task, needed in order_tasks(tasks).items():
        upstream = sorted(needed & to_run)
        why = f"after {upstream[0]}" if upstream else why_run(task, log_dir)
        if why:
            to_run.add(task.name)
            state = f"to run: {why}"
        else:
            state = f"done in {format_seconds(read_stamp(log_dir, task.name).seconds)}"
        rows.append((task.name, state, task.title))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines = [f"{name:<{widths[0]}}  {state:<{widths[1]}}  {title}" for name, state, title in rows]
    done = len(rows) - len(to_run)
    return "\n".join([*map(str.rstrip, lines), f"{done} of {len(rows)} tasks are done"])


def format_seconds(seconds: float) -> str:
    """Return 34 s, 12 min, or 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
