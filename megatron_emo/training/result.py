"""The result that a run leaves at its end, for studies: a record, so that nobody reads its log.

It is written by rank 0 once all is done, the last save included. A run that is started again after
its last save, and before its result was written, has nothing left to train and writes it.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_emo.launch.environment import commit_of, versions
from megatron_emo.launch.events import event_file, read_events
from megatron_emo.launch.exit_codes import ConfigError, ExitCode, NonFiniteError
from megatron_emo.launch.finished_steps import FinishedSteps, count_finished_steps
from megatron_emo.launch.lifetime import end_with_parent
from megatron_emo.launch.run_result import RunResult, write_result
from megatron_emo.launch.verdict import all_or_none, exchange_of_run
from megatron_emo.training.hooks import stand_around
from megatron_emo.training.recording import event_dir

RANKS_LOCK = ".ranks.lock"
"""Beside the result file: every rank holds it, shared, as long as it lives."""
LAUNCHER_PID = "EMO_LAUNCHER_PID"
"""Variable: the process, on this host, without which ranks must not go on."""
LOSS = "lm loss"

_lock: int | None = None
_finished: tuple[argparse.Namespace, int] | None = None
"""The arguments of the run that went through its loop, and the iterations it has behind it."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the result."""
    group = parser.add_argument_group("result")
    group.add_argument(
        "--emo-result-file",
        metavar="FILE",
        default=None,
        help="Where rank 0 writes, once all iterations are done and saved, a JSON of what they "
        "took: seconds and GPU-hours of the steps over all restarts, samples, tokens, last loss. "
        "Needs the event log. Default: none is written.",
    )
    group.add_argument(
        "--emo-result-run",
        metavar=("NAME", "HASH"),
        nargs=2,
        default=["", ""],
        help="Whose result it says it is. Default: nobody's.",
    )
    group.add_argument(
        "--emo-result-vocab-size",
        metavar="N",
        type=int,
        default=None,
        help="Rows of the output layer, padding included, that parameters and FLOPs were counted "
        "with; a tokenizer that comes to another number is refused. Default: any.",
    )
    return parser


def install(args: argparse.Namespace) -> None:
    """Follow the run, before `pretrain()`.

    Every rank takes RANKS_LOCK, and ends with the process that LAUNCHER_PID names.

    Raises:
        ConfigError: no event log to take the seconds from, or another vocabulary than planned.
        OSError: no folder to write to.
    """
    global _finished
    _finished = None
    if args.emo_result_file is None:
        return
    if event_dir(args) is None:
        raise ConfigError(
            "--emo-result-file: expected an event log for the seconds, found none: give --save or "
            "--emo-event-dir a folder"
        )
    wanted = args.emo_result_vocab_size
    if wanted is not None and args.padded_vocab_size != wanted:
        raise ConfigError(
            f"--emo-result-vocab-size: expected {wanted} rows, padding included, found "
            f"{args.padded_vocab_size}, of a tokenizer of {args.emo_vocab_size}: the plan's "
            "model.vocab_size is another"
        )
    _hold_lock(Path(args.emo_result_file).with_name(RANKS_LOCK))
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher and not end_with_parent(signal.SIGKILL, int(launcher)):
        os._exit(ExitCode.INTERNAL)  # nothing has begun
    import megatron.training.training as training_loop

    stand_around(training_loop, "train", _train)
    stand_around(training_loop, "build_pretraining_data_loader", _build_pretraining_data_loader)


def write_at_end(args: argparse.Namespace) -> None:
    """Write the result of a run that has all its iterations behind it; all ranks call it.

    Two exchanges over all ranks.

    Raises:
        VerdictError: on every rank: seconds or loss are in no event log, or no room to write.
        NonFiniteError: the last loss is not finite.
    """
    if args.emo_result_file is None or _finished is None or _finished[0] is not args:
        return
    iteration = _finished[1]
    if iteration < args.train_iters:
        return
    exchange = exchange_of_run()
    steps = all_or_none(lambda: _count(args, iteration), "result", exchange=exchange)
    loss = next((part for part in exchange(steps.losses.get(LOSS)) if part is not None), None)
    if loss is not None and not math.isfinite(float(loss)):
        error = NonFiniteError(f"--emo-result-file: the last {LOSS} is {loss}; nothing is written")
        error.is_on_all_ranks = True
        raise error
    all_or_none(lambda: _write(args, iteration, steps, loss), "result", exchange=exchange)


def _count(args: argparse.Namespace, iteration: int) -> FinishedSteps:
    log = event_file(event_dir(args), args.rank)
    try:
        return count_finished_steps(read_events(log), iteration)
    except ValueError as error:
        raise ConfigError(f"--emo-result-file: {log}: {error}") from error


def _write(
    args: argparse.Namespace, iteration: int, steps: FinishedSteps, loss: float | None
) -> None:
    if args.rank != 0:
        return
    if loss is None:
        raise ConfigError(
            f"--emo-result-file: no rank's event log has iteration {iteration}'s loss"
        )
    name, digest = args.emo_result_run
    result = RunResult(
        name=name,
        hash=digest,
        iteration=iteration,
        samples=int(args.consumed_train_samples),
        tokens=int(args.consumed_train_samples) * args.seq_length,
        seconds=steps.seconds,
        gpu_hours=steps.rank_seconds / 3600,
        starts=steps.starts,
        ranks=args.world_size,
        device=_device(),
        objective=args.objective,
        lm_loss=float(loss),
        versions=versions(),
        commit=commit_of(Path(__file__).resolve().parents[2]),
    )
    write_result(args.emo_result_file, result)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def _hold_lock(path: Path) -> None:
    """Keep the lock until the process ends, from the first run of it on."""
    global _lock
    if _lock is not None:
        os.close(_lock)
    _lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(_lock, fcntl.LOCK_SH)
    except OSError as error:
        print(f"warning: {path}: cannot be locked: {error}", file=sys.stderr, flush=True)


def _run_args() -> argparse.Namespace:
    from megatron.training import get_args

    return get_args()


def _train(upstream: Callable, *args: Any, **kwargs: Any) -> Any:
    global _finished
    result = upstream(*args, **kwargs)
    _finished = (_run_args(), int(result[0]))
    return result


def _build_pretraining_data_loader(
    upstream: Callable, dataset: Any, consumed_samples: int, *args: Any, **kwargs: Any
) -> Any:
    """Megatron refuses a loader with nothing left, which a finished run started again asks for."""
    run = _run_args()
    is_over = run.emo_result_file is not None and run.iteration >= run.train_iters
    if is_over and dataset is not None and consumed_samples >= len(dataset):
        consumed_samples = 0
    return upstream(dataset, consumed_samples, *args, **kwargs)
