"""Estimates beside what a throughput study measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.speed.cluster import Cluster
from megatron_emo.scaling.speed.estimate import estimate_layout
from megatron_emo.scaling.speed.throughput_file import StudySpec
from megatron_emo.scaling.speed.throughput_report import layout_of_row


def compare_measured(spec: StudySpec, rows: Sequence[Mapping], cluster: Cluster) -> list[dict]:
    """Return a row for each measured layout: expected and measured seconds, and their ratio.

    Raises:
        PlanError: a size or objective that the file does not have.
    """
    objectives = {objective.label: objective for objective in spec.objectives}
    found = []
    for row in rows:
        for key, known in (("size", spec.sizes), ("objective", objectives)):
            if row[key] not in known:
                raise PlanError(
                    f"--against: {key} {row[key]!r}: expected one of the plan's {', '.join(known)}"
                )
        layout, objective = layout_of_row(row), objectives[row["objective"]]
        one = estimate_layout(spec, row["size"], objective, layout, cluster)
        if one.batch != row["batch"]:
            raise PlanError(
                f"--against: {row['layout']}: batch: expected the plan's {one.batch}, got "
                f"{row['batch']}"
            )
        found.append(
            {
                "size": row["size"],
                "layout": row["layout"],
                "objective": row["objective"],
                "gpus": row["gpus"],
                "predicted_s": one.step.total,
                "measured_s": row["step_s"],
                "spread": row["spread"],
                "ratio": one.step.total / row["step_s"],
                "predicted_loss_s": one.step.loss,
                "measured_loss_s": row["loss_s"],
            }
        )
    return found


def summarise_comparison(rows: Sequence[Mapping]) -> list[dict]:
    """Return for each size and objective how far and how well ranked its layouts are.

    error: the median of |predicted / measured - 1|. error_scaled: the same once all predictions
    are divided by the median ratio, as on a machine that is busy with something else. tau:
    Kendall's tau-b of predicted and measured times. regret: how much longer the layout takes that
    was ranked first than the one that was fastest. spread: the median over layouts of the measured
    steps' interquartile range over their median, below which no difference means anything.
    """
    from scipy.stats import kendalltau

    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["objective"]), []).append(row)
    found = []
    for (size, objective), own in groups.items():
        scale = statistics.median(row["ratio"] for row in own)
        first = min(own, key=lambda row: row["predicted_s"])
        best = min(own, key=lambda row: row["measured_s"])
        many = len(own) > 1
        pairs = [row["predicted_s"] for row in own], [row["measured_s"] for row in own]
        found.append(
            {
                "size": size,
                "objective": objective,
                "layouts": len(own),
                "median_ratio": scale,
                "error": statistics.median(abs(row["ratio"] - 1) for row in own),
                "error_scaled": statistics.median(abs(row["ratio"] / scale - 1) for row in own),
                "tau": float(kendalltau(*pairs).statistic) if many else None,
                "best_predicted": first["layout"],
                "best_measured": best["layout"],
                "is_best_first": first["layout"] == best["layout"],
                "spread": statistics.median(row["spread"] for row in own),
                "regret": first["measured_s"] / best["measured_s"] - 1,
            }
        )
    return found
