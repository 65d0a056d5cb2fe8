"""From measured steps to tokens/s, TFLOP/s, MFU, efficiency and ratios of objectives."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_emo.evaluation.records import provenance
from megatron_emo.scaling.counts.devices import GIB, device_of_gpu
from megatron_emo.scaling.counts.flops import count_flops
from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.plans.plan_report import align
from megatron_emo.scaling.speed.throughput import Measured
from megatron_emo.scaling.speed.throughput_cells import Cell, Timing
from megatron_emo.scaling.speed.throughput_file import StudySpec

SCHEMA = "megatron_emo.scaling_throughput/1"
LAYOUT_KEYS = (
    *("gpus", "tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel"),
    *("expert_parallel", "virtual_pipeline", "micro_batch_size"),
)


CALM = 0.2
"""Quartiles further apart than this share of the median say that a machine did something else."""


def speedup(t_one: float, t_many: float) -> float:
    """Return t1 / tn: S(n) of one global batch, efficiency of one that grows with the ranks."""
    return t_one / t_many


def strong_efficiency(t_one: float, n_one: int, t_many: float, n_many: int) -> float:
    """Return S / n, n counted in units of the reference's GPUs."""
    return speedup(t_one, t_many) * n_one / n_many


def peak_flops(device: str, precision: str, given: float | None) -> float | None:
    """Return the FLOP/s that MFU is taken of; None: another device, or not in that precision.

    Args:
        device: as torch.cuda.get_device_name() says it.
        given: by --peak-tflops, in FLOP/s; comes first.
    """
    if given is not None:
        return given
    known = device_of_gpu(device)
    return known and known.rates.get(precision)


def make_rows(
    cells: Sequence[Cell], measured: Mapping[str, Measured], spec: StudySpec, peak: float | None
) -> list[dict]:
    """Return a row for each size, layout and objective with all its rounds measured.

    Args:
        measured: by cell's name.
        peak: as `peak_flops` found it for --peak-tflops; None: by each cell's device.
    """
    rows: list[dict] = []
    for cell in cells:
        if cell.round:
            continue
        rounds = [c for c in cells if _key(c) == _key(cell)]
        if all(c.name in measured for c in rounds):
            rows.append(_make_row(cell, [measured[c.name] for c in rounds], spec, peak))
    for row in rows:
        _add_reference(row, rows, spec)
        _add_ratio(row, rows, spec)
    return rows


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.size, cell.layout_name, cell.objective.label


def _make_row(cell: Cell, rounds: Sequence[Measured], spec: StudySpec, peak: float | None) -> dict:
    steps = np.array([s for one in rounds for s in one.step_s])
    shares = [s / t for one in rounds for s, t in zip(one.loss_s, one.step_s, strict=True)]
    low, median, high = (float(q) for q in np.quantile(steps, (0.25, 0.5, 0.75)))
    layout, gpus = cell.layout, cell.layout.gpus
    flops = count_flops(cell.shape, cell.num_tokens) / gpus
    peak = peak_flops(rounds[0].device, spec.precision, peak)
    return {
        "label": _label(cell),
        "size": cell.size,
        "layout": cell.layout_name,
        "objective": cell.objective.label,
        "gpus": gpus,
        **{key: getattr(layout, key) for key in LAYOUT_KEYS},
        "sequence_parallel": layout.sequence_parallel,
        "batch": cell.batch,
        "step_s": median,
        "step_s_q1": low,
        "step_s_q3": high,
        "spread": (high - low) / median,
        "steps": len(steps),
        "round_medians_s": [statistics.median(one.step_s) for one in rounds],
        "tokens_per_s": cell.num_tokens / median,
        "tokens_per_s_per_gpu": cell.num_tokens / median / gpus,
        "tokens_per_s_per_gpu_low": cell.num_tokens / high / gpus,
        "tokens_per_s_per_gpu_high": cell.num_tokens / low / gpus,
        "tflops_per_gpu": flops / median / 1e12,
        "mfu": None if peak is None else flops / median / peak,
        "loss_share": statistics.median(shares),
        "loss_s": statistics.median([s for one in rounds for s in one.loss_s]),
        "peak_gib": max(one.peak_bytes for one in rounds) / GIB,
        "device": rounds[0].device,
        "started": rounds[0].started,
    }


def _label(cell: Cell) -> str:
    """What stays the same where GPUs are added by data parallelism."""
    parts = cell.layout_name.split("_")
    return " ".join([cell.size, *(part for part in parts if not part.startswith("dp"))])


def _add_reference(row: dict, rows: Sequence[dict], spec: StudySpec) -> None:
    """Add speedup, efficiency, and the layout that they are against.

    strong: the fastest of the fewest GPUs, of the same size and objective. weak: the same layout
    with the fewest data-parallel ranks.
    """
    same = [r for r in rows if (r["size"], r["objective"]) == (row["size"], row["objective"])]
    if spec.mode == "weak":
        same = [r for r in same if r["label"] == row["label"]]
    fewest = min(r["gpus"] for r in same)
    first = min((r for r in same if r["gpus"] == fewest), key=lambda r: r["step_s"])
    row["reference"] = first["layout"]
    if spec.mode == "weak":
        row["speedup"] = None
        row["efficiency"] = speedup(first["step_s"], row["step_s"])
        return
    row["speedup"] = speedup(first["step_s"], row["step_s"])
    row["efficiency"] = strong_efficiency(first["step_s"], fewest, row["step_s"], row["gpus"])


