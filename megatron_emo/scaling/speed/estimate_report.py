"""Estimates for readers and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_emo.evaluation.records import provenance
from megatron_emo.scaling.counts.devices import GIB
from megatron_emo.scaling.plans.plan_checks import USABLE_MEMORY
from megatron_emo.scaling.plans.plan_report import align
from megatron_emo.scaling.speed.cluster import Cluster
from megatron_emo.scaling.speed.cost_model import list_assumptions
from megatron_emo.scaling.speed.estimate import Estimate, Ranking
from megatron_emo.scaling.speed.throughput_file import StudySpec
from megatron_emo.scaling.speed.throughput_report import LAYOUT_KEYS

SCHEMA = "megatron_emo.scaling_estimate/1"


def describe(one: Estimate, rank: int, peak: float | None) -> dict:
    """Return an estimate's numbers by name; seconds, FLOP/s in TFLOP/s, GiB."""
    layout = one.layout
    return {
        "rank": rank,
        "layout": one.name,
        **{key: getattr(layout, key) for key in LAYOUT_KEYS},
        "sequence_parallel": layout.sequence_parallel,
        "batch": one.batch,
        "step_s": one.step.total,
        "tokens_per_s_per_gpu": one.num_tokens / one.step.total / layout.gpus,
        "tflops_per_gpu": one.flops_per_gpu / 1e12,
        "mfu": None if peak is None else one.flops_per_gpu / peak,
        "memory_gib": one.memory.total / GIB,
        **{f"{name}_s": seconds for name, seconds in vars(one.step).items()},
    }


def describe_ranking(ranking: Ranking, top: int, peak: float | None) -> dict:
    """Return the first `top` estimates, and how many there were."""
    rows = [describe(one, i, peak) for i, one in enumerate(ranking.fitting[:top], 1)]
    return {
        "num_layouts": len(ranking.fitting),
        "rows": rows,
        "too_large": [
            {"layout": one.name, "memory_gib": one.memory.total / GIB} for one in ranking.too_large
        ],
    }


def make_result(
    spec: StudySpec,
    cluster: Cluster,
    rankings: Sequence[Mapping],
    against: Sequence[Mapping],
    summary: Sequence[Mapping],
) -> dict:
    """Return what --json holds."""
    return {
        "schema": SCHEMA,
        "name": spec.name,
        "device": cluster.name,
        "assumptions": [*cluster.assumptions, *list_assumptions(cluster), *_of_study(spec)],
        "rankings": list(rankings),
        "against": list(against),
        "summary": list(summary),
        "provenance": dict(provenance()),
    }


def _of_study(spec: StudySpec) -> list[str]:
    loss = spec.loss
    return [
        f"EMO: {loss.distinct_share:g} distinct targets a token, cost embedding of "
        f"{loss.cost_dim or 'hidden size'} columns of {loss.cost_bytes} bytes, path {loss.path} "
        f"with {loss.workspace_mb} MiB",
        f"memory: Megatron's theoretical formulas and the loss's own part; dropped above "
        f"{USABLE_MEMORY:.0%} of a device's, where that is known",
    ]


_MS = "{:.1f}"
_COLUMNS = (
    ("#", "rank", "{}"),
    ("layout", "layout", "{}"),
    ("step ms", "step", _MS),
    ("tokens/s/GPU", "tokens_per_s_per_gpu", "{:,.0f}"),
    ("TFLOP/s", "tflops_per_gpu", "{:.4g}"),
    ("MFU", "mfu", "{:.1%}"),
    ("GiB", "memory_gib", "{:.1f}"),
    *(
        (name, name, _MS)
        for name in (
            *("compute", "tensor", "context", "expert", "pipeline"),
            *("loss", "bubble", "data", "optimizer"),
        )
    ),
)
_AGAINST = (
    ("size", "size", "{}"),
    ("layout", "layout", "{}"),
    ("objective", "objective", "{}"),
    ("predicted s", "predicted_s", "{:.4g}"),
    ("measured s", "measured_s", "{:.4g}"),
    ("ratio", "ratio", "{:.3f}"),
    ("loss: predicted s", "predicted_loss_s", "{:.4g}"),
    ("measured s", "measured_loss_s", "{:.4g}"),
)
_SHOWN_TOO_LARGE = 5


def format_result(result: Mapping) -> list[str]:
    """Return lines for a reader: rankings with their terms in milliseconds, assumptions."""
    lines: list[str] = []
    for ranking in result["rankings"]:
        lines += [*_format_ranking(ranking), ""]
    if result["against"]:
        lines += [*align(_AGAINST, result["against"]), ""]
    for one in result["summary"]:
        tau = "none" if one["tau"] is None else f"{one['tau']:.2f}"
        verdict = "ranked first" if one["is_best_first"] else "NOT ranked first"
        lines.append(
            f"{one['size']}, {one['objective']}: {one['layouts']} layouts, median ratio "
            f"{one['median_ratio']:.3f}, median error {one['error']:.1%} (scaled "
            f"{one['error_scaled']:.1%}), Kendall tau {tau}; fastest {one['best_measured']} "
            f"{verdict}; the first, {one['best_predicted']}, takes {one['regret']:.1%} longer; "
            f"measured quartiles {one['spread']:.0%} of the median apart"
        )
    return [*lines, *(f"assumed    {text}" for text in result["assumptions"])]


def _format_ranking(ranking: Mapping) -> list[str]:
    rows = [
        row | {name.removesuffix("_s"): 1e3 * row[name] for name in row if name.endswith("_s")}
        for row in ranking["rows"]
    ]
    large = ranking["too_large"]
    shown = ", ".join(
        f"{one['layout']} ({one['memory_gib']:.0f} GiB)" for one in large[:_SHOWN_TOO_LARGE]
    )
    dropped = f"; {len(large)} do not fit: {shown}" if large else ""
    dropped += ", ..." if len(large) > _SHOWN_TOO_LARGE else ""
    head = (
        f"{ranking['size']}, {ranking['objective']}, {ranking['gpus']} GPUs: "
        f"{ranking['num_layouts']} layouts{dropped}; terms in ms"
    )
    return [head, *(align(_COLUMNS, rows) if rows else ["nothing fits"])]
