"""This package's own variants: objective x path x dtype of the table."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from megatron_emo.benchmark.problem import MeanLoss, Problem
from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import Objective, build_objective

PATHS = ("logits", "recompute", "forward")

_FP8 = {
    "tolerances": {("fp32", "cuda"): 1e-3},
    "note": "tensor cores add fp8 products up in about 14 bits, so fp32 on a GPU is held to 1e-3",
}


def logits_loss(objective_name: str, table: str, problem: Problem) -> MeanLoss:
    """The output layer as it is, and `vocab_parallel_loss` on its logits."""
    objective = build_objective(objective_name)
    cost_embedding = _cost_embedding(objective, table, problem)

    def loss() -> Tensor:
        return vocab_parallel_loss(
            F.linear(problem.hidden, problem.weight),
            problem.target,
            objective,
            cost_embedding,
            tp_group=problem.tp_group,
            cost_embedding_is_normalized=True,
        ).loss.mean()

    return loss


def fused_loss(objective_name: str, path: str, table: str, problem: Problem) -> MeanLoss:
    """`fused_linear_loss` on one of its paths."""
    objective = build_objective(objective_name)
    cost_embedding = _cost_embedding(objective, table, problem)

    def loss() -> Tensor:
        return fused_linear_loss(
            problem.hidden,
            problem.weight,
            problem.target,
            objective,
            cost_embedding,
            tp_group=problem.tp_group,
            path=path,
            workspace_mb=problem.workspace_mb,
            cost_embedding_is_normalized=True,
        ).loss.mean()

    return loss


def own_rows() -> list[dict]:
    """Return the fields of a `Variant` for every row, with its name."""
    # MLE first: a path's baseline stands above what is compared with it.
    kinds = (("mle", ""), ("emo1", ""), ("emo1", "fp8"))
    rows = []
    for path in ("", *PATHS):
        layer = f"fused-{path}" if path else "logits"
        for objective, table in kinds:
            build = (
                partial(fused_loss, objective, path, table)
                if path
                else partial(logits_loss, objective, table)
            )
            rows.append(
                {
                    "name": "-".join(filter(None, (objective, layer, table))),
                    "build": build,
                    "objective": objective,
                    # The same path without a cost, and what a user has without this package.
                    "baselines": (f"mle-{layer}", "torch-ce"),
                    "path": path or "logits",
                    "is_fused": bool(path),
                    "table": table,
                    **(_FP8 if table == "fp8" else {}),
                }
            )
    return rows


def _cost_embedding(objective: Objective, table: str, problem: Problem) -> Tensor | None:
    if not objective.uses_cost:
        return None
    return problem.fp8_cost_embedding if table == "fp8" else problem.cost_embedding
