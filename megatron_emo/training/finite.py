"""A run whose loss or gradient is not finite stops before the optimizer, and saves nothing.

Megatron 0.19.2 (megatron/core/rerun_state_machine.py) lets the first step of a process pass
unchecked, the first after a resume too, and so saves weights that are NaN; on later ones it runs
the step twice, saves, and exits with 16 for a scheduler to resume. Its own checks, of each
microbatch's loss and each bucket's gradient, are kept, the second run with them; what follows from
them is decided here, by all ranks together, where it hands back to the training loop.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_emo.launch.exit_codes import NonFiniteError
from megatron_emo.launch.verdict import exchange_of_run
from megatron_emo.training.hooks import stand_around

_FLAG = "--no-check-for-nan-in-loss-and-grad"


class _Watch:
    """What this rank has found in the step that runs."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.report: Mapping[str, Tensor] = {}
        """[sum, count] by name, of the last microbatch's losses."""


_watch = _Watch()


def install(args: argparse.Namespace) -> None:
    """Stand around Megatron's checks; a second call only forgets the last run."""
    global _watch
    _watch = _Watch()
    if _FLAG in sys.argv and args.rank == 0:
        print(
            f"> WARNING: {_FLAG}: losses and gradients of single ranks go unchecked; the "
            "gradient's norm is still looked at before each step",
            flush=True,
        )
    from megatron.core import rerun_state_machine
    from megatron.core.optimizer import optimizer

    machine = rerun_state_machine.RerunStateMachine
    stand_around(machine, "validate_result", _validate_result)
    stand_around(machine, "should_checkpoint_and_exit", _should_checkpoint_and_exit)
    stand_around(optimizer, "get_grad_norm_fp32", _get_grad_norm_fp32)


def note_losses(report: Mapping[str, Tensor]) -> None:
    """Keep a microbatch's [sum, count] pairs, to say which of them is not finite. No copy."""
    _watch.report = report


def _validate_result(
    upstream: Callable,
    machine: Any,
    result: Any,
    rejection_func: Callable[[Any], bool],
    message: str,
    comparison_func: Callable | None = None,
    tolerance: float = 0.0,
    fatal: bool = True,
) -> None:
    named = {"comparison_func": comparison_func, "tolerance": tolerance, "fatal": fatal}
    if not fatal or _is_of_megatron(machine):
        was_requested = machine.rerun_requested
        upstream(machine, result, rejection_func, message, **named)
        if fatal and machine.rerun_requested and not was_requested:
            _note(result, message)
        return
    if rejection_func(result):
        _note(result, message)
        if _is_outside_of_a_step(machine):
            raise NonFiniteError(f"in an evaluation: {_watch.found[-1]}")
    if machine.mode.value != "disabled":
        upstream(machine, result, rejection_func, message, **named)


def _should_checkpoint_and_exit(upstream: Callable, machine: Any) -> tuple[bool, bool, int]:
    is_ours = not _is_of_megatron(machine)
    saves, exits, code = upstream(machine)
    if (is_ours or exits) and machine._reduce_any(bool(_watch.found)):
        second = "it again" if saves else "another value"
        _raise_on_all_ranks("" if is_ours else f"; a second run of the step gave {second}")
    return saves, exits, code


def _get_grad_norm_fp32(upstream: Callable, *args: Any, **named: Any) -> float:
    """The norm is that of all ranks of its group: each of them raises, and none takes the step."""
    norm = upstream(*args, **named)
    if not math.isfinite(norm) and not _skips_large_norms():
        raise NonFiniteError(
            f"{_where()}: the gradient's norm is {float(norm)}, before the optimizer's step; "
            f"nothing is saved. {_losses_in_words()}"
        )
    return norm


def _is_of_megatron(machine: Any) -> bool:
    """Whether the machine judges this step itself."""
    return machine.mode.value == "validate_results" and machine.first_iteration_complete


def _is_outside_of_a_step(machine: Any) -> bool:
    return machine.state.name == "NOT_RUNNING_YET"


def _note(result: Any, message: str) -> None:
    value = result.item() if torch.is_tensor(result) else result
    if not math.isfinite(value):
        _watch.found.append(f"{message}: {value}. {_losses_in_words()}")


def _raise_on_all_ranks(rerun: str = "") -> None:
    """Raise on every rank with what each found first; one exchange."""
    found = exchange_of_run()(_watch.found[0] if _watch.found else None)
    parts = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
    error = NonFiniteError(
        f"{_where()}, before the optimizer's step; nothing is saved{rerun}\n  " + "\n  ".join(parts)
    )
    error.is_on_all_ranks = True
    raise error


def _where() -> str:
    args = _arguments()
    number = args.curr_iteration + 1
    is_first = number == args.iteration + 1 and args.iteration > 0
    return f"iteration {number}" + (", the first after the resume" if is_first else "")


def _losses_in_words() -> str:
    """Say whether the model's own cross-entropy is at fault, or what EMO adds to it."""
    sums = {name: float(pair[0]) for name, pair in _watch.report.items()}
    if not sums:
        return "No loss is computed on this rank"
    shown = ", ".join(f"{name} {value:.6g}" for name, value in sums.items())
    if not math.isfinite(sums.get("lm loss", 0.0)):
        return f"The model: its cross-entropy is not finite, with or without EMO ({shown})"
    wrong = [name for name, value in sums.items() if not math.isfinite(value)]
    if wrong:
        return f"EMO: the model's cross-entropy is finite, {' and '.join(wrong)} not ({shown})"
    return f"The last microbatch's losses are finite ({shown})"


def _skips_large_norms() -> bool:
    return math.isfinite(getattr(_arguments(), "grad_norm_skip_threshold", math.inf))


def _arguments() -> argparse.Namespace:
    from megatron.training import get_args

    return get_args()
