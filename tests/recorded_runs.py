"""Short pretraining runs in the pool's ranks that end as the entry point would end them, and that
something happens to at a definite moment: a signal, or an error."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretraining import DATA, MODEL, TRAINING

SMALL = [*MODEL, *TRAINING, *DATA, "--num-layers", "1", "--global-batch-size", "4"]


AN_HOUR = "an hour passes"


class Trip:
    """What happens at the n-th call of a function of the loop, before it does its work.

    Args:
        at: preflight, datasets, step, save or eval_batch.
        call: n, from 1.
        what: a signal's name, AN_HOUR, or the message of an error.
    """

    def __init__(self, at: str, call: int, ranks: Sequence[int], what: str) -> None:
        self.at, self.call, self.ranks, self.what = at, call, ranks, what
        self.num_calls = 0

    def __call__(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.call and int(os.environ["RANK"]) in self.ranks:
            self.happen()

    def happen(self) -> None:
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.what])
        elif self.what == AN_HOUR:
            import megatron.training.training as training_loop

            training_loop._TRAIN_START_TIME -= 3600
        else:
            raise RuntimeError(self.what)


@contextlib.contextmanager
def trips_set(trips: Sequence[Trip]) -> Iterator[None]:
    """Set the trips for one run; after `cpu.enable`, as it imports Megatron."""
    import megatron.training.training as training_loop
    import torch

    from megatron_emo.training import preflight, steps

    places = {
        "step": (training_loop, "train_step", lambda: True),
        "save": (training_loop, "save_checkpoint", lambda: True),
        "eval_batch": (steps, "forward_step", lambda: not torch.is_grad_enabled()),
        "preflight": (preflight, "check_before_start", lambda: True),
        "datasets": (steps, "train_valid_test_datasets_provider", lambda: True),
    }
    with contextlib.ExitStack() as stack:
        for trip in trips:
            stack.enter_context(_tripping(*places[trip.at], trip))
        yield


@contextlib.contextmanager
def _tripping(module: Any, name: str, counts: Any, trip: Trip) -> Iterator[None]:
    upstream = getattr(module, name)

    def call(*args, **kwargs):
        if counts():
            trip()
        return upstream(*args, **kwargs)

    call.__dict__.update(vars(upstream))
    setattr(module, name, call)
    try:
        yield
    finally:
        # Something of ours may stand around `call` by now, for good; let it do no harm.
        trip.call = -1
        if getattr(module, name) is call:
            setattr(module, name, upstream)


def run_recorded(
    argv: list[str], trips: Sequence[tuple] = (), code: int = 0, message: str = ""
) -> None:
    """Run `pretrain_gpt(argv)` in this rank; for `run_distributed`.

    Args:
        trips: arguments of `Trip`.
        code: with which the run must end.
        message: what the error that ends it must say.
    """
    from megatron_emo.launch.exit_codes import exit_code_of
    from megatron_emo.training import compat, cpu, recording, run

    os.chdir(Path(argv[argv.index("--tensorboard-dir") + 1]))
    cpu.enable([])
    import megatron.training.training as training_loop

    train_start = training_loop._TRAIN_START_TIME
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    ended_with, said = 0, ""
    try:
        with trips_set([Trip(*trip) for trip in trips]):
            run.pretrain_gpt(argv)
    except BaseException as error:
        ended_with, said = exit_code_of(error), str(error)
        if ended_with:
            recording.fault(error)
        if ended_with != code:
            raise
    finally:
        recording.end(ended_with)
        training_loop._TRAIN_START_TIME = train_start
        compat.reset_megatron_state()
    assert (ended_with, message in said) == (code, True), (ended_with, said)
    assert handlers == {number: signal.getsignal(number) for number in handlers}
