"""What a comparison leaves behind: one JSON file, and lines for a reader."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_emo.evaluation.records import hash_file, provenance
from megatron_emo.scaling.comparison.compare import Comparison, Estimate, Group
from megatron_emo.scaling.comparison.decisions import Decision, Target
from megatron_emo.scaling.comparison.downstream import MetricComparison
from megatron_emo.scaling.comparison.speedup import floors, pair_differences, pair_speedups

SCHEMA = "megatron_emo.scaling_compare/1"


def make_result(
    args: argparse.Namespace,
    comparisons: Sequence[Comparison],
    decisions: tuple[list[Target], list[Decision]] | None,
    metrics: Mapping[str, Sequence[MetricComparison]],
    notes: Sequence[str],
) -> dict:
    """Return what --json holds: plain values, null for what cannot be said.

    Args:
        args: the flags of `compare_command`.
        metrics: by objective.
    """
    result = {
        "schema": SCHEMA,
        "baseline": args.baseline,
        "law": comparisons[0].law.to_json(),
        "law_from": args.law and Path(args.law).name,
        "level": args.level,
        "draws": args.bootstrap,
        "seed": args.seed,
        "notes": list(notes),
        "objectives": [
            {**_comparison_json(found), "metrics": [asdict(m) for m in metrics.get(found.name, ())]}
            for found in comparisons
        ],
        "decisions": None,
        "csv": {Path(args.csv).name: hash_file(args.csv)},
        "columns": args.columns,
        "provenance": dict(provenance()),
    }
    if decisions:
        result["decisions"] = {
            "target": [
                {**asdict(target), "is_decided": target.is_decided} for target in decisions[0]
            ],
            "sizes": [asdict(decision) for decision in decisions[1]],
        }
    return _plain(result)


def _comparison_json(found: Comparison) -> dict:
    pairs = found.pairs
    rows = {
        "lines": pairs.base.lines,
        "other_lines": pairs.other.lines,
        "params": pairs.base.params,
        "floor": floors(found.law, pairs.base.params),
        "loss": pairs.base.loss,
        "other_loss": pairs.other.loss,
    }
    for what, values in (("difference", pair_differences), ("speedup", pair_speedups)):
        rows |= {f"{what}_{name}": v for name, v in values(pairs, found.law).items()}
    return {
        "objective": found.name,
        "n": len(pairs),
        "overall": asdict(found.overall),
        "sizes": [asdict(group) for group in found.sizes],
        "budgets": [asdict(group) for group in found.budgets],
        "trends": [asdict(trend) for trend in found.trends],
        "frontiers": found.frontiers and asdict(found.frontiers),
        "unpaired_lines": found.pairs.unpaired,
        "undefined_lines": found.undefined,
        "resampled": found.resampled,
        "failed_draws": found.failures,
        "notes": found.notes,
        "pairs": {name: values.tolist() for name, values in rows.items()},
    }


def _plain(value):
    """JSON has no NaN: what cannot be said is null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_comparison(found: Comparison, baseline: str, level: float) -> list[str]:
    """Return lines for a reader."""
    law = found.law
    lines = [
        f"{found.name} against {baseline}: {len(found.pairs)} pairs, {level:.0%} intervals of "
        f"resampled {found.resampled}",
        f"law of {baseline}: E {law.E:.4g}, alpha {law.alpha:.4g}, beta {law.beta:.4g}, "
        f"A {law.A:.4g}, B {law.B:.4g}",
        "",
    ]
    resources = list(found.overall.differences)
    lines += _group_table((found.overall, *found.sizes, *found.budgets), resources)
    if found.frontiers:
        best = found.frontiers
        lines.append(
            f"best sizes {best.speedup:.3f} [{best.interval.low:.3f}, {best.interval.high:.3f}] "
            f"times the FLOPs ({best.num_optima[0]} and {best.num_optima[1]} optima)"
        )
    for trend in found.trends:
        slope = trend.per_decade_interval
        read = ", ".join(
            f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}] at C = {flops:.3g}"
            for flops, value, interval in trend.at
        )
        lines.append(
            f"trend      {trend.resource}: x {trend.per_decade:.3f} [{slope.low:.3f}, "
            f"{slope.high:.3f}] a decade of C; {read}"
        )
    lines += [f"note       {note}" for note in found.notes]
    if found.pairs.unpaired:
        lines.append(f"WARNING    without a partner: lines {_shown(found.pairs.unpaired)}")
    if found.undefined:
        lines.append(
            f"WARNING    no speedup, a loss not above its size's floor: lines "
            f"{_shown(found.undefined)}"
        )
    lines += [f"WARNING    {n} draws: {reason}" for reason, n in found.failures.items()]
    if found.lawless:
        lines.append(f"WARNING    {found.describe_lost()[0]}")
    return lines


def _shown(lines: Sequence[int]) -> str:
    text = ", ".join(map(str, lines[:10]))
    return text + (f" and {len(lines) - 10} more" if len(lines) > 10 else "")


def _group_table(groups: Sequence[Group], resources: Sequence[str]) -> list[str]:
    head = ["pairs of", "n", *(f"loss at equal {r}" for r in resources)]
    head += [f"speedup in {r}" for r in resources]
    has_documents = groups[0].documents is not None
    cells = [head + ["by document"] * has_documents]
    for group in groups:
        row = [group.name, str(group.differences["tokens"].n)]
        row += [_estimate(group.differences[r], "{:+.4f}") for r in resources]
        row += [_estimate(group.speedups[r], "{:.3f}") for r in resources]
        cells.append(row + [_estimate(group.documents, "{:+.4f}")] * has_documents)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _estimate(found: Estimate | None, form: str) -> str:
    if found is None or found.value is None:
        return "-"
    text = form.format(found.value)
    if found.interval is None:
        return text
    return f"{text} [{form.format(found.interval.low)}, {form.format(found.interval.high)}]"


def format_decisions(targets: Sequence[Target], decisions: Sequence[Decision]) -> list[str]:
    """Return lines for a reader."""
    lines = []
    for target in targets:
        doubt = "" if target.is_decided else " (undecided: 0 is within its interval)"
        lines.append(
            f"target     {target.name}: {target.difference:+.4f} nats/token at the largest size"
            f"{doubt}"
        )
    return lines + [
        f"decision   N = {found.params:.3g}: {found.accuracy:.0%} of {found.n} pairs choose alike "
        f"[{found.interval.low:.0%}, {found.interval.high:.0%}]"
        for found in decisions
    ]


def format_metrics(metrics: Sequence[MetricComparison]) -> list[str]:
    """Return lines for a reader."""
    lines = []
    for m in metrics:
        spread = f" [{m.interval.low:+.4g}, {m.interval.high:+.4g}]" if m.interval else ""
        equal = m.at_equal_loss_interval
        lines.append(
            f"metric     {m.metric} ({m.unit}): {m.difference:+.4g}{spread} over {m.n} pairs; at "
            f"equal loss {m.at_equal_loss:+.4g} [{equal.low:+.4g}, {equal.high:+.4g}]"
        )
    return lines
