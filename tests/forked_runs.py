"""Short pretraining runs in real processes that can be killed, without an import each.

One process imports Megatron once and then forks the ranks of every run. A run ends as under
torchrun: once a rank has died, the others are given a moment and killed. Ranks meet by a file, so
there are no ports.
"""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_GRACE_S = 3.0


@dataclass(frozen=True)
class Kill:
    """Where a rank is killed with SIGKILL: at its n-th Python call, or a time after an iteration's
    losses were logged, wherever it is then."""

    rank: int
    calls: int | None = None
    iteration: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """How a run ended."""

    codes: list[int]
    """Exit codes by rank; -9 for SIGKILL."""
    seconds: float
    folder: Path
    losses: dict[int, str] = field(default_factory=dict)
    """float.hex() of the logged losses by iteration."""

    def log(self, rank: int = 0) -> str:
        return Path(self.folder, f"rank_{rank}.log").read_text(errors="replace")

    def num_calls(self, rank: int) -> tuple[int, int]:
        """Python calls that the rank had made at its first losses and at its end; of a run that
        counted them and was not killed."""
        return tuple(int(Path(self.folder, f"{at}_{rank}").read_text()) for at in ("first", "last"))


class ForkedRuns:
    """Starts runs one after the other; `close` ends the process that forks them."""

    def __init__(self, folder: Path, preloads: bool = True) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, preloads), daemon=False)
        self._process.start()
        theirs.close()

    def run(
        self,
        argv: list[str],
        world_size: int = 2,
        kill: Kill | None = None,
        counts_calls: bool = False,
        setup: tuple[Path, str] | None = None,
        timeout_s: float = 240.0,
    ) -> Outcome:
        """Run pretrain_gpt_emo's main(argv) on `world_size` ranks to its end.

        Args:
            setup: a file and the function in it that each rank calls first, with its rank.
        """
        folder = self._folder / f"run_{next(self._numbers)}"
        folder.mkdir()
        request = (argv, world_size, str(folder), kill, counts_calls, setup, timeout_s)
        self._pipe.send(request)
        if not self._pipe.poll(timeout_s + 60.0):
            raise AssertionError(f"no answer within {timeout_s + 60:.0f} s")
        codes, seconds = self._pipe.recv()
        return Outcome(codes, seconds, folder, _read_losses(folder))

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def forked_runs(folder: Path) -> Iterator[ForkedRuns]:
    runs = ForkedRuns(folder)
    try:
        yield runs
    finally:
        runs.close()


def _read_losses(folder: Path) -> dict[int, str]:
    path = folder / "losses"
    rows = path.read_text().splitlines() if path.exists() else []
    # The last row of a rank that was killed may be cut short.
    rows = [row.split(" ", 1) for row in rows if row.endswith(".")]
    return {int(iteration): words for iteration, words in rows}


def _serve(pipe: Any, preloads: bool) -> None:
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", WORLD_SIZE="1", RANK="0")
    sys.path[:0] = [str(ROOT)]
    import torch

    torch.set_num_threads(1)
    from megatron_emo.training import cpu

    cpu.enable([])
    import megatron.training  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    if preloads:
        from megatron_emo.training import checkpoint_loads, preflight, steps  # noqa: F401

    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(*request))


def _run(argv, world_size, folder, kill, counts_calls, setup, timeout_s):
    start = time.monotonic()
    ranks = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, world_size, argv, folder, kill, counts_calls, setup)
        ranks[pid] = rank
    codes: dict[int, int] = {}
    died_at = due_at = None
    if kill is not None and kill.calls is not None:
        kill = None  # the rank does it itself
    while ranks:
        now = time.monotonic()
        if kill is not None and due_at is None and kill.iteration in _read_losses(Path(folder)):
            due_at = now + kill.seconds
        if due_at is not None and now > due_at:
            _kill(ranks, kill.rank)
        if now - start > timeout_s or (died_at is not None and now - died_at > _GRACE_S):
            _kill(ranks, *ranks.values())
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            code = os.waitstatus_to_exitcode(status)
            codes[ranks.pop(pid)] = code
            died_at = now if code and died_at is None else died_at
        else:
            time.sleep(0.002)
    return [codes[rank] for rank in range(world_size)], time.monotonic() - start


def _kill(ranks: dict[int, int], *chosen: int) -> None:
    for pid, rank in ranks.items():
        if rank in chosen:
            os.kill(pid, signal.SIGKILL)


def _be_rank(rank, world_size, argv, folder, kill, counts_calls, setup) -> None:
    """Never returns: what the parent has open is not this process's to close."""
    code = 70
    try:
        log = os.open(f"{folder}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
        )
        code = _train(rank, world_size, argv, folder, kill, counts_calls, setup)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _train(rank, world_size, argv, folder, kill, counts_calls, setup) -> int:
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/store", world_size)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    os.chdir(folder)
    from megatron_emo.training import run

    sys.argv[1:] = argv
    count = _Count(kill.calls if kill is not None and kill.rank == rank else None)
    _log_losses(f"{folder}/losses", on_first=lambda: _write(f"{folder}/first_{rank}", count.now))
    if setup is not None:
        _function(*setup)(rank)
    if counts_calls or count.last is not None:
        count.start()
    try:
        run.main()
    except SystemExit as error:
        _write(f"{folder}/last_{rank}", count.now)
        return error.code or 0
    return 0


class _Count:
    """Counts this process's Python calls, and ends it at the last."""

    def __init__(self, last: int | None) -> None:
        self.now, self.last = 0, last

    def start(self) -> None:
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.PROFILER_ID, "count")
        monitoring.register_callback(
            monitoring.PROFILER_ID, monitoring.events.PY_START, self._count
        )
        monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.PY_START)

    def _count(self, code, offset) -> None:
        self.now += 1
        if self.now == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def _write(path: str, number: int) -> None:
    Path(path).write_text(str(number))


def _log_losses(path: str, on_first: Callable[[], None]) -> None:
    """Write every iteration's losses, to the last bit and at once."""
    from megatron.training import training

    upstream = training.training_log
    is_first = True

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named):
        nonlocal is_first
        if is_first:
            on_first()
            is_first = False
        if loss_dict:
            words = [f"{name}={float(value).hex()}" for name, value in sorted(loss_dict.items())]
            row = f"{iteration} {' '.join(words)} .\n".encode()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, row)
            os.close(descriptor)
        return upstream(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)

    training.training_log = training_log


def _function(path: Path, name: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("forked_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
