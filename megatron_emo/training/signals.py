"""What SIGTERM does to a run: it saves after the step under way and ends with code 75.

Before the first step there is nothing to save, and the process ends at once. During a save it ends
after that save; during an evaluation, after that evaluation's batch, with nothing logged of it.
Further signals change nothing: torchrun and Slurm both send SIGTERM to the same processes. Where
another rank has failed, and left its marker, the signal is torchrun's clearing up: the process ends
with code 70. Python runs signal handlers between its own instructions alone, so a thread reads the
signals instead, and also acts where the main thread waits in a collective for ranks that are gone.

Stands around functions of megatron/training/training.py (core 0.19.2): train, evaluate,
evaluate_and_print_results and checkpoint_and_decide_exit; and on_eval_step_start of
megatron/training/ft_integration.py, which comes before every batch of an evaluation.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NoReturn

from megatron_emo.launch.exit_codes import ConfigError, ExitCode, Preempted
from megatron_emo.launch.markers import State
from megatron_emo.training import recording
from megatron_emo.training.hooks import stand_around

_TORCHRUN_GRACE_S = 30.0
_TEARDOWN_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of signals, and turn --exit-signal-handler on."""
    group = parser.add_argument_group("signals")
    group.add_argument(
        "--no-exit-signal-handler",
        dest="exit_signal_handler",
        action="store_false",
        help="Let SIGTERM kill the run. By default --exit-signal-handler is on: SIGTERM, and "
        "--exit-signal where it is another, make the run save after its step and end with code "
        "75, with the marker PREEMPTED in the --save folder.",
    )
    group.add_argument(
        "--emo-grace-s",
        type=float,
        default=_TORCHRUN_GRACE_S,
        metavar="S",
        help="Seconds between SIGTERM and SIGKILL here (torchrun --shutdown-timeout, Slurm's "
        "--signal=TERM@S): a start after a save that took longer warns. Default: %(default)s, "
        "torchrun's.",
    )
    parser.set_defaults(exit_signal_handler=True)
    return parser


def install(args: argparse.Namespace) -> None:
    """Put our handler in the place of Megatron's, before `pretrain()`.

    Raises:
        ConfigError: --exit-signal-handler-for-training, whose handler exits 0 without a save.
    """
    import megatron.training.training as training_loop
    from megatron.training import ft_integration, global_vars
    from megatron.training.datasets import data_samplers

    if args.exit_signal_handler_for_training:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise ConfigError(
            "--exit-signal-handler-for-training: its handler ends the run with code 0 and saves "
            "nothing; remove it: --exit-signal-handler, which saves, is on by default"
        )
    if not args.exit_signal_handler:
        return
    upstream = global_vars._GLOBAL_SIGNAL_HANDLER
    request = StopRequest(args.exit_signal)
    came_early = getattr(upstream, "_signal_received", False)
    if upstream is not None:
        upstream.release()
    request.catch()
    global_vars._GLOBAL_SIGNAL_HANDLER = request
    if came_early:
        request.receive(args.exit_signal)
    _warn_of_short_grace(args)
    stand_around(training_loop, "train", _train)
    stand_around(training_loop, "checkpoint_and_decide_exit", _checkpoint_and_decide_exit)
    stand_around(training_loop, "save_checkpoint", _save_checkpoint)
    stand_around(training_loop, "evaluate", _evaluate)
    stand_around(training_loop, "evaluate_and_print_results", _evaluate_and_print_results)
    stand_around(ft_integration, "on_eval_step_start", _on_eval_step_start)
    stand_around(data_samplers, "DistributedSignalHandler", _handler_in_data_worker)


class _Phase(Enum):
    STARTING = auto()
    TRAINING = auto()
    AFTER_TRAINING = auto()


