"""How long the output layer with its loss takes in training, and the most memory of a rank.

Off unless `--emo-time-loss` asks for it. The forward is timed around the output processor, the
backward between two functions that change nothing: one behind the loss, whose backward comes first,
and one before the hidden states, whose backward comes last. On a GPU the moments are events on the
stream, which are read once a step, after its losses have been.

It costs two such moments and two empty nodes of the graph a microbatch, and a record a step. Heads
for further tokens (MTP) and evaluations are not timed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from megatron_emo.training import recording
from megatron_emo.training.hooks import stand_around

_KIBIBYTES = 1024


class LossClock:
    """Spans of the loss layer since they were last taken."""

    def __init__(self) -> None:
        self.forward: list[tuple[Any, Any]] = []
        self.backward: list[tuple[Any, Any]] = []
        self._begun: list[Any] = []

    def begin_backward(self) -> None:
        self._begun.append(_moment())

    def end_backward(self) -> None:
        if self._begun:
            self.backward.append((self._begun.pop(), _moment()))

    def take(self) -> dict[str, Any]:
        """Return forward_ms and backward_ms of a step, None where there was none, and empty the
        clock."""
        spans = (self.forward, self.backward)
        self.forward, self.backward, self._begun = [], [], []
        sums = [sum(_milliseconds(*span) for span in part) if part else None for part in spans]
        return {
            "forward_ms": sums[0],
            "backward_ms": sums[1],
            "num_microbatches": len(spans[0]),
        }


_clock = LossClock()
_timed: argparse.Namespace | None = None
"""The arguments of the run that is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flag."""
    group = parser.add_argument_group("loss time")
    group.add_argument(
        "--emo-time-loss",
        action="store_true",
        help="Write a record loss_time a step into the event log: milliseconds of the output layer "
        "with its loss, forward and backward, over the step's microbatches, and the rank's peak "
        "memory in bytes. Costs two timestamps a microbatch. Default: off.",
    )
    return parser


def install(args: argparse.Namespace) -> None:
    """Time the run's loss, where the flag asks for it; after `recording.install`."""
    global _timed
    _timed = args if args.emo_time_loss else None
    if _timed is None:
        return
    import megatron.training.training as training_loop

    from megatron_emo.training import steps

    _clock.take()
    stand_around(steps, "emo_output_processor", timed_processor)
    stand_around(training_loop, "training_log", _training_log)


def timed_processor(upstream: Any, **inputs: Any) -> Any:
    """Call an output processor between two moments of the clock."""
    if _timed is None or not torch.is_grad_enabled() or inputs["labels"] is None:
        return upstream(**inputs)
    inputs["hidden_states"] = _Last.apply(inputs["hidden_states"], _clock)
    begun = _moment()
    loss = upstream(**inputs)
    _clock.forward.append((begun, _moment()))
    return _First.apply(loss, _clock)


class _First(torch.autograd.Function):
    """Identity whose backward begins the span."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, clock: LossClock) -> Tensor:
        ctx.clock = clock
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.clock.begin_backward()
        return grad, None


class _Last(torch.autograd.Function):
    """Identity whose backward ends the span."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, clock: LossClock) -> Tensor:
        ctx.clock = clock
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.clock.end_backward()
        return grad, None


def _training_log(upstream: Any, *args: Any, **kwargs: Any) -> Any:
    result = upstream(*args, **kwargs)
    if _timed is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        recording.record("loss_time", **_clock.take(), peak_bytes=peak_bytes(), device=device)
    return result


def peak_bytes() -> int:
    """Return the most memory so far: the allocator's on a GPU, the process's resident set on a
    CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIBIBYTES


def _moment() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    if isinstance(end, float):
        return (end - start) * 1e3
    end.synchronize()
    return start.elapsed_time(end)
