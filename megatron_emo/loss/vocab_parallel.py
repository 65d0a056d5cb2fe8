"""The loss of each token from this rank's shard of the logits.

With z the logits, q = softmax(z) over the whole vocabulary and c_j the cost of token j for the
target t,

    m = log(sum_j e^{z_j}) - z_t        d = sum_{j != t} q_j c_j

are formed from four sums per rank that one all-gather merges. d is accumulated directly: the equal
form 1 - <e_t, sum_j q_j e_j> cancels once q_t is near 1 (a relative error of 0.08 at q_t = 0.99 in
bf16).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.cost_embedding import unit_rows
from megatron_emo.objectives import Objective

_WORKSPACE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Size of one fp32 working copy of logits rows: within cache on a CPU, large enough to fill a
GPU."""

_EXP_UNDERFLOW = -1e4
"""exp is 0 here in every dtype; keeps 0 * z from being 0 * -inf."""


class LossOutput(NamedTuple):
    """Per-token results in the target's shape, fp32 (fp64 for fp64 logits), 0 where masked.

    Gradient flows through `loss` alone.
    """

    loss: Tensor
    """The objective, unreduced."""
    mle_loss: Tensor
    """m, cross-entropy in nats."""
    emo_loss: Tensor
    """d, expected cost in [0, 2]; 0 without a cost embedding."""
    weight: Tensor
    """The objective's dynamic weight (see `Objective.dynamic_weight`)."""
    entropy: Tensor | None
    """Entropy of q in nats, when asked for."""


class _Shard(NamedTuple):
    """Where this rank's part of the vocabulary lies; plain values for the autograd function."""

    vocab_start_index: int
    tp_group: dist.ProcessGroup | None


def vocab_parallel_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    objective: Objective,
    cost_embedding: Tensor | None = None,
    loss_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    cost_embedding_is_normalized: bool = False,
    check_target: bool = True,
    return_entropy: bool = False,
) -> LossOutput:
    """Return the objective's loss for each token from vocabulary-sharded logits.

    Statistics and gradient are computed in fp32 (fp64 for fp64 logits); the gradient has the
    logits' dtype; no input is written to. A token whose loss_mask is 0 gives exactly 0 loss and
    gradient, whatever its logits and target hold. The loss is not multiplied by the mask:
    fractional masks weigh it outside.

    Collectives over tp_group, none when it has one rank: one all-reduce of the cost rows of the
    distinct targets [U, D], only with a cost embedding and dependent on labels alone, and one
    all-gather of 4 numbers per token (max, sum-exp, sum-exp-cost, target logit; 3 without a cost
    embedding, one more for the entropy), merged in rank order, so that all ranks hold the same
    bits. The backward has none.

    Args:
        vocab_parallel_logits: this rank's logits [..., V/tp], such as [s, b, V/tp]; fp64, fp32,
            bf16 or fp16.
        target: global token ids of shape vocab_parallel_logits.shape[:-1], the same on all ranks.
        objective: from `build_objective`.
        cost_embedding: this rank's rows [V/tp, D] of the frozen cost table, any float dtype and
            width. Zero rows, such as vocabulary padding, cost 1. Never receives gradient.
        loss_mask: target's shape; 0 leaves a token out, anything else keeps it. None keeps all.
        tp_group: the ranks that share the vocabulary, in vocabulary order; None for one rank.
        vocab_size: real vocabulary, at most V; targets must lie below it. None for V.
        cost_embedding_is_normalized: rows have norm 1 or 0; saves one pass over the shard.
        check_target: refuse bad targets, at the price of one device synchronisation.
        return_entropy: also give the entropy of q.

    Raises:
        ValueError: shapes or dtypes that do not fit, a missing cost embedding, or targets outside
            [0, vocab_size) where the mask keeps them (with their count and the first).
    """
    partition_vocab_size = vocab_parallel_logits.shape[-1]
    tp_rank, tp_size = (dist.get_rank(tp_group), tp_group.size()) if tp_group else (0, 1)
    _check_inputs(vocab_parallel_logits, target, objective, cost_embedding, loss_mask)
    shard = _Shard(tp_rank * partition_vocab_size, tp_group if tp_size > 1 else None)

    flat_target = target.reshape(-1)
    keep = None if loss_mask is None else loss_mask.reshape(-1) != 0
    if check_target:
        _check_target(flat_target, keep, vocab_size or tp_size * partition_vocab_size)
    # Masked targets may be -100; row 0 stands in, its loss and gradient are dropped.
    flat_target = flat_target if keep is None else torch.where(keep, flat_target, 0)

    compute_dtype = torch.promote_types(vocab_parallel_logits.dtype, torch.float32)
    cost, cost_row = None, None
    if cost_embedding is not None:
        cost_embedding = cost_embedding.detach()
        if not cost_embedding_is_normalized:
            cost_embedding = unit_rows(cost_embedding)
        distinct, cost_row = torch.unique(flat_target, return_inverse=True)
        cost = _cost_of_targets(distinct, cost_embedding, shard, compute_dtype)

    results = _VocabParallelLoss.apply(
        vocab_parallel_logits.reshape(-1, partition_vocab_size),
        flat_target,
        keep,
        cost,
        cost_row,
        objective,
        shard,
        return_entropy,
    )
    return LossOutput(*(x if x is None else x.view(target.shape) for x in results))


