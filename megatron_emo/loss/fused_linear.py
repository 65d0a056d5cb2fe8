"""The loss of each token from hidden states: logits formed a chunk at a time.

The output layer z = x W^T, the loss and both gradients in one function, so that what lives through
the forward is a choice, the path:

    logits      keeps the logits, and overwrites them with their gradient in the backward
    recompute   keeps nothing of size [N, V/tp]; forms logits and costs again in the backward
    forward     forms the gradients in the forward, for an upstream gradient that is loss_mask times
                one scalar; looks at the real one and falls back to recompute where it is not

Tokens are worked off in the order of their targets, so that each cost row is formed once for all
tokens that share it, and masked tokens are left out before the first product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.config import LossPathConfig
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.loss.checks import check_inputs, check_targets
from megatron_emo.loss.kernels import row_gradient, row_statistics
from megatron_emo.loss.statistics import (
    LossOutput,
    Shard,
    TokenGradient,
    TokenStatistics,
    apply_objective,
    full_vocab_size,
    gather_statistics,
    locate,
    make_shard,
    merge_statistics,
    num_statistics,
    token_gradient,
)
from megatron_emo.loss.target_cost import cost_of_targets, gather_target_rows
from megatron_emo.objectives import Objective

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Most that one chunk of logits takes: products gain nothing from larger ones."""


