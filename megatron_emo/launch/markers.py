"""FINISHED, PREEMPTED and FAILED: what a run left behind, for scripts that start it again.

    python -m megatron_emo.launch.markers DIR [--since SECONDS]

prints one line and ends with 0 where the run in DIR finished, 75 where it was preempted (start it
again), 1 where it failed, and 3 where it says nothing: never started, still running, or killed
without a word. torchrun itself ends with 1 whatever its workers' codes were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
import time
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

from megatron_emo.launch.redaction import secret_values, strike_out


class State(StrEnum):
    """How a run ended, and the name of its marker file."""

    FINISHED = "FINISHED"
    PREEMPTED = "PREEMPTED"
    FAILED = "FAILED"


NO_MARKER_CODE = 3
_YEAR_5000 = 9.6e10
_COMMAND_CODES = {State.FINISHED: 0, State.PREEMPTED: 75, State.FAILED: 1}


@dataclass(frozen=True)
class Marker:
    """The content of a marker file, beside its name."""

    state: State
    exit_code: int
    time: float
    """Seconds since 1970, of the writer's clock."""
    rank: int
    iteration: int | None
    """Of the last checkpoint for PREEMPTED (None: nothing was saved), else iterations finished."""
    message: str
    signal: str | None = None
    """What preempted it, SIGTERM for one."""


def write_marker(folder: str | os.PathLike, marker: Marker, since: float = 0.0) -> bool:
    """Write a marker whole or not at all; the first one since a start stays.

    Args:
        folder: the --save folder.
        since: seconds since 1970; markers written before belong to an earlier start and go.

    Returns:
        False where another marker of this start is there already, and was left.

    Raises:
        OSError: the folder cannot be written to.
    """
    remove_markers(folder, before=since)
    if read_marker(folder) is not None:
        return False
    path = Path(folder, marker.state)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            content = asdict(marker) | {"message": strike_out(marker.message, secret_values())}
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def remove_markers(folder: str | os.PathLike, before: float = float("inf")) -> None:
    """Remove the markers written before that time (seconds since 1970), and unreadable ones.

    Raises:
        OSError: a file cannot be removed.
    """
    for state in State:
        path = Path(folder, state)
        if path.exists():
            marker = _read(path)
            if marker is None or marker.time < before:
                path.unlink(missing_ok=True)


def read_marker(folder: str | os.PathLike) -> Marker | None:
    """Return the newest marker of a --save folder, None where there is none that can be read."""
    found = [_read(Path(folder, state)) for state in State]
    return max(filter(None, found), key=lambda marker: marker.time, default=None)


def _read(path: Path) -> Marker | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Marker)}
        content = {key: value for key, value in content.items() if key in known}
        marker = Marker(**content | {"state": State(path.name)})
        is_sound = (
            isinstance(marker.time, float)
            and 0 <= marker.time < _YEAR_5000
            and all(isinstance(number, int) for number in (marker.exit_code, marker.rank))
            and isinstance(marker.iteration, int | None)
            and isinstance(marker.message, str)
            and isinstance(marker.signal, str | None)
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return marker if is_sound else None


def main(argv: list[str] | None = None) -> int:
    """Print the state of a run and return its code, as the module says."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_emo.launch.markers",
        description="State of a run, for requeue logic. Exit code: 0 finished, 75 preempted, "
        "1 failed, 3 no marker.",
    )
    parser.add_argument("dir", metavar="DIR", help="the run's --save folder")
    parser.add_argument(
        "--since",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="pass over markers older than this, in seconds since 1970 (date +%%s before the "
        "launch): they are of an earlier start. Default: 0.",
    )
    args = parser.parse_args(argv)
    marker = read_marker(args.dir)
    if marker is None or marker.time < args.since:
        print(f"no marker in {args.dir}")
        return NO_MARKER_CODE
    at = "" if marker.iteration is None else f" iteration {marker.iteration}"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(marker.time))
    message = " ".join(marker.message.split())
    print(f"{marker.state}{at} code {marker.exit_code} {when} {message}".rstrip())
    return _COMMAND_CODES[marker.state]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
