"""How variants are compared: interleaved rounds, ratios round by round, memory by live storage.

A machine whose speed drifts treats all variants of a round alike, and the order rotates. Times of
two runs of this benchmark do not compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from megatron_emo.benchmark.collectives import Traffic, count_collectives
from megatron_emo.benchmark.config import DTYPES, BenchmarkConfig
from megatron_emo.benchmark.memory import peak_bytes
from megatron_emo.benchmark.problem import MeanLoss, Problem
from megatron_emo.benchmark.roofline import Prediction, find_device, predict, useful_flop
from megatron_emo.benchmark.variants import VARIANTS, compile_stance, gradient_error

Report = Callable[[str], None]
"""Takes lines of progress."""


@dataclass(frozen=True)
class Ratio:
    """One variant's time over another's in the same run."""

    median: float
    """Of the ratios of each round."""
    min: float
    """Of the ratios of each round."""
    of_minima: float
    """Shortest time over shortest time: what is left of the disturbance by other processes."""


@dataclass(frozen=True)
class VariantResult:
    """One row of the result."""

    gradient_error: float
    peak_bytes: int
    """Beside the inputs; dX and dW included."""
    seconds: dict[str, list[float]]
    """By clock, per round: wall and cpu (of all threads) on a CPU, gpu on a GPU."""
    ratios: dict[str, dict[str, Ratio]]
    """By clock and by the variant compared with, where that one ran."""
    tflops: float = 0.0
    """6 N h V over the median of the first clock, in TFLOP/s, whatever was computed beside it."""
    traffic: Traffic | None = None
    """Over `tensor_parallel` ranks, for this package's own."""
    model: Prediction | None = None
    """The roofline's, for this package's own in bf16 on a known GPU."""

    def baselines(self) -> list[str]:
        return list(next(iter(self.ratios.values())))

    @property
    def clock(self) -> str:
        """The clock that comes first: wall or gpu."""
        return next(iter(self.seconds))


def run_benchmark(
    config: BenchmarkConfig, target: Tensor, report: Report = lambda line: None
) -> dict[str, VariantResult]:
    """Return one result per variant, by name, after checking each one's gradients.

    Raises:
        RuntimeError: a variant whose gradients are wrong is not worth timing.
    """
    errors = check_gradients(config, report)
    traffic = {}
    if config.tensor_parallel > 1:
        report(f"counting collectives over {config.tensor_parallel} ranks")
        traffic = count_collectives(
            config.variants,
            target,
            hidden_size=config.hidden_size,
            cost_dim=config.cost_dim,
            dtype=DTYPES[config.dtype],
            tp_size=config.tensor_parallel,
        )
    problem = config.make_problem(target)
    with compile_stance([VARIANTS[name] for name in config.variants], config.device):
        losses = {name: VARIANTS[name].build(problem) for name in config.variants}
        peaks = {}
        for name, loss in losses.items():
            peaks[name] = peak_bytes(loss, problem)
            report(f"{name}: peak {peaks[name] / 1e6:.1f} MB beside the inputs")
        seconds = time_rounds(losses, problem, config.rounds, config.warmup, report)
    flop = useful_flop(config.num_tokens, config.vocab_size, config.hidden_size)
    return {
        name: VariantResult(
            errors[name],
            peaks[name],
            seconds[name],
            _ratios(name, seconds),
            flop / median(next(iter(seconds[name].values()))) / 1e12,
            traffic.get(name),
            _model(config, name, len(target.unique())),
        )
        for name in config.variants
    }


def check_gradients(config: BenchmarkConfig, report: Report) -> dict[str, float]:
    """Return every variant's `gradient_error`.

    Raises:
        RuntimeError: one beyond its tolerance.
    """
    dtype, errors = DTYPES[config.dtype], {}
    for name in config.variants:
        variant = VARIANTS[name]
        errors[name] = gradient_error(variant, dtype, config.device)
        report(f"{name}: gradients within {errors[name]:.1e} of float64")
        tolerance = variant.tolerance(dtype, config.device)
        if not errors[name] <= tolerance:
            raise RuntimeError(
                f"{name}: expected gradients within {tolerance:.0e} of "
                f"float64 in {config.dtype}, got {errors[name]:.1e}"
            )
    return errors


def time_rounds(
    losses: Mapping[str, MeanLoss],
    problem: Problem,
    rounds: int,
    warmup: int,
    report: Report,
) -> dict[str, dict[str, list[float]]]:
    """Return seconds[name][clock][round]; round r starts with the r-th variant."""
    measure = _time_on_gpu if problem.hidden.is_cuda else _time_on_cpu
    seconds = {name: {} for name in losses}
    for i in range(warmup + rounds):
        taken = {name: measure(losses[name], problem) for name in rotated(list(losses), i)}
        label = f"warm-up {i + 1}/{warmup}" if i < warmup else f"round {i + 1 - warmup}/{rounds}"
        shown = (f"{name} {next(iter(taken[name].values())):.3f} s" for name in losses)
        report(f"{label}: {', '.join(shown)}")
        for name, times in taken.items() if i >= warmup else ():
            for clock, value in times.items():
                seconds[name].setdefault(clock, []).append(value)
    return seconds


def rotated(names: list[str], round_index: int) -> list[str]:
    """Return the names in the order of a round: the next one starts each time."""
    first = round_index % len(names)
    return names[first:] + names[:first]


def ratio(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return how times compare with others, round by round."""
    each = [a / b for a, b in zip(times, others, strict=True)]
    return Ratio(median(each), min(each), min(times) / min(others))


def _ratios(name: str, seconds: dict) -> dict[str, dict[str, Ratio]]:
    baselines = [x for x in VARIANTS[name].baselines if x in seconds and x != name]
    return {
        clock: {base: ratio(times, seconds[base][clock]) for base in baselines}
        for clock, times in seconds[name].items()
    }


def _model(config: BenchmarkConfig, name: str, num_distinct: int) -> Prediction | None:
    variant = VARIANTS[name]
    if config.device == "cpu" or config.dtype != "bf16" or not variant.path:
        return None
    device = find_device(torch.cuda.get_device_name())
    if device is None:
        return None
    return predict(
        device,
        variant.path,
        num_tokens=config.num_tokens,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        cost_dim=config.cost_dim,
        num_distinct=0 if variant.objective == "mle" else num_distinct,
        table=variant.table,
    )


def _time_on_cpu(loss: MeanLoss, problem: Problem) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    problem.gradients(loss())
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _time_on_gpu(loss: MeanLoss, problem: Problem) -> dict[str, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    problem.gradients(loss())
    end.record()
    torch.cuda.synchronize()
    return {"gpu": start.elapsed_time(end) / 1000}
