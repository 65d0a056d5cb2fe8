"""How variants are compared: interleaved rounds, ratios round by round, memory by live storage.

A machine whose speed drifts treats all variants of a round alike, and the order rotates. Times of
two runs of this benchmark do not compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from megatron_emo.benchmark.variants import (
    DEFAULT_VARIANTS,
    PLAIN,
    VARIANTS,
    MeanLoss,
    Problem,
    available_variants,
    gradient_error,
    make_problem,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

GRADIENT_TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}
"""Bounds of `gradient_error`; in bf16 the logits have 8 bits, in whatever code."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure; the sizes default to the output layer of GPT-2 small."""

    num_tokens: int = 2048
    vocab_size: int = 50257
    hidden_size: int = 768
    cost_dim: int = 768
    dtype: str = "fp32"
    """Of hidden states, weight and cost table."""
    device: str = "cpu"
    rounds: int = 5
    warmup: int = 1
    """Rounds that are run and not counted."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """Names in VARIANTS, or "all" for all that can run here."""
    seed: int = 1234

    def __post_init__(self) -> None:
        lowest = {"num_tokens": 1, "vocab_size": 1, "hidden_size": 1, "cost_dim": 1, "rounds": 1}
        for name, least in {**lowest, "warmup": 0}.items():
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: expected at least {least}, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.variants == ("all",):
            object.__setattr__(self, "variants", available_variants())
        for name in self.variants:
            if name not in VARIANTS:
                raise ValueError(f"--variants: expected {', '.join(VARIANTS)}, got {name!r}")
            if not VARIANTS[name].is_available():
                raise ValueError(f"--variants: {name} is not installed; `make env` installs it")


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

    def baselines(self) -> list[str]:
        return list(next(iter(self.ratios.values())))


def run_benchmark(
    config: BenchmarkConfig, target: Tensor, report: Callable[[str], None] = lambda line: None
) -> dict[str, VariantResult]:
    """Return one result per variant, by name, after checking each one's gradients.

    Raises:
        RuntimeError: a variant whose gradients are wrong is not worth timing.
    """
    dtype = DTYPES[config.dtype]
    errors = {}
    for name in config.variants:
        errors[name] = gradient_error(VARIANTS[name], dtype, config.device)
        report(f"{name}: gradients within {errors[name]:.1e} of float64")
        if not errors[name] <= GRADIENT_TOLERANCE[config.dtype]:
            raise RuntimeError(
                f"{name}: expected gradients within {GRADIENT_TOLERANCE[config.dtype]:.0e} of "
                f"float64 in {config.dtype}, got {errors[name]:.1e}"
            )
    problem = make_problem(
        target, config.vocab_size, config.hidden_size, config.cost_dim, config.seed
    ).to(config.device, dtype)
    losses = {name: VARIANTS[name].build(problem) for name in config.variants}
    peaks = {name: peak_bytes(loss, problem) for name, loss in losses.items()}
    seconds = time_rounds(losses, problem, config.rounds, config.warmup, report)
    return {
        name: VariantResult(errors[name], peaks[name], seconds[name], _ratios(name, seconds))
        for name in config.variants
    }


def time_rounds(
    losses: dict[str, MeanLoss],
    problem: Problem,
    rounds: int,
    warmup: int,
    report: Callable[[str], None],
) -> dict[str, dict[str, list[float]]]:
    """Return seconds[name][clock][round]; round r starts with the r-th variant."""
    measure = _time_on_gpu if problem.hidden.is_cuda else _time_on_cpu
    names, seconds = list(losses), {name: {} for name in losses}
    for i in range(warmup + rounds):
        first = i % len(names)
        taken = {}
        for name in names[first:] + names[:first]:
            taken[name] = measure(losses[name], problem)
        label = f"warm-up {i + 1}/{warmup}" if i < warmup else f"round {i + 1 - warmup}/{rounds}"
        shown = (f"{name} {next(iter(taken[name].values())):.3f} s" for name in names)
        report(f"{label}: {', '.join(shown)}")
        for name, times in taken.items() if i >= warmup else ():
            for clock, value in times.items():
                seconds[name].setdefault(clock, []).append(value)
    return seconds


def _ratios(name: str, seconds: dict) -> dict[str, dict[str, Ratio]]:
    baselines = (VARIANTS[name].baseline, PLAIN)
    baselines = [base for base in baselines if base in seconds and base != name]
    result = {}
    for clock, times in seconds[name].items():
        result[clock] = {}
        for base in baselines:
            others = seconds[base][clock]
            each = [a / b for a, b in zip(times, others, strict=True)]
            result[clock][base] = Ratio(median(each), min(each), min(times) / min(others))
    return result


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


def peak_bytes(loss: MeanLoss, problem: Problem) -> int:
    """Return the most bytes alive beside the inputs, dX and dW included, in one repetition."""
    if problem.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.gradients(loss())
        return torch.cuda.max_memory_allocated() - before
    with LiveStorage() as live:
        problem.gradients(loss())
    return live.peak_bytes


class LiveStorage(TorchDispatchMode):
    """Records the peak, in bytes, of the storages that operators inside returned and are alive.

    Unlike the process's resident size it knows nothing of an allocator's habits. Tensors made
    before are not counted, nor is what an operator allocates and frees inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes = WeakIdKeyDictionary()
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {s.data_ptr() for s in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        # A view, and what is written in place, has the storage of an argument.
        for storage in _storages(result):
            if storage.data_ptr() not in given:
                self._sizes[storage] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes.values()))
        return result


def _storages(tree) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_iter(tree) if isinstance(x, Tensor)]
