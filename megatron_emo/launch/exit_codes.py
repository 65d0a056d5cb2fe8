"""What a run's exit code says, the errors that carry one, and the end of a process with it.

| code | what | start again? |
|---|---|---|
| 0 | done | no |
| 16, 17 | Megatron's result validation: to be told apart by a second run; told | 16: yes |
| 65 | loss or gradient norm not finite; nothing was saved | no |
| 70 | an error nobody foresaw, or a lost peer; the traceback is in the log | perhaps |
| 74 | a file, a checkpoint or the disk | once that is mended |
| 75 | stopped by a signal, and saved | yes |
| 78 | flags, versions, environment or input files that do not fit | no |

torchrun ends with 1 whatever a worker's code was: what schedulers act on is the marker file
(`markers.py`), not the code alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    """As in sysexits.h where it has the case."""

    DONE = 0
    NON_FINITE = 65
    """Loss or gradient norm is not finite; nothing was saved."""
    INTERNAL = 70
    """An error nobody foresaw; the traceback is in the log."""
    IO = 74
    """A file, a checkpoint or the disk."""
    PREEMPTED = 75
    """Stopped by a signal, saved: start it again."""
    CONFIG = 78
    """Flags, versions or files that do not fit; another start would end the same way."""


class RunError(Exception):
    """Ends a run with a message of its own and no traceback."""

    exit_code = ExitCode.INTERNAL
    is_on_all_ranks = False
    """Whether every rank raises it with the same words: then rank 0 prints it, for all."""


class ConfigError(RunError, ValueError):
    """Flags, environment or input files do not fit together."""

    exit_code = ExitCode.CONFIG


class VerdictError(ConfigError):
    """Some rank found a problem; every rank raises it with all that were found."""


class CheckpointError(RunError, ValueError):
    """A checkpoint is missing, torn, altered or of another model."""

    exit_code = ExitCode.IO


class DiskError(RunError, OSError):
    """No room, or no leave to write."""

    exit_code = ExitCode.IO


class NonFiniteError(RunError):
    """Loss or gradient norm is not finite."""

    exit_code = ExitCode.NON_FINITE


class Preempted(RunError):
    """A signal came, and the run saved."""

    exit_code = ExitCode.PREEMPTED


def exit_code_of(error: BaseException) -> int:
    """Return the code with which `error` ends a run.

    Errors of ours carry theirs; OSError, and torch's CheckpointException (a BaseException), are
    files, lost connections are not. sys.exit(code) keeps its code; without one, or with a message,
    it is an error.
    """
    if isinstance(error, RunError):
        return int(error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(ExitCode.INTERNAL)
    if isinstance(error, KeyboardInterrupt):
        return 130  # what a shell says of SIGINT
    is_file = isinstance(error, OSError) or type(error).__name__ == "CheckpointException"
    if is_file and not isinstance(error, (ConnectionError, TimeoutError)):
        return int(ExitCode.IO)
    return int(ExitCode.INTERNAL)


def run_and_exit(
    main: Callable[[], None],
    on_fault: Callable[[BaseException], None] = lambda error: None,
    on_end: Callable[[int], None] = lambda code: None,
    find_lost: Callable[[], str] = lambda: "",
) -> NoReturn:
    """Call `main` and end this process with the code its outcome has.

    A RunError is one line on stderr, `error: ...`, from rank 0 where all ranks raise it, else from
    the rank that found it; any other error is a traceback from every rank that has one. torchrun
    reads both from the file it names in TORCHELASTIC_ERROR_FILE, and ends with the first of them.

    Args:
        on_fault: called with an error that ends the run, Preempted included.
        on_end: called with the exit code, always, as the last thing.
        find_lost: says which ranks are gone, where the error is that of a lost peer.
    """
    code = int(ExitCode.DONE)
    try:
        main()
    except BaseException as error:
        code = exit_code_of(error)
        if code:
            when = time.time()
            _quietly(on_fault, error)
            _print(error)
            lost = find_lost() if _is_of_a_lost_peer(error) else ""
            if lost:
                print(f"error: {_rank_prefix()}lost a peer; {lost}", file=sys.stderr, flush=True)
            _tell_torchrun(error, lost, when)
    _quietly(on_end, code)
    _leave(code)


def _quietly(call: Callable, argument: object) -> None:
    """Call it; its own failure must not hide what ended the run."""
    try:
        call(argument)
    except Exception:
        traceback.print_exc()


def _print(error: BaseException) -> None:
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr, flush=True)
    elif not isinstance(error, RunError):
        traceback.print_exception(error)
    elif not error.is_on_all_ranks:
        print(f"error: {_rank_prefix()}{error}", file=sys.stderr, flush=True)
    elif os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)


def _rank_prefix() -> str:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    return f"rank {os.environ.get('RANK', '?')}: "


def _tell_torchrun(error: BaseException, lost: str, when: float) -> None:
    """Write what torch.distributed.elastic's @record would, in fewer words for our own errors.

    torchrun blames the earliest time, in whole seconds, and the lowest rank among equals. A rank
    whose peer has gone notices within that second, so its error is dated after the peer's.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or isinstance(error, KeyboardInterrupt):
        return
    own = isinstance(error, RunError)
    words = f"{type(error).__name__}: {error}"
    shown = str(error) if own else "".join(traceback.format_exception(error)).rstrip()
    if lost:
        words, shown = f"{words}\n{lost}", f"{shown}\n{lost}"
    seconds = int(when) + (2 if _is_of_a_lost_peer(error) else 0)
    extra = {"py_callstack": shown, "timestamp": str(seconds)}
    try:
        with open(path, "w") as file:
            json.dump({"message": {"message": words, "extraInfo": extra}}, file)
    except OSError as failure:
        print(f"cannot write {path}: {failure}", file=sys.stderr)


_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "remote process exited",
    "nccl communicator was aborted",
)


def _is_of_a_lost_peer(error: BaseException) -> bool:
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    is_network = isinstance(error, (ConnectionError, TimeoutError, RuntimeError))
    return is_network and any(words in str(error).lower() for words in _LOST_PEER)


def _leave(code: int) -> NoReturn:
    """Exit; past Python's clean-up where it could hang on, or abort at, groups still alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if code and torch is not None and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
