"""The runs of a shard, trained by processes of their own, several at a time.

A run's lock is held by this process and by torchrun, another one by its ranks, so that nothing can
train beside what a killed runner left. The kernel ends torchrun (SIGTERM, so that the run saves)
with this process, and ranks with torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_emo.launch.exit_codes import ExitCode
from megatron_emo.launch.run_result import ResultError
from megatron_emo.scaling.plans.study_settings import LaunchSettings
from megatron_emo.scaling.running.run_scripts import REPOSITORY
from megatron_emo.scaling.running.run_states import (
    DONE,
    FAILED_RUN,
    INTERRUPTED,
    RUNNING,
    describe_end,
    find_result,
    read_state,
    steps_done,
    write_state,
)
from megatron_emo.scaling.running.study_files import (
    RANKS_LOCK,
    RUN_LOCK,
    is_locked,
    result_file,
    run_folder,
    take_lock,
)
from megatron_emo.study.processes import Runner, Running
from megatron_emo.study.tasks import Task, TaskError, format_seconds

SAY_EVERY_S = 60.0
LOCK_WAIT_S = 30.0
"""For what an earlier runner left, beyond the time that a run is given to end."""
_LINE = 300
"""Characters of a log's line that are shown."""
NOT_AGAIN = (ExitCode.NON_FINITE, ExitCode.CONFIG)
"""Exit codes after which another start would end the same way."""


class Interrupted(TaskError):
    """A run that a signal stopped, and that goes on from its checkpoint."""


class StudyRunner(Runner):
    """Trains the runs of a manifest that have no result yet.

    Args:
        entries: of the manifest, in their order.
        shard: (i, n), of the lock that keeps a second runner away.
    """

    look_every = 1.0

    def __init__(
        self,
        output: Path,
        entries: Sequence[Mapping[str, Any]],
        launch: LaunchSettings,
        jobs: int,
        keep_going: bool,
        retries: int,
        shard: tuple[int, int],
    ) -> None:
        self.output, self.launch, self.retries = output, launch, retries
        self.entries = {entry["name"]: entry for entry in entries}
        tasks = [_make_task(output, entry) for entry in entries]
        super().__init__(dict.fromkeys(tasks, frozenset()), output, jobs, keep_going)
        self.lock_name = ".shard_{}_of_{}.lock".format(*shard)
        self.grace = launch.shutdown_s + 15.0
        self.locks: dict[str, int] = {}
        self.waits_since: dict[str, float] = {}
        self.tries: dict[str, int] = {}
        self.interrupted: list[str] = []
        self.slots: dict[str, int] = {}
        self.speed = Speed(output, entries)
        self.said_at = time.monotonic()

    def _announce(self) -> None:
        done = [task for task in self.waiting if not self._why_run(task)]
        self.waiting = [task for task in self.waiting if task not in done]
        self.done |= {task.name for task in done}
        left = self._time_left()
        about = f", about {format_seconds(left)}" if left else ""
        print(
            f"{len(self.done)} of {len(self.needs)} runs are done, {len(self.waiting)} to train, "
            f"{self.jobs} at a time{about}",
            flush=True,
        )

    def _why_run(self, task: Task) -> str:
        try:
            find_result(self.output, self.entries[task.name])
        except ResultError as error:
            return str(error)
        folder = run_folder(self.output, task.name)
        state = read_state(folder)
        if state.state != DONE:
            write_state(folder, replace(state, state=DONE))
        return ""

    def _start(self, task: Task) -> bool:
        """Start the task unless it is done, or what an earlier runner left still works on it."""
        folder = run_folder(self.output, task.name)
        lock = take_lock(folder / RUN_LOCK)
        if lock is None or is_locked(folder / RANKS_LOCK):
            if lock is not None:
                os.close(lock)
            self._put_off(task)
            return False
        self.waits_since.pop(task.name, None)
        self.locks[task.name] = lock
        skipped = super()._start(task)
        if skipped:
            self._release(task.name)
        return skipped

    def _put_off(self, task: Task) -> None:
        """Wait for the processes of an earlier runner, and refuse beside a living one."""
        state = read_state(run_folder(self.output, task.name))
        where = f"process {state.pid} on {state.host}"
        if task.name not in self.waits_since:
            print(f"{task.name}: {where} is still at work on it", flush=True)
        since = self.waits_since.setdefault(task.name, time.monotonic())
        alive = state.host == socket.gethostname() and _is_alive(state.runner_pid)
        if alive or time.monotonic() - since > self.grace + LOCK_WAIT_S:
            who = f"another runner, process {state.runner_pid}," if alive else where
            self.failed[task.name] = f"{task.name}: {who} is at work on it"
            print(self.failed[task.name], file=sys.stderr, flush=True)
            return
        self.waiting.append(task)

    def _expects_more(self) -> bool:
        return any(task.name in self.waits_since for task in self.waiting)

    def _open(self, task: Task) -> tuple[None, Path]:
        folder = run_folder(self.output, task.name)
        self.tries[task.name] = self.tries.get(task.name, 0) + 1
        state = read_state(folder)
        write_state(
            folder,
            replace(
                state,
                state=RUNNING,
                attempts=state.attempts + 1,
                exit_code=None,
                host=socket.gethostname(),
                pid=None,
                started=_now(),
                ended=None,
                runner_pid=os.getpid(),
            ),
        )
        return None, folder / "run.log"

    def _launch(self, task: Task, log: Path, **_: Any) -> subprocess.Popen:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"PYTHON": os.environ.get("PYTHON", sys.executable), "PYTHONPATH": ":".join(paths)}
        if self.launch.gpus_per_node:
            env["CUDA_VISIBLE_DEVICES"] = self._devices(task.name)
        locks = (self.locks[task.name],)
        process = super()._launch(task, log, mode="ab", env=env, locks=locks)
        folder = run_folder(self.output, task.name)
        write_state(folder, replace(read_state(folder), pid=process.pid))
        return process

    def _devices(self, name: str) -> str:
        """Return the GPUs of a run that has a place of its own among `jobs`."""
        taken = {self.slots[other] for other in self.running if other in self.slots}
        slot = self.slots[name] = next(i for i in range(self.jobs) if i not in taken)
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        known = given.split(",") if given else list(map(str, range(self.launch.gpus_per_node)))
        count = self.launch.ranks_per_node
        return ",".join(known[slot * count : (slot + 1) * count])

    def _close(self, running: Running, code: int, seconds: float) -> None:
        """The result decides, whatever the exit code was."""
        name = running.task.name
        try:
            find_result(self.output, self.entries[name])
        except ResultError as error:
            if code == ExitCode.PREEMPTED:
                self._note_end(name, INTERRUPTED, code)
                at = steps_done(run_folder(self.output, name))
                raise Interrupted(f"stopped by a signal at step {at}") from None
            self._note_end(name, FAILED_RUN, code)
            why = f"; {error}" if result_file(run_folder(self.output, name)).exists() else ""
            raise TaskError(f"ended with {_code_in_words(code)} without its result{why}") from None
        self._note_end(name, DONE, code)
        self.speed.add(name, seconds)

    def _note_end(self, name: str, state: str, code: int | None) -> None:
        folder = run_folder(self.output, name)
        noted = replace(read_state(folder), state=state, exit_code=code, ended=_now())
        write_state(folder, noted)
        self._release(name)

    def _release(self, name: str) -> None:
        lock = self.locks.pop(name, None)
        if lock is not None:
            os.close(lock)

    def _fail(self, running: Running, error: TaskError) -> None:
        name, code = running.task.name, running.process.returncode
        if isinstance(error, Interrupted):
            self.interrupted.append(name)
            self._say(running.task, f"{error}; --resume goes on")
            return
        tried = self.tries[name]
        folder = run_folder(self.output, name)
        words = "; ".join(filter(None, (str(error), describe_end(folder), _last_line(running.log))))
        if tried <= self.retries and code not in NOT_AGAIN:
            print(f"{name}: {words}; try {tried + 1} of {self.retries + 1}", file=sys.stderr)
            self.waiting.append(running.task)
            return
        super()._fail(running, TaskError(words))

    def _end_running(self) -> None:
        super()._end_running()
        for name in self.running:
            self._note_stop(name)
        for name in list(self.locks):
            self._release(name)

    def _note_stop(self, name: str) -> None:
        """Of a run that this runner ended."""
        code = self.running[name].process.returncode
        state = INTERRUPTED
        with contextlib.suppress(ResultError):
            find_result(self.output, self.entries[name])
            state = DONE
        self._note_end(name, state, code)

    def _report(self) -> None:
        super()._report()
        if self.interrupted:
            names = ", ".join(self.interrupted)
            print(f"stopped by a signal: {names}; --resume goes on", file=sys.stderr, flush=True)
            raise SystemExit(int(ExitCode.PREEMPTED))

    def _time_left(self) -> float | None:
        done = {name: steps_done(run_folder(self.output, name)) for name in self.running}
        waiting = [task.name for task in self.waiting]
        return self.speed.time_left(waiting, done, self.jobs)

    def _look(self) -> None:
        if time.monotonic() - self.said_at < SAY_EVERY_S:
            return
        self.said_at = time.monotonic()
        parts = []
        for name in self.running:
            planned = self.entries[name]["config"]["steps"]
            parts.append(f"{name} {steps_done(run_folder(self.output, name))}/{planned}")
        left = self._time_left()
        about = f"; about {format_seconds(left)} left" if left else ""
        count = f"[{len(self.done)}/{len(self.needs)}]"
        print(f"{count} {_now()} {', '.join(parts) or 'waiting'}{about}", flush=True)


