"""The processes of a set of tasks: started, awaited, and ended together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.study.stamps import Stamp
from megatron_emo.study.tasks import (
    Task,
    TaskError,
    close_task,
    format_seconds,
    open_task,
    why_run,
)

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL = 20
"""Lines of a failed task's log that are shown."""


@dataclass
class Running:
    """A started task."""

    task: Task
    process: subprocess.Popen
    log: Path
    stamp: Stamp
    begun: float


class Runner:
    """One run over tasks in order; `needs` is what `order_tasks` returns.

    Whether a task is to run, where its output goes and whether it ended well is said by `_why_run`,
    `_open` and `_close`, of which another kind of task has its own.
    """

    lock_name = ".lock"
    """Of the file in `log_dir` that a runner and all it started hold."""
    grace: float | None = None
    """Seconds between SIGTERM and SIGKILL; None: GRACE."""
    look_every: float | None = None
    """Seconds after which `_look` is called where nothing happens."""

    def __init__(
        self, needs: Mapping[Task, frozenset[str]], log_dir: Path, jobs: int, keep_going: bool
    ) -> None:
        self.needs, self.log_dir, self.jobs, self.keep_going = needs, log_dir, jobs, keep_going
        self.waiting = list(needs)
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.blocked: list[str] = []
        self.running: dict[str, Running] = {}
        self.events: queue.SimpleQueue[str | signal.Signals] = queue.SimpleQueue()
        self.clock = Clock(jobs)

    def run(self) -> None:
        """Run all, as `run_tasks` says."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        lock = self.log_dir / self.lock_name
        with hold_lock(lock) as self.lock, _catch_signals(self.events):
            try:
                self._announce()
                self._loop()
            finally:
                self._end_running()
        self._report()

    def _announce(self) -> None:
        left = self._time_left()
        about = f", about {format_seconds(left)}" if left else ""
        print(f"{len(self.waiting)} tasks, {self.jobs} at a time{about}; logs in {self.log_dir}")

    def _loop(self) -> None:
        while True:
            self._start_ready()
            if not self.running and not self._expects_more():
                return
            try:
                event = self.events.get(timeout=self.look_every)
            except queue.Empty:
                self._look()
                continue
            if isinstance(event, signal.Signals):
                print(f"{event.name}: ending {', '.join(self.running)}", file=sys.stderr)
                raise SystemExit(128 + event)
            self._finish(event)
            if self.failed and not self.keep_going:
                return

    def _start_ready(self) -> None:
        """Start what can be started; a task that is skipped may make the next one ready."""
        progress = True
        while progress:
            progress = False
            for task in list(self.waiting):
                if self.needs[task] & (self.failed.keys() | set(self.blocked)):
                    self.waiting.remove(task)
                    self.blocked.append(task.name)
                    progress = True
                elif self.needs[task] <= self.done and len(self.running) < self.jobs:
                    self.waiting.remove(task)
                    progress |= self._start(task)

    def _start(self, task: Task) -> bool:
        """Start the task and return False, or skip it and return True."""
        if not self._why_run(task):
            self.done.add(task.name)
            self._say(task, "skipped: up to date")
            return True
        stamp, log = self._open(task)
        process = self._launch(task, log)
        self.running[task.name] = Running(task, process, log, stamp, time.monotonic())
        threading.Thread(target=self._wait, args=(task.name, process), daemon=True).start()
        return False

    def _why_run(self, task: Task) -> str:
        return why_run(task, self.log_dir)

    def _open(self, task: Task) -> tuple[Stamp, Path]:
        """Make ready for a run, and return its stamp and its log's path."""
        return open_task(task, self.log_dir)

    def _launch(
        self,
        task: Task,
        log: Path,
        mode: str = "wb",
        env: Mapping[str, str] | None = None,
        locks: tuple[int, ...] | None = None,
    ) -> subprocess.Popen:
        """Start the command, which inherits `locks`, the runner's own by default.

        `env` is added to the task's.
        """
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **task.env, **(env or {})}
        with open(log, mode) as file:
            # In a session of its own it can be ended with all it started. The lock goes with it:
            # while it lives no other run can begin, even where this process was killed.
            return subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=(self.lock,) if locks is None else locks,
            )

    def _wait(self, name: str, process: subprocess.Popen) -> None:
        process.wait()
        self.events.put(name)

    def _finish(self, name: str) -> None:
        running = self.running.pop(name)
        seconds = time.monotonic() - running.begun
        try:
            self._close(running, running.process.returncode, seconds)
        except TaskError as error:
            self._fail(running, error)
            return
        self.done.add(name)
        self.clock.add(running.task, seconds)
        self._say(running.task, f"done in {format_seconds(seconds)}")

    def _close(self, running: Running, code: int, seconds: float) -> None:
        """Judge a task that has ended.

        Raises:
            TaskError: it did not end well.
        """
        if code:
            raise TaskError(f"ended with exit code {code}")
        close_task(running.task, self.log_dir, running.stamp, seconds)

    def _fail(self, running: Running, error: TaskError) -> None:
        name = running.task.name
        self.failed[name] = f"{name}: {error}; log {running.log}"
        print(f"{self.failed[name]}\n{_tail(running.log)}", file=sys.stderr, flush=True)

    def _expects_more(self) -> bool:
        """Whether a task that could not start yet may do so without another's end."""
        return False

    def _look(self) -> None:
        """Do what is to be done from time to time, as to say how far tasks are."""

    def _say(self, task: Task, what: str) -> None:
        left = self._time_left()
        about = f", about {format_seconds(left)} left" if left else ""
        count = f"[{len(self.done)}/{len(self.needs)}]"
        print(f"{count} {task.title or task.name} {what}{about}", flush=True)

    def _time_left(self) -> float | None:
        """Return seconds until all is done, None where nothing is known."""
        tasks = [*self.waiting, *(running.task for running in self.running.values())]
        return self.clock.time_left(tasks, self.log_dir)

    def _end_running(self) -> None:
        """End process groups, first asking; a group outlives its first process."""
        for running in self.running.values():
            _signal_group(running.process, signal.SIGTERM)
        deadline = time.monotonic() + (GRACE if self.grace is None else self.grace)
        for running in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(running.process, signal.SIGKILL)
            running.process.wait()

    def _report(self) -> None:
        if self.failed:
            blocked = f"; not run: {', '.join(self.blocked)}" if self.blocked else ""
            raise TaskError(f"failed: {'; '.join(self.failed.values())}{blocked}")


