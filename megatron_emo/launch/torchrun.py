"""torchrun for one node, with a last line that says what happened and an exit code that means it.

    python -u -m megatron_emo.launch.torchrun [torchrun's flags] pretrain_gpt_emo.py [its flags]

torchrun ends with 1 whatever its workers ended with, and also where a signal came and the run
saved. Here the code is 75 where the run says that it was preempted (`markers.py`), else that of the
rank of this node that failed first (`exit_codes.py`, or 128 + n for signal n).

A fault that any rank reports ends this node's ranks too, in `FAULT_GRACE_S`, whatever they wait
for: a lost rank's peers may hang in a collective for as long as its timeout, or at a store that is
gone. Nothing that a rank started outlives this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from megatron_emo.launch.exit_codes import ExitCode
from megatron_emo.launch.markers import Marker, State, read_marker

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

FAULT_GRACE_S = 6.0
"""From seeing the marker FAILED to SIGKILL for the ranks of this node."""

_REAP_S = 2.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    """Run torchrun in this process and return the exit code; prints the last line to stderr.

    Args:
        argv: torchrun's arguments, the script and the script's; by default those of the process.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    argv = list(sys.argv[1:] if argv is None else argv)
    started = time.time()
    try:
        run.main(argv)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        line = f"rank {rank} failed first on this node: {_reason(failure)}"
    except SignalException as error:
        code = 128 + error.sigval
        line = f"stopped by {error.sigval.name}"
    else:
        return 0
    marker = _marker_since(started, argv)
    if marker is not None:
        line += f"; the run: {_sentence(marker)}"
        if marker.state is State.PREEMPTED:
            code = int(ExitCode.PREEMPTED)
    sys.stdout.flush()
    print(f"{socket.gethostname()}: {line}; exit code {code}", file=sys.stderr, flush=True)
    return code


def _reason(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"killed by {signal.Signals(-failure.exitcode).name}"
    message = failure.error_file_data["message"]
    if isinstance(message, dict):
        message = message["message"]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    # What torchrun makes up where a rank left no file says nothing.
    return lines[-1] if lines and os.path.exists(failure.error_file) else "no error file"


def _sentence(marker: Marker) -> str:
    rank = f" rank {marker.rank}:" if marker.state is State.FAILED else ""
    return f"{marker.state}{rank} {' '.join(marker.message.split())}".rstrip()


def _marker_since(started: float, argv: list[str]) -> Marker | None:
    """Return what the run left in its --save folder since `started`, in seconds since 1970."""
    marker = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--save" or word.startswith("--save="):
            marker = read_marker(Path(following if word == "--save" else word[len("--save=") :]))
    return marker if marker is not None and marker.time >= started else None


def _end_ranks_after_a_fault(started: float, argv: list[str]) -> None:
    while True:
        marker = _marker_since(started, argv)
        if marker is not None and marker.state is State.FAILED:
            time.sleep(FAULT_GRACE_S)
            _kill_descendants()
            return
        time.sleep(0.5)


def _adopt_orphans() -> None:
    """Make this process the parent of what its ranks leave behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> list[psutil.Process]:
    """SIGKILL all; the caller may wait for them where torchrun no longer does."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return processes


def main_and_leave() -> NoReturn:
    """`main` as a process of its own, which leaves none behind."""
    _adopt_orphans()
    threading.Thread(
        target=_end_ranks_after_a_fault, args=(time.time(), sys.argv[1:]), daemon=True
    ).start()
    code = main()
    psutil.wait_procs(_kill_descendants(), timeout=_REAP_S)
    sys.stdout.flush()
    # What is left of the agent at this point is threads, some of which wait for other nodes.
    os._exit(code)


if __name__ == "__main__":
    main_and_leave()