class _Plan(NamedTuple):
    """What is to be computed, without the tensors that carry gradient; tokens in target order."""

    target: Tensor
    """[N] counted tokens, ascending."""
    mask: Tensor
    """[N] their loss_mask."""
    cost_row: Tensor
    """[N] which distinct target each has, ascending."""
    target_rows: Tensor | None
    """[U, D] unit rows of the distinct targets."""
    unit_embedding: Tensor | None
    """[V/tp, D]."""
    objective: Objective
    shard: Shard
    chunks: list[slice]
    compute_dtype: torch.dtype
    with_entropy: bool
    reduce_hidden_grad: bool

    @property
    def has_cost(self) -> bool:
        return self.unit_embedding is not None


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    cost_embedding: Tensor | None = None,
    loss_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    path: str = "auto",
    workspace_mb: int = 512,
    *,
    vocab_size: int | None = None,
    cost_embedding_is_normalized: bool = False,
    check_target: bool = True,
    return_entropy: bool = False,
    reduce_hidden_grad: bool = True,
) -> LossOutput:
    """Return what `vocab_parallel_loss` returns for the logits hidden @ weight.T, without keeping
    them.

    Statistics are fp32 (fp64 for fp64), gradients are accumulated over chunks in fp32 and rounded
    once, inputs are not written to. Collectives over tp_group: in the forward one all-reduce of the
    cost rows [U, D] and one all-gather of 3 to 5 numbers per token (on the path `forward` one
    all-gather per chunk); in the backward one all-reduce of the hidden states' gradient [N, h],
    on the path `forward` in the forward.

    Args:
        hidden: [..., h], the same on all ranks of tp_group.
        weight: this rank's rows of the output layer [V/tp, h], in hidden's dtype.
        target, objective, cost_embedding, loss_mask, tp_group: as in `vocab_parallel_loss`.
        path: logits, recompute, forward; auto takes logits where logits and cost rows fit
            workspace_mb, else recompute.
        workspace_mb: bound on what a chunk takes, in MiB.
        reduce_hidden_grad: sum hidden's gradient over tp_group; off where the caller
            reduce-scatters it, as under sequence parallelism.

    Raises:
        ValueError: as `vocab_parallel_loss`, an unknown path, or a workspace below one row.
        RuntimeError: a second backward on the path logits, whose logits are gone.
    """
    LossPathConfig(path, workspace_mb)  # checks both
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: expected [V/tp, {hidden.shape[-1]}] in {hidden.dtype}, "
            f"got {list(weight.shape)} in {weight.dtype}"
        )
    shard = make_shard(weight.shape[0], tp_group)
    check_inputs(hidden, target, objective, cost_embedding, loss_mask, shard)
    flat_target = target.reshape(-1)
    mask = torch.ones_like(flat_target) if loss_mask is None else loss_mask.reshape(-1)
    if check_target:
        check_targets(flat_target, mask != 0, vocab_size or full_vocab_size(shard))
    # Ids that count, in the order of their targets.
    order = torch.argsort(flat_target, stable=True)
    order = order[mask[order] != 0]

    if cost_embedding is not None:
        cost_embedding = cost_embedding.detach()
        if not cost_embedding_is_normalized:
            cost_embedding = unit_rows(cost_embedding)
    plan = _make_plan(
        hidden, flat_target[order], mask[order], objective, cost_embedding, shard, workspace_mb
    )
    plan = plan._replace(with_entropy=return_entropy, reduce_hidden_grad=reduce_hidden_grad)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if path == "auto":
        path = _choose_path(plan, hidden, workspace_mb)
    if not needs_grad:
        path = "recompute"  # nothing is kept, and no backward will ask for it
    results = _FusedLinearLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, order), weight, plan, path
    )

    def restore(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(len(flat_target)).index_copy(0, order, values).view(target.shape)

    return LossOutput(*(restore(values) for values in results))


def _make_plan(
    hidden: Tensor,
    target: Tensor,
    mask: Tensor,
    objective: Objective,
    unit_embedding: Tensor | None,
    shard: Shard,
    workspace_mb: int,
) -> _Plan:
    compute_dtype = torch.promote_types(hidden.dtype, torch.float32)
    distinct, cost_row = torch.unique_consecutive(target, return_inverse=True)
    target_rows = None
    # A row takes its logits, at worst a cost row of its own, and narrow logits a wide copy.
    row_bytes = shard.partition_vocab_size * compute_dtype.itemsize
    if unit_embedding is not None:
        target_rows = gather_target_rows(distinct, unit_embedding, shard)
        row_bytes *= 2
    budget = min(workspace_mb << 20, _CHUNK_BYTES.get(hidden.device.type, 512 << 20))
    rows = max(1, budget // row_bytes)
    if row_bytes > workspace_mb << 20:
        raise ValueError(
            f"workspace_mb: expected at least {-(-row_bytes // (1 << 20))} MiB, the size of one "
            f"token's row, got {workspace_mb}"
        )
    chunks = [slice(i, min(i + rows, len(target))) for i in range(0, len(target), rows)]
    return _Plan(
        target,
        mask.to(compute_dtype),
        cost_row,
        target_rows,
        unit_embedding,
        objective,
        shard,
        chunks,
        compute_dtype,
        with_entropy=False,
        reduce_hidden_grad=True,
    )


def bytes_kept_with_logits(
    num_tokens: int, num_distinct: int, partition_vocab_size: int, logits_itemsize: int
) -> int:
    """Return what the path logits keeps for the backward: logits, and cost rows in fp32."""
    return partition_vocab_size * (num_tokens * logits_itemsize + num_distinct * 4)


def _choose_path(plan: _Plan, hidden: Tensor, workspace_mb: int) -> str:
    num_distinct = len(plan.target_rows) if plan.has_cost else 0
    kept = bytes_kept_with_logits(
        len(plan.target), num_distinct, plan.shard.partition_vocab_size, hidden.element_size()
    )
    return "logits" if kept <= workspace_mb << 20 else "recompute"


def _chunk_cost(plan: _Plan, rows: slice) -> tuple[Tensor | None, Tensor | None]:
    """Return (costs of the chunk's distinct targets [u, V/tp], which of them each token has)."""
    if not plan.has_cost:
        return None, None
    cost_row = plan.cost_row[rows]
    first, last = int(cost_row[0]), int(cost_row[-1])
    targets = plan.target_rows[first : last + 1]
    return cost_of_targets(targets, plan.unit_embedding, plan.compute_dtype), cost_row - first


class _Kept(NamedTuple):
    """What the path logits keeps for the backward."""

    logits: Tensor
    """[N, V/tp] in hidden's dtype."""
    costs: list[tuple[Tensor | None, Tensor | None]]
    """Those of each chunk."""


class _Gradients:
    """Gradients of hidden states and weight, gathered over chunks in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, plan: _Plan, needs: tuple[bool, bool]):
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=plan.compute_dtype) if needs[1] else None
        self.plan = plan

    def add(self, grad_z: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
        """Add a chunk's share; grad_z [n, V/tp] in the inputs' dtype."""
        if self.hidden is not None:
            torch.mm(grad_z, weight, out=self.hidden[rows])
        if self.weight is not None:
            wide = self.plan.compute_dtype
            self.weight.addmm_(grad_z.T.to(wide), hidden[rows].to(wide))

    def reduce(self) -> None:
        """Sum hidden's gradient over the vocabulary's shards; one all-reduce."""
        group = self.plan.shard.tp_group
        if self.hidden is not None and group is not None and self.plan.reduce_hidden_grad:
            dist.all_reduce(self.hidden, group=group)


def _statistics_of_all(
    hidden: Tensor, weight: Tensor, plan: _Plan, kept: _Kept | None
) -> TokenStatistics:
    """Return every token's statistics; one all-gather. Fills `kept` where there is one."""
    count = num_statistics(plan.has_cost, plan.with_entropy)
    local = torch.empty(count, len(hidden), dtype=plan.compute_dtype, device=hidden.device)
    for rows in plan.chunks:
        out = None if kept is None else kept.logits[rows]
        z = torch.mm(hidden[rows], weight.T, out=out)
        cost = _chunk_cost(plan, rows)
        columns = locate(plan.target[rows], plan.shard)
        local[:, rows] = row_statistics(
            z, columns, *cost, plan.with_entropy, overwrite=kept is None
        )
        if kept is not None:
            kept.costs.append(cost)
    gathered = gather_statistics(local, plan.shard)
    return merge_statistics(gathered, plan.has_cost, plan.with_entropy)


def _backward_of_all(
    hidden: Tensor,
    weight: Tensor,
    plan: _Plan,
    token: TokenGradient,
    kept: _Kept | None,
    needs: tuple[bool, bool],
) -> _Gradients:
    gradients = _Gradients(hidden, weight, plan, needs)
    for index, rows in enumerate(plan.chunks):
        z = torch.mm(hidden[rows], weight.T) if kept is None else kept.logits[rows]
        cost = _chunk_cost(plan, rows) if kept is None else kept.costs[index]
        columns = locate(plan.target[rows], plan.shard)
        grad_z = row_gradient(z, z, columns, token.rows(rows), *cost)
        gradients.add(grad_z, hidden, weight, rows)
    gradients.reduce()
    return gradients


def _forward_with_gradients(
    hidden: Tensor, weight: Tensor, plan: _Plan, needs: tuple[bool, bool]
) -> tuple[TokenStatistics, _Gradients]:
    """Return statistics, and gradients for an upstream gradient equal to the mask."""
    gradients = _Gradients(hidden, weight, plan, needs)
    parts = []
    for rows in plan.chunks:
        z = torch.mm(hidden[rows], weight.T)
        cost = _chunk_cost(plan, rows)
        columns = locate(plan.target[rows], plan.shard)
        local = row_statistics(z, columns, *cost, plan.with_entropy)
        gathered = gather_statistics(local, plan.shard)
        stats = merge_statistics(gathered, plan.has_cost, plan.with_entropy)
        _, mle_weight, emo_weight = apply_objective(stats, plan.objective)
        token = token_gradient(stats, mle_weight, emo_weight, plan.mask[rows])
        grad_z = row_gradient(z, z, columns, token, *cost)
        gradients.add(grad_z, hidden, weight, rows)
        parts.append(stats)
    gradients.reduce()
    merged = [None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)]
    return TokenStatistics(*merged), gradients


class _FusedLinearLoss(torch.autograd.Function):
    """hidden [N, h] in target order, counted tokens only; weight [V/tp, h]."""

    @staticmethod
    def forward(ctx, hidden, weight, plan, path):
        kept = _Kept(hidden.new_empty(len(hidden), len(weight)), []) if path == "logits" else None
        gradients = None
        needs = ctx.needs_input_grad[:2]
        if not plan.chunks:
            empty = hidden.new_zeros(0, dtype=plan.compute_dtype)
            stats = TokenStatistics(*[empty] * 4, empty if plan.with_entropy else None)
        elif path == "forward":
            stats, gradients = _forward_with_gradients(hidden, weight, plan, needs)
        else:
            stats = _statistics_of_all(hidden, weight, plan, kept)
        outputs, mle_weight, emo_weight = apply_objective(stats, plan.objective)
        ctx.save_for_backward(hidden, weight, *stats[:4], mle_weight, emo_weight)
        ctx.plan, ctx.path, ctx.kept, ctx.gradients = plan, path, kept, gradients
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        hidden, weight, *stats, mle_weight, emo_weight = ctx.saved_tensors
        plan, gradients = ctx.plan, ctx.gradients
        scale = _uniform_scale(grad_loss, plan.mask) if gradients is not None else None
        if scale is None:
            if ctx.path == "logits":
                if ctx.kept is None:
                    raise RuntimeError(
                        "fused_linear_loss: a second backward on the path logits, whose logits the "
                        "first one overwrote; use path='recompute'"
                    )
            stats = TokenStatistics(*stats, entropy=None)
            token = token_gradient(stats, mle_weight, emo_weight, grad_loss)
            gradients = _backward_of_all(
                hidden, weight, plan, token, ctx.kept, ctx.needs_input_grad[:2]
            )
            ctx.kept, scale = None, 1.0
        results = [
            None if x is None else (x * scale).to(like.dtype)
            for x, like in ((gradients.hidden, hidden), (gradients.weight, weight))
        ]
        return (*results, None, None)


def _uniform_scale(grad_loss: Tensor, mask: Tensor) -> Tensor | None:
    """Return s where grad_loss is s * mask exactly, else None; one device synchronisation."""
    if len(mask) == 0:
        return None
    scale = grad_loss[0] / mask[0]
    return scale if torch.equal(scale * mask, grad_loss) else None