class Speed:
    """Seconds a FLOP, from the runs that ended here, or before, or from steps under way."""

    def __init__(self, output: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        self.flops = {entry["name"]: entry["flops"] + entry["loss_flops"] for entry in entries}
        self.steps = {entry["name"]: entry["config"]["steps"] for entry in entries}
        self.seconds = self.work = 0.0
        self.past_seconds = self.past_work = 0.0
        for entry in entries:
            with contextlib.suppress(ResultError):
                self.past_seconds += find_result(output, entry).seconds
                self.past_work += self.flops[entry["name"]]

    def add(self, name: str, seconds: float) -> None:
        """Count a run that has ended."""
        self.seconds += seconds
        self.work += self.flops[name]

    def time_left(
        self, waiting: Sequence[str], running: Mapping[str, int], jobs: int
    ) -> float | None:
        """Return seconds until all is done, None where no run has ended yet.

        Args:
            running: steps done, by name.
        """
        seconds, work = (
            (self.seconds, self.work) if self.work else (self.past_seconds, self.past_work)
        )
        if not work:
            return None
        left = sum(self.flops[name] for name in waiting)
        for name, steps in running.items():
            left += self.flops[name] * max(0.0, 1 - steps / self.steps[name])
        return left * seconds / work / jobs or None


def _make_task(output: Path, entry: Mapping[str, Any]) -> Task:
    folder = run_folder(output, entry["name"]).resolve()
    command = (sys.executable, "-m", "megatron_emo.launch.lifetime", str(os.getpid()))
    return Task(
        entry["name"], (*command, "bash", str(folder / "run.sh")), (folder / "result.json",)
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _is_alive(pid: int | None) -> bool:
    if pid is None or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _code_in_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:_LINE]
    return ""
