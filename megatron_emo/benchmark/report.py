"""What a run shows: where it ran, a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

import megatron_emo
from megatron_emo.benchmark.measure import BenchmarkConfig, VariantResult
from megatron_emo.benchmark.tokens import Target


def load_average() -> list[float]:
    """Return the load of the last 1, 5 and 15 minutes; processes this run competes with."""
    return [round(load, 2) for load in os.getloadavg()]


def describe_run(config: BenchmarkConfig, target: Target, load_before: list[float]) -> dict:
    """Return what decides the figures beside the code that is measured."""
    distinct = len(target.ids.unique())
    return {
        "config": asdict(config),
        "target": {
            "source": target.source,
            "num_distinct": distinct,
            "distinct_over_tokens": distinct / len(target.ids),
        },
        "machine": _machine(config.device),
        "num_threads": torch.get_num_threads(),
        "load_average": {"before": load_before, "after": load_average()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "megatron_emo": megatron_emo.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: str, run: dict, results: dict[str, VariantResult]) -> None:
    content = {"run": run, "results": {name: asdict(result) for name, result in results.items()}}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def format_report(run: dict, results: dict[str, VariantResult]) -> str:
    """Return the header, a row per variant and clock, and a row per ratio (see `Ratio`)."""
    config, target, load = run["config"], run["target"], run["load_average"]
    sizes = "N={num_tokens} V={vocab_size} h={hidden_size} d={cost_dim} {dtype}".format(**config)
    lines = [
        f"logits, loss, dX and dW: {sizes}, {config['rounds']} rounds",
        f"targets {target['source']}; U/N {target['distinct_over_tokens']:.3f} "
        f"(U {target['num_distinct']})",
        f"{run['machine']}, {run['num_threads']} threads, load {load['before']} before, "
        f"{load['after']} after",
        f"torch {run['torch']}, python {run['python']}, commit {run['commit']}, {run['date']}",
        "",
    ]
    width = max(map(len, results))
    lines.append(f"{'variant':<{width}}  clock    min s  median s   peak MB  grad error")
    for name, result in results.items():
        for clock, seconds in result.seconds.items():
            lines.append(
                f"{name:<{width}}  {clock:<5}{min(seconds):>9.3f}{median(seconds):>10.3f}"
                f"{result.peak_bytes / 1e6:>10.1f}{result.gradient_error:>12.1e}"
            )
    return "\n".join([*lines, "", *_ratio_lines(results, width)])


def _ratio_lines(results: dict[str, VariantResult], width: int) -> list[str]:
    """Return a line per pair of variants and clock: time ratio over rounds, and peak over peak."""
    lines = [f"{'ratio':<{2 * width + 8}}clock  median     min  of minima    peak"]
    for name, result in results.items():
        for base in result.baselines():
            peak = result.peak_bytes / results[base].peak_bytes
            for clock, ratios in result.ratios.items():
                ratio = ratios[base]
                lines.append(
                    f"{name:<{width}}  over  {base:<{width}}{clock:<5}{ratio.median:>8.3f}"
                    f"{ratio.min:>8.3f}{ratio.of_minima:>11.3f}{peak:>8.3f}"
                )
    return lines


def write_png(path: str, run: dict, results: dict[str, VariantResult]) -> None:
    """Draw the shortest time and the peak memory of every variant."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    names = list(results)
    clock = next(iter(results[names[0]].seconds))
    shortest = [min(results[name].seconds[clock]) for name in names]
    left.bar_label(left.barh(names, shortest), fmt="%.3f")
    left.set_xlabel(f"shortest time, {clock} s")
    peaks = [results[name].peak_bytes / 1e6 for name in names]
    right.bar_label(right.barh(names, peaks), fmt="%.0f")
    right.set_xlabel("peak beside the inputs, MB")
    left.invert_yaxis()
    for axes in (left, right):
        axes.margins(x=0.15)  # Room for the labels.
    ratio = run["target"]["distinct_over_tokens"]
    figure.suptitle(f"{run['machine']}, {run['num_threads']} threads, U/N {ratio:.2f}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> str:
    """The checkout's commit, with + when files differ from it; unknown for an installed package."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
