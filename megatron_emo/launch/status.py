"""A run at a glance, from its event logs, markers and checkpoints: reads files alone.

Of each rank's log the end is read, so a thousand ranks take seconds, however long the run.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_emo.launch.events import event_file, read_last_events, time_of
from megatron_emo.launch.markers import Marker, State, read_marker

RUNNING, FINISHED, PREEMPTED, FAILED, SILENT = "running finished preempted failed silent".split()
SILENT_AFTER_S = 120.0
"""At least; ten times what a step takes if that is longer."""

_RANK_FILE = re.compile(r"rank_(\d{5,})\.jsonl")
_LOST_PEER = ("connection closed by peer", "connection reset by peer")
_HEARTBEATS = ("step", "heartbeat")
_LONG_TAIL = 1 << 20
"""Bytes of one log that are searched for what its end does not have, such as the start."""


@dataclass(frozen=True)
class RankStatus:
    """One rank's last words in the newest start."""

    rank: int
    host: str | None
    iteration: int
    kind: str
    """Of its last record."""
    time: str
    age_s: float
    work_ms: float | None
    """Its own work in a step, mean over the records read."""
    exit_code: int | None


@dataclass(frozen=True)
class Failure:
    """The first rank that failed, and how."""

    rank: int
    iteration: int | None
    time: str
    error: str
    message: str


@dataclass(frozen=True)
class RunStatus:
    """What `read_status` found; None is unknown."""

    run_dir: str
    state: str
    detail: str
    iteration: int | None
    """Iterations finished, by the newest heartbeat of any rank."""
    train_iters: int | None
    losses: dict[str, float | str]
    """By name, means over the last log interval."""
    step_ms: float | None
    tokens_per_s: float | None
    eta_s: float | None
    world_size: int | None
    layout: dict[str, int] | None
    objective: str | None
    checkpoint: dict[str, Any] | None
    """iteration, path, named (is it the one the tracker names), problems of newer ones."""
    failure: Failure | None
    wordless: list[int]
    """Ranks that neither failed nor ended, where others did: killed, or stuck."""
    slowest: dict[str, float] | None
    """rank, work_ms and median_ms over ranks; None where no rank measures its work."""
    ranks: list[RankStatus]

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)


def read_status(run_dir: str | os.PathLike, now: datetime | None = None) -> RunStatus:
    """Return the status of the run in a --save folder, a --tensorboard-dir or an event folder.

    Raises:
        FileNotFoundError: there is neither an event log nor a marker.
    """
    now = now or datetime.now(UTC)
    run_dir = Path(run_dir)
    logs = _read_logs(_event_folder(run_dir))
    marker = read_marker(run_dir)
    if not logs and marker is None:
        raise FileNotFoundError(
            f"{run_dir}: expected a run's --save folder or the folder of its event log "
            "(events/rank_00000.jsonl), found neither log nor marker"
        )
    start = _newest_start(logs)
    if start is not None:
        logs = {rank: log for rank, log in logs.items() if rank < start["world_size"]} or logs
        if marker is not None and marker.time < time_of(start).timestamp() - 1:
            marker = None  # of an earlier start; the clocks of two hosts may differ a little
    ranks = [_rank_status(rank, log, now) for rank, log in sorted(logs.items())]
    progress = _last(logs, lambda event: event["kind"] == "step")
    beat = _last(logs, lambda event: event["kind"] in _HEARTBEATS)
    failure, wordless = _failure(logs, ranks, marker)
    state, detail = _state(ranks, marker, failure, beat)
    iteration = None if not ranks else max(rank.iteration for rank in ranks)
    train_iters = (beat or start or {}).get("train_iters")
    step_ms = _finite(beat and beat["step_ms"])
    has_eta = state == RUNNING and None not in (iteration, train_iters, step_ms)
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        detail=detail,
        iteration=iteration if iteration is not None or marker is None else marker.iteration,
        train_iters=train_iters,
        losses=_printable(progress["losses"]) if progress else {},
        step_ms=step_ms,
        tokens_per_s=_finite(progress and progress["tokens_per_s"]),
        eta_s=max(0, train_iters - iteration) * step_ms / 1e3 if has_eta else None,
        world_size=start["world_size"] if start else None,
        layout=start["layout"] if start else None,
        objective=start["objective"] if start else None,
        checkpoint=_last_good_checkpoint(_save_folder(run_dir, start)),
        failure=failure,
        wordless=wordless,
        slowest=_slowest(ranks),
        ranks=ranks,
    )


Log = list[dict[str, Any]]


def _event_folder(run_dir: Path) -> Path:
    below = run_dir / "events"
    return below if below.is_dir() else run_dir


