"""How peak memory grows with tokens and with the vocabulary; nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from megatron_emo.benchmark.config import DTYPES, BenchmarkConfig
from megatron_emo.benchmark.measure import Report, check_gradients
from megatron_emo.benchmark.memory import peak_bytes
from megatron_emo.benchmark.report import machine_lines
from megatron_emo.benchmark.variants import VARIANTS, compile_stance

LoadTarget = Callable[[int, int], Tensor]
"""(num_tokens, vocab_size) -> ids [num_tokens]."""


@dataclass(frozen=True)
class Point:
    """One size."""

    num_tokens: int
    vocab_size: int
    beyond_gradients: int
    """Peak bytes above inputs, dX and dW; below 0 where the peak comes before the gradients."""


@dataclass(frozen=True)
class Sweep:
    """One variant's peaks."""

    over_tokens: list[Point]
    over_vocab: list[Point]
    bytes_per_token: float | None
    """Slope of a straight line through `over_tokens`, None where there are none."""
    bytes_per_vocab_entry: float | None


def run_sweep(
    config: BenchmarkConfig,
    num_tokens: Sequence[int],
    vocab_sizes: Sequence[int],
    load_target: LoadTarget,
    report: Report = lambda line: None,
) -> dict[str, Sweep]:
    """Return every variant's peaks over the token counts, and over the vocabulary sizes; what is
    not swept is as in `config`.

    Raises:
        ValueError: fewer than two sizes to draw a line through.
        RuntimeError: wrong gradients.
    """
    for flag, sizes in (("--sweep-tokens", num_tokens), ("--sweep-vocab", vocab_sizes)):
        if len(set(sizes)) == 1:
            raise ValueError(f"{flag}: expected at least 2 sizes, got {sizes[0]} alone")
    check_gradients(config, report)
    by_tokens = [replace(config, num_tokens=size) for size in sorted(set(num_tokens))]
    by_vocab = [replace(config, vocab_size=size) for size in sorted(set(vocab_sizes))]
    measured = [_measure(each, load_target, report) for each in (*by_tokens, *by_vocab)]
    result = {}
    for name in config.variants:
        points = [each[name] for each in measured]
        tokens, vocab = points[: len(by_tokens)], points[len(by_tokens) :]
        slopes = (_slope(tokens, "num_tokens"), _slope(vocab, "vocab_size"))
        result[name] = Sweep(tokens, vocab, *slopes)
    return result


def _measure(config: BenchmarkConfig, load_target: LoadTarget, report: Report) -> dict[str, Point]:
    problem = config.make_problem(load_target(config.num_tokens, config.vocab_size))
    rows = config.num_tokens + config.vocab_size
    gradients = rows * config.hidden_size * DTYPES[config.dtype].itemsize
    points = {}
    with compile_stance([VARIANTS[name] for name in config.variants], config.device):
        for name in config.variants:
            peak = peak_bytes(VARIANTS[name].build(problem), problem)
            points[name] = Point(config.num_tokens, config.vocab_size, peak - gradients)
    shown = (f"{name} {x.beyond_gradients / 1e6:.1f} MB" for name, x in points.items())
    report(f"N={config.num_tokens} V={config.vocab_size}: {', '.join(shown)}")
    return points


def _slope(points: Sequence[Point], size: str) -> float | None:
    if not points:
        return None
    peaks = [point.beyond_gradients for point in points]
    return float(np.polyfit([getattr(point, size) for point in points], peaks, 1)[0])


def format_sweep(run: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> str:
    """Return the header, and a table for each of the two sizes that was swept."""
    config = run["config"]
    lines = [
        f"peak above inputs, dX and dW, MB: h={config['hidden_size']} d={config['cost_dim']} "
        f"{config['dtype']}, workspace {config['workspace_mb']} MiB, targets {run['source']}",
        *machine_lines(run),
    ]
    width = max(16, *map(len, sweeps))
    for over, slope, size, other in (
        ("over_tokens", "bytes_per_token", "num_tokens", "vocab_size"),
        ("over_vocab", "bytes_per_vocab_entry", "vocab_size", "num_tokens"),
    ):
        first = getattr(next(iter(sweeps.values())), over)
        if not first:
            continue
        names = {"num_tokens": "N", "vocab_size": "V"}
        title = f"{names[size]} at {names[other]}={getattr(first[0], other)}"
        sizes = "".join(f"{getattr(point, size):>10}" for point in first)
        lines += ["", f"{title:<{width}}{sizes}  {slope.replace('_', ' ')}"]
        for name, sweep in sweeps.items():
            peaks = "".join(f"{x.beyond_gradients / 1e6:>10.1f}" for x in getattr(sweep, over))
            lines.append(f"{name:<{width}}{peaks}  {getattr(sweep, slope):,.0f}")
    return "\n".join(lines)


def write_sweep_png(path: str, run: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> None:
    """Draw the peaks over tokens and over the vocabulary, a line per variant."""
    from matplotlib.figure import Figure

    some = next(iter(sweeps.values()))
    swept = [("over_tokens", "num_tokens"), ("over_vocab", "vocab_size")]
    swept = [each for each in swept if getattr(some, each[0])]
    figure = Figure(figsize=(6 * len(swept) + 2, 4.4), layout="constrained")
    panels = figure.subplots(1, len(swept), squeeze=False)[0]
    for panel, (over, size) in zip(panels, swept, strict=True):
        for name, sweep in sweeps.items():
            points = getattr(sweep, over)
            sizes = [getattr(point, size) for point in points]
            panel.plot(sizes, [x.beyond_gradients / 1e6 for x in points], marker="o", label=name)
        panel.set_xlabel(size.replace("_", " "))
        panel.set_ylabel("peak above inputs, dX and dW, MB")
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{run['machine']}, {run['config']['dtype']}", fontsize=9)
    figure.savefig(path, dpi=100)
