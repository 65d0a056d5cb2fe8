"""The event log of this rank, and the marker a run leaves: what writes them.

Stands around functions of megatron/training/training.py (core 0.19.2), which all ranks call:
training_log, evaluate_and_print_results, evaluate, save_checkpoint, load_checkpoint; train_step
and finalize_model_grads for a rank's own work. Nothing of them is changed.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_emo.launch.events import EventLog, event_file, read_last_events
from megatron_emo.launch.exit_codes import ExitCode, Preempted, exit_code_of
from megatron_emo.launch.markers import Marker, State, read_marker, remove_markers, write_marker
from megatron_emo.launch.redaction import redact_command
from megatron_emo.training.hooks import stand_around

NO_LOG = "none"
_TRACEBACK_LENGTH = 4000
"""Characters, from the end."""
_LAUNCH_VARIABLES = (
    "GROUP_RANK LOCAL_RANK MASTER_ADDR MASTER_PORT SLURM_ARRAY_TASK_ID SLURM_JOB_ID SLURM_NODEID "
    "SLURM_PROCID SLURM_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID"
).split()

_run_start = time.time()
"""Seconds since 1970; markers written before are of an earlier start."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the event log."""
    group = parser.add_argument_group("event log")
    group.add_argument(
        "--emo-event-dir",
        metavar="DIR|none",
        default=None,
        help="Folder of the event log, a file rank_00000.jsonl per rank, appended over restarts; "
        "tools/run_status.py reads it. none: no log. Default: events/ in the --save folder, else "
        "in --tensorboard-dir, else none.",
    )
    return parser


def event_dir(args: argparse.Namespace) -> Path | None:
    """Return the folder of the event log, None where there is none."""
    if args.emo_event_dir is not None:
        return None if args.emo_event_dir == NO_LOG else Path(args.emo_event_dir)
    for folder in (args.save, args.tensorboard_dir):
        if folder and "://" not in folder:
            return Path(folder, "events")
    return None