class StopRequest:
    """The signals this rank got, in the place of megatron.training's DistributedSignalHandler.

    Args:
        exit_signal: of --exit-signal; SIGTERM is listened to as well.
    """

    def __init__(self, exit_signal: signal.Signals) -> None:
        self.signals = tuple({signal.Signals(exit_signal), signal.SIGTERM})
        self.phase = _Phase.STARTING
        self.num_saves = 0
        self.saved_iteration: int | None = None
        self.agreed: tuple[signal.Signals, list[int]] | None = None
        """The signal and the ranks that got it, from when all ranks know of it."""
        self.out_of_time = False
        self._received: signal.Signals | None = None
        self._is_told = False
        self._lock = threading.Lock()
        self._previous: dict[signal.Signals, Any] = {}

    def catch(self) -> None:
        """Install handlers and start the thread that reads the signals; main thread only."""
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._note)
        self._thread = threading.Thread(target=self._read_signals, name="signals", daemon=True)
        self._thread.start()
        _forget_wakeup_in_children()

    def release(self) -> bool:
        """Put back the handlers of before; what Megatron's handler offers."""
        if not self._previous:
            return False
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write_end)  # the thread reads the end, and ends
        self._thread.join()
        os.close(self._read_end)
        return True

    def _note(self, number: int, frame: Any) -> None:
        """Python's handler; without one, nothing is written for the thread to read."""
        self._received = self._received or signal.Signals(number)

    def _read_signals(self) -> None:
        while data := os.read(self._read_end, 64):
            for number in data:
                if number in self.signals:
                    self.receive(signal.Signals(number))

    def receive(self, number: signal.Signals) -> None:
        """Take note of a signal; before the first step, or after another rank's failure, end."""
        with self._lock:
            is_first, self._is_told = not self._is_told, True
            self._received = self._received or number
            is_teardown = is_first and recording.another_rank_failed()
            ends_now = is_first and self.phase is _Phase.STARTING
            action = "end" if ends_now or is_teardown else "save, then end" if is_first else "none"
            recording.record("signal", signal=number.name, action=action)
            if ends_now and not is_teardown:
                _end_before_first_step(number)
        if is_teardown:
            _end_after_failure()

    def enter(self, phase: _Phase) -> None:
        """Go on to another phase, unless a signal is about to end the process in this one."""
        with self._lock:
            self.phase = phase

    def signals_received(self) -> list[int]:
        """Return the number of the signal each rank got, 0 for none.

        One all-gather over all ranks, int32, on the device of the default group; every rank has to
        call it. Megatron's loop calls it after every step.
        """
        import torch
        from megatron.training.dist_signal_handler import all_gather_item

        received = all_gather_item(int(self._received or 0), dtype=torch.int32)
        ranks = [rank for rank, number in enumerate(received) if number]
        if ranks and self.agreed is None:
            self.agreed = (signal.Signals(int(received[ranks[0]])), ranks)
        return received

    def reason(self) -> str:
        """Return what stopped the run, for people."""
        if self.agreed is None:
            return "--exit-duration-in-mins is over"
        number, ranks = self.agreed
        shown = ", ".join(map(str, ranks[:8])) + (", .." if len(ranks) > 8 else "")
        return f"{number.name} on rank{'s' if len(ranks) > 1 else ''} {shown}"


_forgets_in_children = False


def _forget_wakeup_in_children() -> None:
    """Keep a forked data worker's signals out of its parent's pipe."""
    global _forgets_in_children
    if not _forgets_in_children:
        os.register_at_fork(after_in_child=_forget_wakeup)
        _forgets_in_children = True


def _forget_wakeup() -> None:
    if _request() is not None:
        signal.set_wakeup_fd(-1)


def _request() -> StopRequest | None:
    """This run's handler; None in runs without, such as one after ours in the same process."""
    from megatron.training import global_vars

    handler = global_vars._GLOBAL_SIGNAL_HANDLER
    return handler if isinstance(handler, StopRequest) else None


def _end_before_first_step(number: signal.Signals) -> NoReturn:
    message = f"{number.name} before the first step: nothing to save, ending at once"
    print(f"> {message}", flush=True)
    _leave_preempted(message, None, number)
    _end_process(ExitCode.PREEMPTED)


def _end_after_failure() -> NoReturn:
    """torchrun tears the run down: no step can end, and NCCL would wait for the rank that failed.

    The main thread first gets time to end by an error of its own.
    """
    time.sleep(_TEARDOWN_S)
    print("> another rank failed: ending", flush=True)
    _end_process(ExitCode.INTERNAL)


