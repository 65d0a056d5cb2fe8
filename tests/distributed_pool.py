"""Long-lived gloo ranks for tests: a further test costs milliseconds, not a fresh import of torch
per rank.

Workers rendezvous through a file, take (module-level function, plain keyword arguments) from a
queue and answer with None or a traceback. A failure or a timeout ends all workers; the next call
starts fresh ones.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TASK_TIMEOUT_S = 300.0


class DistributedPool:
    """`world_size` processes in one gloo group, started at the first `run`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[multiprocessing.Process] = []

    def run(
        self, fn: Callable[..., None], timeout_s: float = TASK_TIMEOUT_S, **kwargs: Any
    ) -> None:
        """Call fn(**kwargs) on every rank; raise AssertionError with the first failing rank's
        traceback.

        fn must lie at module level of a test module; it is imported by path in the workers.
        """
        if not self._workers:
            self._start()
        path = sys.modules[fn.__module__].__file__
        for tasks in self._tasks:
            tasks.put((path, fn.__name__, kwargs))
        for _ in range(self.world_size):
            rank, failure = self._next_answer(timeout_s)
            if failure is not None:
                logs = "".join(self._log_tail(rank) for rank in range(self.world_size))
                self.close()
                raise AssertionError(f"[rank {rank}] {failure}\n{logs}")

    def _next_answer(self, timeout_s: float) -> tuple[int | str, str | None]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                return self._answers.get(timeout=1.0)
            except queue.Empty:
                for rank, worker in enumerate(self._workers):
                    if worker.exitcode is not None:
                        return rank, f"ended with exit code {worker.exitcode}"
        return "?", f"no answer within {timeout_s:.0f} s"

    def _log_tail(self, rank: int, lines: int = 15) -> str:
        log = Path(self._directory.name, f"rank_{rank}.log")
        tail = (
            log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else ["(no log)"]
        )
        return "\n".join([f"--- output of rank {rank}", *tail, ""])

    def num_threads(self) -> int:
        """Return the most threads of a worker, 0 where the system does not say."""
        folders = [Path(f"/proc/{worker.pid}/task") for worker in self._workers]
        return max((len(list(x.iterdir())) for x in folders if x.is_dir()), default=0)

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        if self._workers:
            self._answers.close()
            self._directory.cleanup()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="pool_")
        self._tasks = [context.SimpleQueue() for _ in range(self.world_size)]
        self._answers = context.Queue()
        for rank in range(self.world_size):
            worker = context.Process(
                target=_work,
                args=(
                    rank,
                    self.world_size,
                    self._directory.name,
                    self._tasks[rank],
                    self._answers,
                ),
                daemon=False,  # a checkpoint save starts children of its own
            )
            worker.start()
            self._workers.append(worker)


def pool_of(pools: dict[int, DistributedPool], world_size: int) -> DistributedPool:
    """Return the pool of that size, a new one if there is none yet."""
    if world_size not in pools:
        pools[world_size] = DistributedPool(world_size)
    return pools[world_size]


def _work(rank: int, world_size: int, directory: str, tasks: Any, answers: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    sys.path[:0] = [str(ROOT)]
    with open(os.path.join(directory, f"rank_{rank}.log"), "w") as log:
        # Ranks print into files: pytest's capture does not reach them.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(directory, "store"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        while True:
            path, name, kwargs = tasks.get()
            try:
                torch.manual_seed(0)
                getattr(_import_by_path(path), name)(**kwargs)
                answers.put((rank, None))
            except BaseException:
                answers.put((rank, traceback.format_exc()))


def _import_by_path(path: str) -> Any:
    name = f"distributed_{Path(path).parent.name}_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
