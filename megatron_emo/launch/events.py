"""A run's event log: one file of JSON Lines per rank, appended over restarts.

Every record has `time` (UTC, ISO 8601 with milliseconds), `monotonic` (seconds of this host's
monotonic clock), `rank`, `kind`, `iteration` (iterations finished so far) and the fields of its
kind in `FIELDS`. Numbers that JSON has no word for are the strings "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_emo.launch.redaction import secret_values, strike_out

_INT_LIMIT = 1 << 63
_NUMBER = (int, float, str)  # a str is a number that is not finite
_OPTIONAL_NUMBER = (*_NUMBER, type(None))
_OPTIONAL_STR = (str, type(None))

FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "start": {
        "world_size": (int,),
        "train_iters": (int, type(None)),
        "host": (str,),
        "pid": (int,),
        "restart": (int,),  # torchrun's count within one launch
        "objective": (str,),
        "cost_embedding": _OPTIONAL_STR,
        "save": _OPTIONAL_STR,
        "command": (list,),
        "environment": (dict,),
        "versions": (dict,),
        "layout": (dict,),
    },
    # Of the rank that has the losses; the other ranks write heartbeats instead.
    "step": {
        "train_iters": (int,),
        "losses": (dict,),  # name: mean since the last record, as Megatron logs it
        "learning_rate": _OPTIONAL_NUMBER,
        "grad_norm": _OPTIONAL_NUMBER,
        "loss_scale": _OPTIONAL_NUMBER,
        "step_ms": _NUMBER,
        "work_ms": _OPTIONAL_NUMBER,
        "tokens_per_s": _NUMBER,
        "consumed_samples": (int,),
        "skipped": (int,),
        "nan": (int,),
    },
    # work_ms: from a step's start to the reduction of its gradients, mean over steps.
    "heartbeat": {
        "train_iters": (int,),
        "step_ms": _NUMBER,
        "work_ms": _OPTIONAL_NUMBER,
    },
    # --emo-time-loss: output layer with its loss over a step's microbatches; None on other stages.
    "loss_time": {
        "forward_ms": _OPTIONAL_NUMBER,
        "backward_ms": _OPTIONAL_NUMBER,
        "num_microbatches": (int,),
        "peak_bytes": (int,),
        "device": (str,),
    },
    "eval": {
        "data": (str,),  # validation, test
        "losses": (dict,),
        "num_steps": (int,),
        "complete": (bool,),
        "seconds": _NUMBER,
    },
    "save_begin": {"path": (str,)},
    # bytes on rank 0 alone, and not of an asynchronous save, which has only begun here.
    "save_end": {
        "path": (str,),
        "seconds": _NUMBER,
        "bytes": (int, type(None)),
        "asynchronous": (bool,),
    },
    "load": {"path": (str,), "seconds": _NUMBER},
    "signal": {"signal": (str,), "action": (str,)},
    "fault": {"error": (str,), "message": (str,), "traceback": (str,), "exit_code": (int,)},
    "end": {"exit_code": (int,)},
}
_COMMON: dict[str, tuple[type, ...]] = {
    "time": (str,),
    "monotonic": _NUMBER,
    "rank": (int,),
    "kind": (str,),
    "iteration": (int,),
}


def event_file(folder: str | os.PathLike, rank: int) -> Path:
    """Return the file of `rank` in a folder of event logs."""
    return Path(folder, f"rank_{rank:05d}.jsonl")


class EventLog:
    """The open log of this rank.

    A record is one write to a file opened for appending, so that threads do not mix their lines
    and a killed process leaves at most its last line torn. What cannot be written (a full disk, a
    folder without rights) is told once on stderr, and the run goes on.
    """

    def __init__(self, folder: str | os.PathLike, rank: int) -> None:
        self.path = event_file(folder, rank)
        self.rank = rank
        self._secrets = secret_values()
        self._is_torn = False
        self._has_warned = False
        self._file: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o644)
            size = os.fstat(self._file).st_size
            self._is_torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        except OSError as error:
            self._warn(error)

    def write(self, kind: str, iteration: int, **fields: Any) -> None:
        """Append one record.

        Raises:
            ValueError: a kind or field that `FIELDS` does not have, a missing one, or another type.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {
            "time": now,
            "monotonic": round(time.monotonic(), 6),
            "rank": self.rank,
            "kind": kind,
            "iteration": iteration,
            **fields,
        }
        record = _plain(record, self._secrets)
        problem = _problem(record)
        left_over = fields.keys() - FIELDS.get(kind, {}).keys()
        if problem or left_over:
            raise ValueError(f"event {kind}: {problem or f'unknown fields {sorted(left_over)}'}")
        if self._file is not None:
            self._append(json.dumps(record, allow_nan=False))

    def _append(self, text: str) -> None:
        line = text.encode() + b"\n"
        if self._is_torn:
            line = b"\n" + line
        try:
            written = os.write(self._file, line)
        except OSError as error:
            self._warn(error)
            return
        self._is_torn = written < len(line)
        if self._is_torn:
            self._warn(OSError("no space for the whole line"))

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = error.strerror or error
            print(
                f"warning: event log {self.path}: {reason}; the run goes on, its log has gaps",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Close the file; further records are dropped."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)


def _plain(value: Any, secrets: Sequence[str]) -> Any:
    """Return value without secrets, and with numbers that are not finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return strike_out(value, secrets)
    if isinstance(value, dict):
        return {key: _plain(part, secrets) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, secrets) for part in value]
    return value


def _problem(record: dict[str, Any]) -> str:
    """Return what keeps a record from being one of its kind, "" if nothing does."""
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"unknown kind {kind!r}, expected one of {', '.join(FIELDS)}"
    for name, types in (_COMMON | FIELDS[kind]).items():
        if name not in record:
            return f"{name} is missing"
        value = record[name]
        # bool is an int to isinstance, and a number to nobody else.
        is_right = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        if isinstance(value, int) and abs(value) >= _INT_LIMIT:
            return f"{name} is {value}, expected 63 bits"
        if not is_right:
            expected = " or ".join(kind.__name__ for kind in types)
            return f"{name} is {type(value).__name__}, expected {expected}"
    return ""


def read_events(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the records of one rank's file in order.

    A torn line, one that is no record, and kinds of a newer version are passed over.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        yield from _records(file)


def read_last_events(path: str | os.PathLike, num_bytes: int = 1 << 15) -> list[dict[str, Any]]:
    """Return the records that lie wholly in the last `num_bytes` of a rank's file.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - num_bytes)
        # From the byte before: the first line is whole only if that one ends a line.
        file.seek(max(0, start - 1))
        if start:
            file.readline(num_bytes)
        return list(_records(file.read(num_bytes).splitlines()))


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and not _problem(record):
                time_of(record).timestamp()
                yield record
        except (ValueError, RecursionError, OverflowError):
            continue


def time_of(record: dict[str, Any]) -> datetime:
    """Return a record's time.

    Raises:
        ValueError: it is no ISO time with a zone.
    """
    moment = datetime.fromisoformat(record["time"])
    if moment.tzinfo is None:
        raise ValueError(f"time {record['time']}: expected a time zone")
    return moment
