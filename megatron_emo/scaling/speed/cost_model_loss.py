"""The output layer with its loss, of one microbatch, in seconds: MLE's, and EMO's own terms."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_emo.benchmark.roofline import COST_BYTES, COST_PRODUCTS, LOGITS_BYTES, PRODUCTS
from megatron_emo.scaling.counts.flops import OBJECTIVES
from megatron_emo.scaling.counts.memory import (
    Layout,
    LossMemory,
    microbatch_tokens,
    resolve_loss_path,
)
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.plans.plan_file import LossSettings
from megatron_emo.scaling.speed.cluster import Cluster

_HALF = 2
"""Bytes that the roofline's traffic counts an entry as."""
_CPU_LOGIT_ACCESSES = 22
"""Of each logit, by operators of torch one at a time: a copy, its maximum, exponentials and sums in
blocks, and the gradient's."""
_CPU_COST_ACCESSES = 8
"""Of each logit besides, where costs are."""
_STATISTICS = {False: 16, True: 20}
"""Bytes of a token that a rank hands in; without and with a cost."""


@dataclass(frozen=True)
class LossTerms:
    """What a loss computes for a microbatch of a rank."""

    path: str
    """logits, recompute or forward."""
    num_distinct: int = 0
    """U, 0 without a cost."""
    cost_dim: int = 0
    """D."""
    cost_bytes: int = 4
    workspace_mb: int = 512

    @property
    def memory(self) -> LossMemory:
        return LossMemory(
            self.path, self.num_distinct, self.cost_dim, self.cost_bytes, self.workspace_mb
        )


def make_loss_terms(
    shape: ModelShape, layout: Layout, objective: str, settings: LossSettings, vocab_size: int
) -> LossTerms:
    """Return the terms of an objective (its name in OBJECTIVES)."""
    distinct = cost_dim = 0
    if OBJECTIVES[objective]:
        distinct = settings.num_distinct(microbatch_tokens(shape, layout), vocab_size)
        cost_dim = settings.cost_dim or shape.hidden_size
    path = resolve_loss_path(settings.path, shape, layout, distinct, settings.workspace_mb)
    return LossTerms(path, distinct, cost_dim, settings.cost_bytes, settings.workspace_mb)


def cost_of_loss(
    shape: ModelShape, layout: Layout, loss: LossTerms, cluster: Cluster, hidden_by: float
) -> float:
    """Return seconds of a microbatch, forward and backward.

    Products of N h V/tp and U D V/tp as docs/performance.md has them, traffic over logits and cost
    rows, and collectives over tensor-parallel ranks.

    Args:
        cluster: after `Cluster.of_ranks`.
        hidden_by: seconds of the forward, under which the targets' rows are fetched.
    """
    tokens, hidden = microbatch_tokens(shape, layout), shape.hidden_size
    vocab = shape.padded_vocab_size / layout.tensor_parallel
    product = cluster.product(tokens, vocab, hidden, cluster.loss_flops)
    rows = 0.0
    if loss.num_distinct:
        rate = cluster.table_flops if loss.cost_bytes == 1 else cluster.loss_flops
        rows = cluster.product(loss.num_distinct, vocab, loss.cost_dim, rate)
    seconds = PRODUCTS[loss.path] * product + COST_PRODUCTS[loss.path] * rows
    seconds += _traffic(loss, tokens, vocab, hidden, cluster)
    return seconds + _collectives(shape, layout, loss, cluster, product, hidden_by)


def _traffic(loss: LossTerms, tokens: float, vocab: float, hidden: int, cluster: Cluster) -> float:
    if not cluster.is_cpu:
        moved = vocab * (tokens * LOGITS_BYTES + loss.num_distinct * COST_BYTES[loss.path])
        return cluster.passes(moved, 20)
    accesses = _CPU_LOGIT_ACCESSES + (_CPU_COST_ACCESSES if loss.num_distinct else 0)
    rows = COST_BYTES[loss.path] / _HALF * loss.num_distinct
    weights = 20 * vocab * hidden  # the gradient, and its sum over microbatches
    moved = cluster.itemsize * vocab * (tokens * accesses + rows) + weights
    return cluster.passes(moved, 100)


def _collectives(
    shape: ModelShape,
    layout: Layout,
    loss: LossTerms,
    cluster: Cluster,
    product: float,
    hidden_by: float,
) -> float:
    """Cost rows under the forward, statistics, hidden states under sequence parallelism, dX."""
    tp, tokens = layout.tensor_parallel, microbatch_tokens(shape, layout)
    if tp == 1:
        return 0.0
    states = tokens * shape.hidden_size * cluster.itemsize
    fetched = cluster.all_reduce(loss.num_distinct * loss.cost_dim * loss.cost_bytes, tp)
    if not loss.num_distinct:
        fetched = 0.0
    statistics = _STATISTICS[loss.num_distinct > 0] * tokens
    seconds = cluster.all_gather(tp * statistics, tp)
    if layout.sequence_parallel:
        seconds += 2 * cluster.all_gather(states, tp)
        gradient = cluster.reduce_scatter(states, tp)
    else:
        gradient = cluster.all_reduce(states, tp)
    if cluster.is_cpu:
        return seconds + fetched + gradient
    return seconds + max(0.0, fetched - hidden_by) + max(0.0, gradient - product)