def _end_process(code: ExitCode) -> NoReturn:
    """End this process from whatever thread, wherever the others are."""
    recording.end(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_preempted(
    message: str, saved_iteration: int | None, number: signal.Signals | None
) -> None:
    recording.leave_marker(
        State.PREEMPTED,
        ExitCode.PREEMPTED,
        message,
        saved_iteration,
        None if number is None else number.name,
    )


def _preempted(request: StopRequest) -> Preempted:
    """Return the error that ends a run which has saved all it will; rank 0 leaves the marker."""
    from megatron.training import get_args

    args = get_args()
    if request.saved_iteration is not None:
        result = f"saved iteration {request.saved_iteration} in {args.save}; start it again"
    else:
        result = "nothing was saved" + ("" if args.save else ": no --save")
    message = f"stopped by {request.reason()}: {result}"
    if args.rank == 0:
        number = request.agreed[0] if request.agreed else None
        _leave_preempted(message, request.saved_iteration, number)
    error = Preempted(message)
    error.is_on_all_ranks = True
    return error


def _train(upstream: Callable, *args: Any, **kwargs: Any) -> Any:
    request = _request()
    if request is None:
        return upstream(*args, **kwargs)
    request.enter(_Phase.TRAINING)
    try:
        result = upstream(*args, **kwargs)
    except SystemExit as error:
        # Upstream leaves so after its last save, once all ranks are there.
        if error.code or not (request.agreed or request.out_of_time):
            raise
        raise _preempted(request) from None
    request.enter(_Phase.AFTER_TRAINING)
    return result


def _save_checkpoint(upstream: Callable, iteration: int, *args: Any, **kwargs: Any) -> Any:
    result = upstream(iteration, *args, **kwargs)
    request = _request()
    # Those that are not persistent can lie on disks that a restart does not see.
    if request is not None and not kwargs.get("non_persistent_ckpt"):
        request.num_saves += 1
        request.saved_iteration = iteration
    return result


def _checkpoint_and_decide_exit(upstream: Callable, *args: Any, **kwargs: Any) -> bool:
    """Upstream looks for a signal before a regular save; look again after one."""
    request = _request()
    if request is None:
        return upstream(*args, **kwargs)
    num_saves = request.num_saves
    if upstream(*args, **kwargs):
        request.out_of_time = request.agreed is None and _is_out_of_time()
        return True
    return request.num_saves > num_saves and any(request.signals_received())


def _is_out_of_time() -> bool:
    """Whether --exit-duration-in-mins ended the run: all ranks stop then, none has finished."""
    import megatron.training.training as training_loop
    from megatron.training import get_args

    limit = get_args().exit_duration_in_mins
    return bool(limit) and (time.time() - training_loop._TRAIN_START_TIME) / 60 > limit


class _EvaluationCut(Exception):
    """Leaves upstream's evaluate() between two batches, on all ranks alike."""


def _on_eval_step_start(upstream: Callable) -> None:
    request = _request()
    if request is not None and any(request.signals_received()):
        raise _EvaluationCut
    upstream()


def _evaluate(
    upstream: Callable,
    forward_step_func: Any,
    data_iterator: Any,
    model: list,
    process_non_loss_data_func: Any,
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return what upstream returns where its own time limit ends an evaluation."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args, get_timers

    mode = get_rerun_state_machine().get_mode()
    samples = get_args().consumed_valid_samples
    parts = (forward_step_func, data_iterator, model, process_non_loss_data_func, config)
    try:
        return upstream(*parts, *args, **kwargs)
    except _EvaluationCut:
        pass
    config.timers = get_timers()
    get_timers()("evaluate").stop()
    get_rerun_state_machine().set_mode(mode)
    for chunk in model:
        chunk.train()
    # As if it had been whole: evaluations after a resume then see the samples they would have seen.
    num_steps = kwargs.get("eval_iters") or get_args().eval_iters
    get_args().consumed_valid_samples = samples + num_steps * get_args().eval_global_batch_size
    return None, None, True


def _evaluate_and_print_results(
    upstream: Callable,
    prefix: str,
    forward_step_func: Any,
    data_iterator: Any,
    model: list,
    iteration: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    """End the run after a cut evaluation; within training, the loop does."""
    request = _request()
    if request is not None and request.phase is _Phase.STARTING:  # --skip-train
        request.enter(_Phase.AFTER_TRAINING)
    upstream(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs)
    if request is None or request.agreed is None or request.phase is _Phase.TRAINING:
        return
    from megatron.training import get_args
    from megatron.training.async_utils import maybe_finalize_async_save

    maybe_finalize_async_save(blocking=True, terminate=True)
    args = get_args()
    if args.save and not args.skip_train:
        request.saved_iteration = iteration
    raise _preempted(request)


def _handler_in_data_worker(upstream: Callable, exit_signal: signal.Signals) -> Any:
    """A data worker outlives the signals that its rank answers with a save."""
    handler = upstream(exit_signal)
    if _request() is not None:
        for number in _request().signals:
            signal.signal(number, signal.SIG_IGN)
    return handler


def _warn_of_short_grace(args: argparse.Namespace) -> None:
    if args.rank != 0:
        return
    seconds = recording.seconds_of_last_save(args)
    if seconds is not None and seconds > args.emo_grace_s:
        print(
            f"> warning: the last save took {seconds:.0f} s, --emo-grace-s is "
            f"{args.emo_grace_s:g}: SIGKILL would come before a save after SIGTERM is done; raise "
            "torchrun --shutdown-timeout (and Slurm's --signal=TERM@S) and --emo-grace-s",
            flush=True,
        )