class _Recorder:
    """This run's log, and what has to be remembered between records."""

    def __init__(
        self, args: argparse.Namespace, log: EventLog | None, is_installed: bool = True
    ) -> None:
        self.args, self.log, self.is_installed = args, log, is_installed
        self.iteration = 0
        """Iterations finished."""
        self.work = _WorkClock()
        self.samples_before = 0
        """Consumed when the interval began that the next record is about."""
        self.eval_prefix = ""

    def write(self, kind: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.write(kind, self.iteration, **fields)


_recorder: _Recorder | None = None
_ended: argparse.Namespace | None = None
"""The arguments of the run whose log was closed last."""


def install(args: argparse.Namespace) -> None:
    """Open the log and follow the run, before `pretrain()`; markers of earlier starts go."""
    import megatron.training.training as training_loop

    global _recorder
    _close()
    folder = event_dir(args)
    _recorder = _Recorder(args, None if folder is None else EventLog(folder, args.rank))
    if args.rank == 0 and (folder := marker_folder(args)) is not None:
        _tolerate(remove_markers, folder, before=_run_start)
    _recorder.write("start", **_start_fields(args))
    stand_around(training_loop, "training_log", _training_log)
    stand_around(training_loop, "train_step", _train_step)
    stand_around(training_loop, "finalize_model_grads", _finalize_model_grads)
    stand_around(training_loop, "evaluate_and_print_results", _evaluate_and_print_results)
    stand_around(training_loop, "evaluate", _evaluate)
    stand_around(training_loop, "save_checkpoint", _save_checkpoint)
    stand_around(training_loop, "load_checkpoint", _load_checkpoint)


def record(kind: str, **fields: Any) -> None:
    """Write one record of `megatron_emo.launch.events.FIELDS`; nothing where no log is open."""
    if _recorder is not None:
        _recorder.write(kind, **fields)


def fault(error: BaseException) -> None:
    """Record the error that ends this rank; the first rank of a run leaves the marker FAILED.

    Also before `install`, once the arguments are parsed: a preflight that fails must not leave the
    marker of the start before. Folders are not made for that. A run that a signal stopped did not
    fail.
    """
    recorder = _recorder_of_this_run()
    if recorder is None or isinstance(error, Preempted):
        return
    code = int(exit_code_of(error))
    name, message = type(error).__name__, str(error) or type(error).__name__
    text = "".join(traceback.format_exception(error))[-_TRACEBACK_LENGTH:]
    recorder.write("fault", error=name, message=message, traceback=text, exit_code=code)
    leave_marker(State.FAILED, code, f"{name}: {message}", recorder.iteration)


def end(code: int) -> None:
    """Record the exit code, leave the marker it stands for, and close the log."""
    recorder = _recorder_of_this_run()
    if recorder is None:
        return
    recorder.write("end", exit_code=int(code))
    if code == ExitCode.DONE and recorder.args.rank == 0:
        leave_marker(State.FINISHED, code, "", recorder.iteration)
    elif code not in (ExitCode.DONE, ExitCode.PREEMPTED):
        leave_marker(State.FAILED, code, f"exit code {int(code)}", recorder.iteration)
    _close()


def marker_folder(args: argparse.Namespace) -> Path | None:
    """Return the folder that markers lie in, --save; None without one on a file system."""
    is_local = args.save and "://" not in args.save
    return Path(args.save) if is_local else None


def leave_marker(
    state: State, code: int, message: str, iteration: int | None, signal: str | None = None
) -> None:
    """Write a marker in the --save folder if this start has none yet; a full disk is survived."""
    recorder = _recorder_of_this_run()
    folder = None if recorder is None else marker_folder(recorder.args)
    if folder is not None and (recorder.is_installed or folder.is_dir()):
        rank = recorder.args.rank
        marker = Marker(state, int(code), time.time(), rank, iteration, message, signal)
        _tolerate(write_marker, folder, marker, since=_run_start)


def another_rank_failed() -> bool:
    """Whether this start has left the marker FAILED, in a folder that all ranks see."""
    folder = None if _recorder is None else marker_folder(_recorder.args)
    marker = None if folder is None else read_marker(folder)
    return marker is not None and marker.state is State.FAILED and marker.time >= _run_start


def seconds_of_last_save(args: argparse.Namespace) -> float | None:
    """Return how long this rank's last save took in an earlier start or this one, from its log."""
    folder = event_dir(args)
    if folder is None or not event_file(folder, args.rank).is_file():
        return None
    for past in reversed(read_last_events(event_file(folder, args.rank), 1 << 20)):
        if past["kind"] == "save_end" and not past["asynchronous"]:
            return float(past["seconds"])
    return None


def _recorder_of_this_run() -> _Recorder | None:
    """The recorder, or a new one where the run ends between its parsing and `install`."""
    global _recorder
    args = _global_args()
    if _follows_this_run() or args is _ended or not hasattr(args, "emo_event_dir"):
        return _recorder
    _close()
    folder = event_dir(args)
    log = EventLog(folder, args.rank) if folder is not None and folder.is_dir() else None
    _recorder = _Recorder(args, log, is_installed=False)
    return _recorder


def _close() -> None:
    global _recorder, _run_start, _ended
    if _recorder is not None:
        _run_start, _ended = time.time(), _recorder.args
        if _recorder.log is not None:
            _recorder.log.close()
    _recorder = None


def _tolerate(write: Any, *args: Any, **kwargs: Any) -> None:
    try:
        write(*args, **kwargs)
    except OSError as error:
        print(f"warning: marker in {args[0]}: {error}", file=sys.stderr, flush=True)


def _start_fields(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_emo.launch import environment

    launch = {name: os.environ[name] for name in _LAUNCH_VARIABLES if name in os.environ}
    layout = {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "vp": args.virtual_pipeline_model_parallel_size or 1,
        "cp": args.context_parallel_size,
        "ep": args.expert_model_parallel_size,
        "dp": args.data_parallel_size,
    }
    return {
        "world_size": args.world_size,
        "train_iters": args.train_iters,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "objective": args.objective,
        "cost_embedding": getattr(args, "emo_cost_embedding_id", None) or None,
        "save": args.save,
        "command": redact_command(sys.argv),
        "environment": environment.variables() | launch,
        "versions": environment.versions(),
        "layout": layout,
    }


def _follows_this_run() -> bool:
    """Whether the log belongs to the run under way, and not to one before it in this process."""
    return _recorder is not None and _recorder.args is _global_args()


def _global_args() -> argparse.Namespace | None:
    # A run can end before Megatron is imported.
    global_vars = sys.modules.get("megatron.training.global_vars")
    return None if global_vars is None else global_vars._GLOBAL_ARGS


class _WorkClock:
    """What this rank does by itself in a step: from its start to the reduction of its gradients.

    On a GPU by events on the stream, which cost no wait. Tensor- and pipeline-parallel peers wait
    for each other inside that time, and look alike.
    """

    def __init__(self) -> None:
        self._start: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        self._start = _moment()

    def end(self) -> None:
        if self._start is not None:
            self._spans.append((self._start, _moment()))
            self._start = None

    def take_ms(self) -> float | None:
        """Return the mean of the steps since the last call, None where there was none."""
        spans, self._spans = self._spans, []
        finished = [span for span in spans if isinstance(span[1], float) or span[1].query()]
        if not finished:
            return None
        return sum(_milliseconds(*span) for span in finished) / len(finished)


def _moment() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(end, float) else start.elapsed_time(end)


def _train_step(upstream: Any, *args: Any, **kwargs: Any) -> Any:
    if _follows_this_run():
        _recorder.work.begin()
    return upstream(*args, **kwargs)


def _finalize_model_grads(upstream: Any, *args: Any, **kwargs: Any) -> Any:
    if _follows_this_run():
        _recorder.work.end()
    return upstream(*args, **kwargs)


def _training_log(
    upstream: Any,
    loss_dict: dict,
    total_loss_dict: dict,
    learning_rate: float | None,
    iteration: int,
    loss_scale: float,
    report_memory_flag: bool,
    skipped_iter: int,
    grad_norm: Any,
    *rest: Any,
    is_first_iteration: bool = False,
    **kwargs: Any,
) -> Any:
    """Record what upstream is about to print; it empties total_loss_dict."""
    fields = None
    if _follows_this_run():
        _recorder.iteration = iteration
        if iteration % _recorder.args.log_interval == 0 or is_first_iteration:
            totals = _Totals(loss_dict, total_loss_dict, skipped_iter)
            fields = _progress(_recorder, totals, resets=not is_first_iteration)
            if totals.means:
                fields |= {
                    "losses": totals.means,
                    "learning_rate": _number(learning_rate),
                    "grad_norm": _number(grad_norm),
                    "loss_scale": _number(loss_scale),
                    "skipped": totals.skipped,
                    "nan": totals.nan,
                }
    result = upstream(
        loss_dict,
        total_loss_dict,
        learning_rate,
        iteration,
        loss_scale,
        report_memory_flag,
        skipped_iter,
        grad_norm,
        *rest,
        is_first_iteration=is_first_iteration,
        **kwargs,
    )
    if fields is not None:
        _write_progress(_recorder, fields)
    return result


class _Totals:
    """The sums of upstream's training_log with this step's in them, as it will print them."""

    def __init__(self, loss_dict: dict, total: dict, skipped_iter: int) -> None:
        advanced = total.get("advanced iterations", 0) + (0 if skipped_iter else 1)
        self.skipped: int = int(total.get("skipped iterations", 0) + skipped_iter)
        self.nan: int = int(total.get("nan iterations", 0))
        self.num_iterations: int = advanced + self.skipped
        self.means: dict[str, float] = {}
        # Not those that upstream adds inside (auxiliary losses): they are not complete yet.
        for name in loss_dict:
            value = total.get(name, 0) + (0 if skipped_iter else loss_dict[name])
            self.means[name] = float(value) / max(1, advanced)


def _progress(recorder: _Recorder, totals: _Totals, resets: bool) -> dict[str, Any]:
    from megatron.training import get_timers

    args = recorder.args
    # The interval's timer leaves evaluations and saves out; upstream resets it after us.
    seconds = get_timers()("interval-time").elapsed(reset=False)
    samples = args.consumed_train_samples - recorder.samples_before
    if resets:
        recorder.samples_before = args.consumed_train_samples
    return {
        "train_iters": int(args.train_iters),
        "step_ms": seconds * 1e3 / max(1, totals.num_iterations),
        "work_ms": None,
        "tokens_per_s": samples * args.seq_length / seconds if seconds > 0 else 0.0,
        "consumed_samples": int(args.consumed_train_samples),
    }


def _write_progress(recorder: _Recorder, fields: dict[str, Any]) -> None:
    """The rank that speaks for all writes the step: the last one, which has Megatron's losses."""
    fields["work_ms"] = recorder.work.take_ms()
    is_last = recorder.args.rank == recorder.args.world_size - 1
    if is_last and "losses" in fields:
        recorder.write("step", **fields)
    else:
        kept = ("train_iters", "step_ms", "work_ms")
        recorder.write("heartbeat", **{name: fields[name] for name in kept})


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _evaluate_and_print_results(upstream: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
    if _follows_this_run():
        _recorder.eval_prefix = prefix
    return upstream(prefix, *args, **kwargs)


def _evaluate(upstream: Any, *args: Any, **kwargs: Any) -> Any:
    if not _follows_this_run():
        return upstream(*args, **kwargs)
    recorder, begun = _recorder, time.perf_counter()
    samples = recorder.args.consumed_valid_samples
    losses: dict[str, float] = {}
    is_complete = False
    try:
        result = upstream(*args, **kwargs)
        is_complete = not result[2]
        if is_complete:
            losses = {name: float(value) for name, value in result[0].items()}
        return result
    finally:
        num_samples = recorder.args.consumed_valid_samples - samples
        recorder.write(
            "eval",
            data="test" if "test set" in recorder.eval_prefix else "validation",
            losses=losses,
            num_steps=num_samples // recorder.args.eval_global_batch_size,
            complete=is_complete,
            seconds=time.perf_counter() - begun,
        )


def _save_checkpoint(upstream: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
    if not _follows_this_run():
        return upstream(iteration, *args, **kwargs)
    from megatron.training.checkpointing import get_checkpoint_name

    recorder, begun = _recorder, time.perf_counter()
    path = get_checkpoint_name(recorder.args.save, iteration, return_base_dir=True)
    recorder.write("save_begin", path=path)
    result = upstream(iteration, *args, **kwargs)
    is_async = bool(recorder.args.async_save)
    has_size = recorder.args.rank == 0 and not is_async and os.path.isdir(path)
    recorder.write(
        "save_end",
        path=path,
        seconds=time.perf_counter() - begun,
        bytes=_size_of(path) if has_size else None,
        asynchronous=is_async,
    )
    return result


def _size_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _load_checkpoint(upstream: Any, *args: Any, **kwargs: Any) -> Any:
    begun = time.perf_counter()
    result = upstream(*args, **kwargs)
    if _follows_this_run():
        _recorder.iteration = int(result[0])
        _recorder.samples_before = _recorder.args.consumed_train_samples
        recorded = {"path": str(_recorder.args.load), "seconds": time.perf_counter() - begun}
        _recorder.write("load", **recorded)
    return result