def _check_inputs(
    logits: Tensor,
    target: Tensor,
    objective: Objective,
    cost_embedding: Tensor | None,
    loss_mask: Tensor | None,
) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"vocab_parallel_logits: expected a float dtype, got {logits.dtype}")
    if target.shape != logits.shape[:-1] or target.is_floating_point():
        raise ValueError(
            f"target: expected integers of shape {tuple(logits.shape[:-1])}, "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    if loss_mask is not None and loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask: expected shape {tuple(target.shape)}, got {tuple(loss_mask.shape)}"
        )
    if cost_embedding is None:
        if objective.uses_cost:
            raise ValueError(f"cost_embedding: objective {objective.name} needs one, got None")
    elif cost_embedding.dim() != 2 or cost_embedding.shape[0] != logits.shape[-1]:
        raise ValueError(
            f"cost_embedding: expected [{logits.shape[-1]}, D], one row per logit of this rank, "
            f"got {list(cost_embedding.shape)}"
        )


def _check_target(target: Tensor, keep: Tensor | None, vocab_size: int) -> None:
    outside = (target < 0) | (target >= vocab_size)
    if keep is not None:
        outside &= keep
    count = int(outside.sum())
    if count:
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"target: expected ids in [0, {vocab_size}) where loss_mask is not 0, "
            f"got {count} outside, the first {int(target[first])} at flat position {first}"
        )


def _owned_columns(token_ids: Tensor, shard: _Shard, partition_vocab_size: int):
    """Return (column clamped into this shard [N, 1], whether this shard owns the id [N, 1])."""
    column = (token_ids - shard.vocab_start_index)[:, None]
    owned = (column >= 0) & (column < partition_vocab_size)
    return column.clamp(0, partition_vocab_size - 1), owned


