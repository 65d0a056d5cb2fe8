"""What a run shows: where it ran, tables, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

import megatron_emo
from megatron_emo.benchmark.config import BenchmarkConfig
from megatron_emo.benchmark.measure import VariantResult
from megatron_emo.benchmark.roofline import useful_flop
from megatron_emo.benchmark.tokens import Target
from megatron_emo.benchmark.variants import VARIANTS


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
        **describe_machine(config.device, load_before),
    }


def describe_machine(device: str, load_before: list[float]) -> dict:
    """Return where and when a run ended, and with which versions."""
    return {
        "machine": _machine(device),
        "num_threads": torch.get_num_threads(),
        "load_average": {"before": load_before, "after": load_average()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "megatron_emo": megatron_emo.__version__,
        "commit": checkout_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_lines(run: Mapping[str, Any]) -> list[str]:
    """Return what `describe_machine` found, for the head of a report."""
    load = run["load_average"]
    return [
        f"{run['machine']}, {run['num_threads']} threads, load {load['before']} before, "
        f"{load['after']} after",
        f"torch {run['torch']}, python {run['python']}, commit {run['commit']}, {run['date']}",
    ]


def write_json(path: str, run: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write a run and its results, dataclasses by name."""
    content = {"run": run, "results": {name: asdict(result) for name, result in results.items()}}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def format_report(run: dict, results: dict[str, VariantResult]) -> str:
    """Return the header, a row per variant and clock, a row per ratio (see `Ratio`), and what was
    counted or modelled beside."""
    config, target = run["config"], run["target"]
    sizes = "N={num_tokens} V={vocab_size} h={hidden_size} d={cost_dim} {dtype}".format(**config)
    width = max(map(len, results))
    sections = [
        [
            f"logits, loss, dX and dW: {sizes}, {config['rounds']} rounds",
            f"targets {target['source']}; U/N {target['distinct_over_tokens']:.3f} "
            f"(U {target['num_distinct']})",
            *machine_lines(run),
        ],
        _time_lines(config, results, width),
        _note_lines(results),
        _ratio_lines(results, width),
        _traffic_lines(config, results, width),
        _roofline_lines(results, width),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _time_lines(config: dict, results: dict[str, VariantResult], width: int) -> list[str]:
    flop = useful_flop(config["num_tokens"], config["vocab_size"], config["hidden_size"])
    lines = [f"{'variant':<{width}}  clock    min s  median s  TFLOP/s   peak MB  grad error"]
    for name, result in results.items():
        for clock, seconds in result.seconds.items():
            lines.append(
                f"{name:<{width}}  {clock:<5}{min(seconds):>9.3f}{median(seconds):>10.3f}"
                f"{flop / median(seconds) / 1e12:>9.3f}"
                f"{result.peak_bytes / 1e6:>10.1f}{result.gradient_error:>12.1e}"
            )
    return [*lines, "TFLOP/s are those of 6 N h V, whatever was computed beside them."]


def _note_lines(results: dict[str, VariantResult]) -> list[str]:
    """Return a line per note, with the variants it is about."""
    about: dict[str, list[str]] = {}
    for name in results:
        if VARIANTS[name].note:
            about.setdefault(VARIANTS[name].note, []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in about.items()]


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


def _traffic_lines(config: dict, results: dict[str, VariantResult], width: int) -> list[str]:
    counted = {name: x.traffic for name, x in results.items() if x.traffic is not None}
    if not counted:
        return []
    lines = [
        f"collectives and bytes one rank hands in, counted over {config['tensor_parallel']} gloo "
        "ranks: N, h, d and ids as above, the vocabulary reduced to the distinct ids",
        f"{'variant':<{width}}  {'pass':<10}{'bytes':>12}{'formula':>12}  collectives",
    ]
    for name, traffic in counted.items():
        passes = {
            "forward": (traffic.forward, traffic.formula_forward_bytes),
            "backward": (traffic.backward, traffic.formula_backward_bytes),
        }
        for label, (calls, formula) in passes.items():
            total = sum(num_bytes for _, num_bytes in calls)
            asked = ", ".join(f"{call} {num_bytes}" for call, num_bytes in calls) or "none"
            lines.append(f"{name:<{width}}  {label:<10}{total:>12}{formula:>12}  {asked}")
    return lines


def _roofline_lines(results: dict[str, VariantResult], width: int) -> list[str]:
    modelled = {name: x for name, x in results.items() if x.model is not None}
    if not modelled:
        return []
    lines = [
        "roofline, a model: every product at the sustained rate, nothing overlapped",
        f"{'variant':<{width}}  products ms  cost ms  traffic ms  total ms  reached",
    ]
    for name, result in modelled.items():
        model, shortest = result.model, 1e3 * min(result.seconds[result.clock])
        lines.append(
            f"{name:<{width}}{model.products:>13.2f}{model.cost_products:>9.2f}"
            f"{model.traffic:>12.2f}{model.total:>10.2f}{model.total / shortest:>9.1%}"
        )
    return lines


def write_png(path: str, run: dict, results: dict[str, VariantResult]) -> None:
    """Draw the shortest time and the peak memory of every variant."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    height = 1.5 + 0.3 * max(len(results), 7)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, height), sharey=True)
    names = list(results)
    clock = results[names[0]].clock
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


def checkout_commit() -> str:
    """Return the checkout's commit, with + when files differ from it; unknown for an installed
    package."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