def _add_ratio(row: dict, rows: Sequence[dict], spec: StudySpec) -> None:
    """Add the step's time over that of the first objective: the median over rounds' ratios."""
    first = spec.objectives[0].label
    base = [r for r in rows if (r["size"], r["layout"]) == (row["size"], row["layout"])]
    base = [r for r in base if r["objective"] == first]
    row["ratio_over"] = first
    row["ratio"] = None
    if base and row["objective"] != first:
        pairs = zip(row["round_medians_s"], base[0]["round_medians_s"], strict=True)
        row["ratio"] = statistics.median(own / other for own, other in pairs)


def make_result(
    spec: StudySpec,
    timing: Timing,
    rows: list[dict],
    failed: list[str],
    skipped: list[str],
) -> dict:
    """Return what --json holds: plain values, null for what is not known."""
    is_cpu = any(row["device"] == "CPU" for row in rows)
    return {
        "schema": SCHEMA,
        "name": spec.name,
        "mode": spec.mode,
        "precision": spec.precision,
        "steps": timing.steps,
        "warmup": timing.warmup,
        "rounds": spec.rounds,
        "notes": [*_notes(spec, is_cpu), *_describe_peaks(spec, rows), *_describe_noise(rows)],
        "failed": failed,
        "skipped": skipped,
        "rows": rows,
        "provenance": dict(provenance()),
    }


def _notes(spec: StudySpec, is_cpu: bool) -> list[str]:
    notes = [
        "step: median and quartiles of the seconds Megatron takes from step to step, warm-up left "
        "out; loss: output layer with its loss, forward and backward, of the step",
        "TFLOP/s and MFU: Megatron's count (causal attention, logits), the loss's own products "
        "left out",
        "data: Megatron's mock data, most targets of which are distinct, so that EMO's cost rows "
        "are more than on text",
    ]
    if spec.mode == "strong":
        notes.append("efficiency: S / n with S = t1 / tn, of the fastest layout of fewest GPUs")
    else:
        notes.append("efficiency: t1 / tn, of the same layout with fewest data-parallel ranks")
    if is_cpu:
        notes.append(
            "CPU: ranks share cores and caches; these numbers say nothing of GPUs, MFU means "
            "nothing, memory is the whole process's"
        )
    return notes


def _describe_peaks(spec: StudySpec, rows: Sequence[Mapping]) -> list[str]:
    without = {row["device"] for row in rows if row["mfu"] is None} - {"CPU"}
    return [
        f"MFU: none, no {spec.precision} rate of {device} is known; --peak-tflops gives one"
        for device in sorted(without)
    ]


def _describe_noise(rows: Sequence[Mapping]) -> list[str]:
    noisy = sum(row["spread"] > CALM for row in rows)
    if not noisy:
        return []
    return [
        f"NOISE: in {noisy} of {len(rows)} rows the steps' quartiles are more than {CALM:.0%} of "
        "the median apart: the machine did something else too, and rows do not compare"
    ]


_COLUMNS = (
    ("size", "size", "{}"),
    ("layout", "layout", "{}"),
    ("objective", "objective", "{}"),
    ("GPUs", "gpus", "{}"),
    ("batch", "batch", "{}"),
    ("step s", "step_s", "{:.4g}"),
    ("q1", "step_s_q1", "{:.4g}"),
    ("q3", "step_s_q3", "{:.4g}"),
    ("tokens/s", "tokens_per_s", "{:.4g}"),
    ("/GPU", "tokens_per_s_per_gpu", "{:.4g}"),
    ("TFLOP/s", "tflops_per_gpu", "{:.4g}"),
    ("MFU", "mfu", "{:.1%}"),
    ("S", "speedup", "{:.3f}"),
    ("E", "efficiency", "{:.3f}"),
    ("loss", "loss_share", "{:.1%}"),
    ("ratio", "ratio", "{:.3f}"),
    ("peak GiB", "peak_gib", "{:.3g}"),
)


def format_result(result: Mapping) -> list[str]:
    """Return lines for a reader."""
    lines = align(_COLUMNS, result["rows"]) if result["rows"] else ["nothing was measured"]
    lines += ["", *(f"note       {text}" for text in result["notes"])]
    lines += [f"skipped    {text}" for text in result["skipped"]]
    return lines + [f"FAILED     {text}" for text in result["failed"]]


def layout_of_row(row: Mapping) -> Layout:
    """Return the layout of a row.

    Raises:
        KeyError: the row lacks one of its numbers.
    """
    return Layout(
        gpus=row["gpus"],
        tensor_parallel=row["tensor_parallel"],
        pipeline_parallel=row["pipeline_parallel"],
        context_parallel=row["context_parallel"],
        expert_parallel=row["expert_parallel"],
        micro_batch_size=row["micro_batch_size"],
        distributed_optimizer=row["device"] != "CPU",
        sequence_parallel=row["sequence_parallel"],
        virtual_pipeline=row["virtual_pipeline"],
    )