def _read_logs(folder: Path) -> dict[int, Log]:
    """Return rank -> the records of its newest start, or as many of them as its log's end has."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = [int(match[1]) for match in map(_RANK_FILE.fullmatch, names) if match]
    logs = {rank: _since_start(read_last_events(event_file(folder, rank))) for rank in found}
    if logs and not any(log and log[0]["kind"] == "start" for log in logs.values()):
        last = max(logs)
        logs[last] = _since_start(read_last_events(event_file(folder, last), _LONG_TAIL))
    return {rank: log for rank, log in logs.items() if log}


def _since_start(log: Log) -> Log:
    starts = [index for index, event in enumerate(log) if event["kind"] == "start"]
    return log[starts[-1] :] if starts else log


def _newest_start(logs: dict[int, Log]) -> dict[str, Any] | None:
    starts = [event for log in logs.values() for event in log if event["kind"] == "start"]
    return max(starts, key=time_of, default=None)


def _last(logs: dict[int, Log], is_meant: Callable[[dict], bool]) -> dict[str, Any] | None:
    """Return the newest record that is meant, among the last such of every rank."""
    found: list[dict[str, Any]] = []
    for log in logs.values():
        found += next(([event] for event in reversed(log) if is_meant(event)), [])
    return max(found, key=lambda event: (event["iteration"], time_of(event)), default=None)


def _rank_status(rank: int, log: Log, now: datetime) -> RankStatus:
    last = log[-1]
    work = [_finite(event["work_ms"]) for event in log if event["kind"] in _HEARTBEATS]
    work = [value for value in work if value is not None]
    return RankStatus(
        rank=rank,
        host=next((event["host"] for event in log if event["kind"] == "start"), None),
        iteration=last["iteration"],
        kind=last["kind"],
        time=last["time"],
        age_s=(now - time_of(last)).total_seconds(),
        work_ms=statistics.fmean(work) if work else None,
        exit_code=last["exit_code"] if last["kind"] == "end" else None,
    )


def _failure(
    logs: dict[int, Log], ranks: list[RankStatus], marker: Marker | None
) -> tuple[Failure | None, list[int]]:
    """Return the first failure, and the ranks without a last word where others have one.

    The first is the earliest that is not about a peer that went away; where all are, a rank without
    a last word is to blame.
    """
    faults = [event for log in logs.values() for event in log if event["kind"] == "fault"]
    has_ended = {rank.rank for rank in ranks if rank.kind in ("end", "fault")}
    wordless = [rank for rank in ranks if has_ended and rank.rank not in has_ended]
    numbers = [rank.rank for rank in wordless]
    if not faults:
        return _failure_by_marker(marker), numbers
    first = min(faults, key=lambda event: (_is_of_lost_peer(event), time_of(event)))
    if _is_of_lost_peer(first) and wordless:
        gone = min(wordless, key=lambda rank: rank.time)
        message = "no last word: killed, or its host went down"
        return Failure(gone.rank, gone.iteration, gone.time, "gone", message), numbers
    where = (first["rank"], first["iteration"], first["time"])
    return Failure(*where, first["error"], first["message"]), numbers


def _is_of_lost_peer(fault: dict[str, Any]) -> bool:
    return any(words in fault["message"].lower() for words in _LOST_PEER)


def _failure_by_marker(marker: Marker | None) -> Failure | None:
    if marker is None or marker.state is not State.FAILED:
        return None
    when = datetime.fromtimestamp(marker.time, UTC).isoformat(timespec="milliseconds")
    error, _, message = marker.message.partition(": ")
    return Failure(marker.rank, marker.iteration, when, error, message)


def _state(
    ranks: list[RankStatus],
    marker: Marker | None,
    failure: Failure | None,
    beat: dict[str, Any] | None,
) -> tuple[str, str]:
    """Return the state and a detail; the marker knows best, as it is the whole run's."""
    if marker is not None:
        if marker.state is State.FAILED:
            return FAILED, f"code {marker.exit_code}"
        if marker.state is State.PREEMPTED:
            saved = marker.iteration is not None
            return PREEMPTED, f"saved iteration {marker.iteration}" if saved else "nothing saved"
        return FINISHED, ""
    codes = [rank.exit_code for rank in ranks if rank.exit_code is not None]
    if failure is not None or any(code not in (0, 75) for code in codes):
        return FAILED, f"code {max(codes)}" if codes else ""
    if 75 in codes:
        return PREEMPTED, "no marker: see the checkpoints"
    if codes and len(codes) == len(ranks):
        return FINISHED, ""
    newest = min(ranks, key=lambda rank: rank.age_s)
    step_s = (_finite(beat["step_ms"]) or 0.0) / 1e3 if beat else 0.0
    if newest.age_s > max(SILENT_AFTER_S, 10 * step_s):
        during = {"save_begin": ", in a save", "start": ", before its first step"}
        return SILENT, f"since {newest.time}{during.get(newest.kind, '')}"
    return RUNNING, ""


def _slowest(ranks: Iterable[RankStatus]) -> dict[str, float] | None:
    measured = [rank for rank in ranks if rank.work_ms is not None]
    if not measured:
        return None
    slowest = max(measured, key=lambda rank: rank.work_ms)
    median = statistics.median(rank.work_ms for rank in measured)
    return {"rank": slowest.rank, "work_ms": slowest.work_ms, "median_ms": median}


def _save_folder(run_dir: Path, start: dict[str, Any] | None) -> Path:
    """The run's own --save where it can be seen from here: a log can lie elsewhere."""
    save = start["save"] if start else None
    return Path(save) if save and Path(save).is_dir() else run_dir


def _last_good_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint that looks whole by its files' names and sizes."""
    from megatron_emo.checkpoints import RunFolder, folder_of, glance

    try:
        found = RunFolder.read(folder)
    except OSError:
        return None
    newer: list[str] = []
    for iteration in reversed(found.iterations):
        path = folder_of(folder, iteration)
        problems = glance(path).problems
        if not problems:
            return {
                "iteration": iteration,
                "path": str(path),
                "named": found.tracker == iteration,
                "newer": newer,
            }
        newer.append(f"{path.name}: {problems[0]}")
    return None


def _printable(losses: dict[str, Any]) -> dict[str, float | str]:
    return {name: value for name, value in losses.items() if isinstance(value, (float, str))}


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None
