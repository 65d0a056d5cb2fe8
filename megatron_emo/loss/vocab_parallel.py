"""The loss of each token from this rank's shard of the logits.

With z the logits, q = softmax(z) over the whole vocabulary and c_j the cost of token j for the
target t,

    m = log(sum_j e^{z_j}) - z_t        d = sum_{j != t} q_j c_j

are formed from four sums per rank that one all-gather merges. d is accumulated directly: the equal
form 1 - <e_t, sum_j q_j e_j> cancels once q_t is near 1 (a relative error of 0.08 at q_t = 0.99 in
bf16).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.config import check_deterministic_blocks
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.loss.checks import check_inputs, check_targets
from megatron_emo.loss.kernels import row_gradient, row_statistics
from megatron_emo.loss.statistics import (
    Layout,
    LossOutput,
    TokenStatistics,
    apply_objective,
    full_vocab_size,
    gather_statistics,
    locate,
    make_shard,
    merge_statistics,
    token_gradient,
)
from megatron_emo.loss.target_cost import cost_of_targets
from megatron_emo.loss.target_plan import PlannedTargets, plan_targets
from megatron_emo.loss.vocabulary_blocks import blocks_of
from megatron_emo.objectives import Objective


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
    return_argmax: bool = False,
    planned: PlannedTargets | None = None,
    deterministic_blocks: int | None = None,
) -> LossOutput:
    """Return the objective's loss for each token from vocabulary-sharded logits.

    Statistics and gradient are computed in fp32 (fp64 for fp64 logits); the gradient has the
    logits' dtype; no input is written to. A token whose loss_mask is 0 gives exactly 0 loss and
    gradient, whatever its logits and target hold. The loss is not multiplied by the mask:
    fractional masks weigh it outside.

    Collectives over tp_group, none when it has one rank: one all-reduce of the cost rows of the
    distinct targets [U, D], only with a cost embedding and dependent on labels alone, and one
    all-gather of 4 numbers per token (max, sum-exp, sum-exp-cost, target logit; 3 without a cost
    embedding, one more each for entropy and argmax), merged in rank order, so that all ranks hold
    the same bits. The backward has none.

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
        return_argmax: also give the likeliest token.
        planned: from `PlannedTargets`, made of the same target, loss_mask and table; else made
            here, which on a GPU waits for the device.
        deterministic_blocks: K, a power of two that the number of ranks divides and that divides
            V: results and gradient have the same bits at any such number of ranks, on the same
            kind of device, build and number of threads (see `vocabulary_blocks`). Other K give
            other last digits. The all-gather then brings 4 numbers per token and block. None
            leaves the order of sums to the ranks.

    Raises:
        ValueError: shapes or dtypes that do not fit, a missing cost embedding, targets outside
            [0, vocab_size) where the mask keeps them (with their count and the first), or blocks
            that the vocabulary or the ranks cannot be split into.
    """
    check_deterministic_blocks(deterministic_blocks)
    shard = make_shard(vocab_parallel_logits.shape[-1], tp_group, deterministic_blocks)
    check_inputs(vocab_parallel_logits, target, objective, cost_embedding, loss_mask, shard)
    flat_target = target.reshape(-1)
    keep = None if loss_mask is None else loss_mask.reshape(-1) != 0
    if check_target:
        check_targets(flat_target, keep, vocab_size or full_vocab_size(shard))
    # Masked targets may be -100; row 0 stands in, its loss and gradient are dropped.
    flat_target = flat_target if keep is None else torch.where(keep, flat_target, 0)

    blocks, costs, cost_row = blocks_of(shard), None, None
    if cost_embedding is not None:
        unit_embedding = cost_embedding.detach()
        if not cost_embedding_is_normalized:
            unit_embedding = unit_rows(unit_embedding)
        if planned is None:
            planned = PlannedTargets(plan_targets(target, loss_mask), unit_embedding, shard)
        compute_dtype = torch.promote_types(vocab_parallel_logits.dtype, torch.float32)
        costs = [
            cost_of_targets(planned.rows(), block.rows_of(unit_embedding), compute_dtype)
            for block in blocks
        ]
        cost_row = planned.plan.restore(planned.plan.cost_row)

    results = _VocabParallelLoss.apply(
        vocab_parallel_logits.reshape(-1, shard.partition_vocab_size),
        flat_target,
        keep,
        costs or [None] * len(blocks),
        cost_row,
        objective,
        shard,
        Layout(costs is not None, return_entropy, return_argmax),
    )
    return LossOutput(*(x if x is None else x.view(target.shape) for x in results))


class _VocabParallelLoss(torch.autograd.Function):
    """Statistics and the objective in the forward, the closed-form gradient in the backward.

    Saves the logits themselves (no copy), the cost rows [U, V/tp] and a few numbers per token.
    Fixed blocks are worked off as copies of their columns, one at a time.
    """

    @staticmethod
    def forward(ctx, logits, target, keep, costs, cost_row, objective, shard, layout):
        local = torch.stack(
            [
                row_statistics(
                    block.columns_of(logits),
                    locate(target, block.shard),
                    cost,
                    cost_row,
                    layout,
                    overwrite=shard.is_deterministic,
                )
                for block, cost in zip(blocks_of(shard), costs, strict=True)
            ]
        )
        stats = merge_statistics(gather_statistics(local, layout, shard), layout)
        outputs, mle_weight, emo_weight = apply_objective(stats, objective)
        if keep is not None:
            outputs = [x if x is None else torch.where(keep, x, 0) for x in outputs]
        ctx.save_for_backward(
            logits, target, keep, cost_row, *stats[:4], mle_weight, emo_weight, *costs
        )
        ctx.shard = shard
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        logits, target, keep, cost_row, *saved = ctx.saved_tensors
        (*stats, mle_weight, emo_weight), costs = saved[:6], saved[6:]
        stats = TokenStatistics(*stats, entropy=None, argmax=None)
        token = token_gradient(stats, mle_weight, emo_weight, grad_loss)
        grad = torch.empty_like(logits)
        for block, cost in zip(blocks_of(ctx.shard), costs, strict=True):
            z = block.columns_of(logits)
            out = z if ctx.shard.is_deterministic else grad
            row_gradient(z, out, locate(target, block.shard), token, cost, cost_row, keep)
            if out is not grad:
                grad[:, block.rows] = out
        return grad, None, None, None, None, None, None, None