class Clock:
    """What is left, from what tasks were expected to take and what they took."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.expected = self.taken = 0.0
        self.lengths: list[float] = []

    def add(self, task: Task, seconds: float) -> None:
        """Count a task that has ended."""
        self.lengths.append(seconds)
        if task.seconds:
            self.expected += task.seconds
            self.taken += seconds

    def time_left(self, tasks: list[Task], log_dir: Path) -> float | None:
        """Return seconds until `tasks` are done, or None where nothing is known."""
        ratio = self.taken / self.expected if self.expected else 1.0
        mean = sum(self.lengths) / len(self.lengths) if self.lengths else 0.0
        seconds = 0.0
        for task in tasks:
            if why_run(task, log_dir):
                seconds += task.seconds * ratio if task.seconds else mean
        return seconds / self.jobs or None


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-TAIL:]
    return "\n".join(f"  {line}" for line in lines)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    # Its leader is its first process, so the group's id is that process's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[int]:
    """Hold a lock file, made where there is none, and give its descriptor.

    Raises:
        ValueError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{path.parent}: another run, or a task of one, is at work here ({path.name} "
                "is locked)"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _catch_signals(events: queue.SimpleQueue) -> Iterator[None]:
    """Put Ctrl-C and SIGTERM among the events, to be acted on between two steps.

    Raised where they arrive, they could come between a process's start and its being noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number, frame):
        events.put(signal.Signals(number))

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