def _cost_of_targets(
    distinct: Tensor, unit_embedding: Tensor, shard: _Shard, compute_dtype: torch.dtype
) -> Tensor:
    """Return the cost [U, V/tp] of every token of this shard for each distinct target.

    One all-reduce of [U, D]: adding zeros to the owner's row is exact in any dtype.
    """
    partition_vocab_size = unit_embedding.shape[0]
    column, owned = _owned_columns(distinct, shard, partition_vocab_size)
    rows = unit_embedding[column.squeeze(1)] * owned.to(unit_embedding.dtype)
    if shard.tp_group is not None:
        dist.all_reduce(rows, group=shard.tp_group)
    rows = rows.to(compute_dtype)
    cost = torch.empty(
        len(distinct), partition_vocab_size, dtype=compute_dtype, device=unit_embedding.device
    )
    # A narrow table is widened a block at a time: products and sums are exact to compute_dtype.
    block_rows = max(1, _WORKSPACE_BYTES["cuda"] // (4 * unit_embedding.shape[1]))
    for start in range(0, partition_vocab_size, block_rows):
        block = unit_embedding[start : start + block_rows].to(compute_dtype)
        torch.mm(rows, block.T, out=cost[:, start : start + block_rows])
    # Cauchy-Schwarz bounds the cost below by 0; rounding may not. The cost of the target itself is
    # never read: its column is left out of the sums and its gradient formed apart.
    return cost.neg_().add_(1.0).clamp_(min=0.0)


class _TokenStatistics(NamedTuple):
    """Per-token numbers [N] over the whole vocabulary, the same bits on every rank."""

    logits_max: Tensor
    log_sum_exp: Tensor
    """log sum_j exp(z_j - logits_max)."""
    mle_loss: Tensor
    emo_loss: Tensor
    entropy: Tensor | None


def _row_chunks(num_rows: int, row_bytes: int, device_type: str) -> list[slice]:
    rows = max(1, _WORKSPACE_BYTES.get(device_type, _WORKSPACE_BYTES["cuda"]) // row_bytes)
    return [slice(start, start + rows) for start in range(0, num_rows, rows)]


def _shard_statistics(
    logits: Tensor,
    target: Tensor,
    cost: Tensor | None,
    cost_row: Tensor | None,
    shard: _Shard,
    with_entropy: bool,
) -> Tensor:
    """Return [S, N]: max, target logit, then sums over j != t about this shard's max: e^z, and as
    asked e^z c and e^z z.

    The target stays out of the sums so that m keeps its relative accuracy as q_t tends to 1.
    """
    num_tokens, partition_vocab_size = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    num_statistics = 3 + (cost is not None) + with_entropy
    statistics = torch.empty(num_statistics, num_tokens, dtype=dtype, device=logits.device)
    column, owned = _owned_columns(target, shard, partition_vocab_size)
    for rows in _row_chunks(num_tokens, partition_vocab_size * dtype.itemsize, logits.device.type):
        z = logits[rows].to(dtype, copy=True)
        z_max = z.amax(dim=1, keepdim=True)
        z_target = torch.where(owned[rows], z.gather(1, column[rows]), -torch.inf)
        # A shard of -inf logits has no finite maximum to shift by; its sums are 0 with any shift.
        z.sub_(torch.where(z_max == -torch.inf, 0.0, z_max))
        finite_z = z.clamp(min=_EXP_UNDERFLOW) if with_entropy else None
        exp_z = z.exp_()
        exp_z.scatter_(1, column[rows], exp_z.gather(1, column[rows]).masked_fill_(owned[rows], 0))
        parts = [z_max[:, 0], z_target[:, 0], exp_z.sum(dim=1)]
        if cost is not None:
            parts.append(cost[cost_row[rows]].mul_(exp_z).sum(dim=1))
        if finite_z is not None:
            parts.append(finite_z.mul_(exp_z).sum(dim=1))
        torch.stack(parts, out=statistics[:, rows])
    return statistics


def _merge_statistics(statistics: Tensor, has_cost: bool, with_entropy: bool) -> _TokenStatistics:
    """Return the whole vocabulary's statistics from every rank's [tp, S, N], summed in rank
    order."""
    shard_max, shard_target = statistics[:, 0], statistics[:, 1]
    logits_max, z_target = shard_max.amax(dim=0), shard_target.amax(dim=0)
    scale = torch.where(shard_max == -torch.inf, 0.0, torch.exp(shard_max - logits_max))
    sums = statistics[:, 2:] * scale[:, None]
    if with_entropy:
        # e^z z was taken about each shard's own maximum; move it to the common one.
        sums[:, -1] += sums[:, 0] * (shard_max - logits_max).clamp(min=_EXP_UNDERFLOW)
    # An explicit loop: a reduction may choose its order by shape.
    total = sums[0]
    for shard_sums in sums[1:]:
        total = total + shard_sums
    others = total[0]
    shifted_target = z_target - logits_max
    target_exp = torch.exp(shifted_target)
    sum_exp = others + target_exp
    # When the target leads, its exp is 1 and log1p keeps the digits of a small remainder.
    log_sum_exp = torch.where(shifted_target == 0, torch.log1p(others), torch.log(sum_exp))
    emo_loss = total[1] / sum_exp if has_cost else torch.zeros_like(others)
    entropy = None
    if with_entropy:
        mean_logit = total[-1] + target_exp * shifted_target.clamp(min=_EXP_UNDERFLOW)
        entropy = log_sum_exp - mean_logit / sum_exp
    mle_loss = log_sum_exp - shifted_target
    return _TokenStatistics(logits_max, log_sum_exp, mle_loss, emo_loss, entropy)


def _gather_statistics(statistics: Tensor, shard: _Shard) -> Tensor:
    """Return all ranks' statistics [tp, S, N], in rank order; one all-gather, none on one rank."""
    if shard.tp_group is None:
        return statistics[None]
    gathered = statistics.new_empty(shard.tp_group.size(), *statistics.shape)
    dist.all_gather(list(gathered.unbind()), statistics, group=shard.tp_group)
    return gathered


class _VocabParallelLoss(torch.autograd.Function):
    """Statistics and the objective in the forward, the closed-form gradient in the backward.

    Saves the logits themselves (no copy), the cost rows [U, V/tp] and a few numbers per token.
    """

    @staticmethod
    def forward(ctx, logits, target, keep, cost, cost_row, objective, shard, with_entropy):
        local = _shard_statistics(logits, target, cost, cost_row, shard, with_entropy)
        stats = _merge_statistics(_gather_statistics(local, shard), cost is not None, with_entropy)
        m, d = stats.mle_loss, stats.emo_loss
        q_t = torch.exp(-m)
        loss, mle_weight, emo_weight = objective(m, q_t, d)
        weight = objective.dynamic_weight(m, q_t, d)
        # An objective may return m or d itself; the differentiable output needs a tensor of its
        # own.
        outputs = [loss.clone(), m, d, weight, stats.entropy]
        if keep is not None:
            outputs = [x if x is None else torch.where(keep, x, 0.0) for x in outputs]
        ctx.save_for_backward(
            logits, target, keep, cost, cost_row, *stats[:4], mle_weight, emo_weight
        )
        ctx.shard = shard
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        logits, target, keep, cost, cost_row, logits_max, log_sum_exp, m, d, a, b = (
            ctx.saved_tensors
        )
        # Upstream gradient folded into the weights: g (a + b (c - d)) = (g a - g b d) + g b c.
        a, b = grad_loss * a, grad_loss * b
        base = a - b * d
        at_target = (a * torch.expm1(-m) - b * d * torch.exp(-m))[:, None]
        grad = torch.empty_like(logits)
        column, owned = _owned_columns(target, ctx.shard, logits.shape[1])
        row_bytes = logits.shape[1] * m.dtype.itemsize
        for rows in _row_chunks(logits.shape[0], row_bytes, logits.device.type):
            # Two subtractions: at |z| = 1e4 a single log-normaliser has no digits left for
            # log_sum_exp.
            q = logits[rows].to(m.dtype, copy=True)
            q = q.sub_(logits_max[rows, None]).sub_(log_sum_exp[rows, None]).exp_()
            if cost is None:
                q.mul_(base[rows, None])
            else:
                factor = cost[cost_row[rows]].mul_(b[rows, None]).add_(base[rows, None])
                q.mul_(factor)
            target_value = torch.where(owned[rows], at_target[rows], q.gather(1, column[rows]))
            q.scatter_(1, column[rows], target_value)
            if keep is not None:
                q.masked_fill_(~keep[rows, None], 0.0)
            grad[rows] = q
        return grad, None, None, None, None, None, None, None
