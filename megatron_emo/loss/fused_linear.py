"""The loss of each token from hidden states: logits formed a chunk at a time.

The output layer z = x W^T, the loss and both gradients in one function, so that what lives through
the forward is a choice, the path:

    logits      keeps the logits, and overwrites them with their gradient in the backward
    recompute   keeps nothing of size [N, V/tp]; forms logits and costs again in the backward
    forward     forms the gradients in the forward, for an upstream gradient that is loss_mask times
                one scalar; looks at the real one and falls back to recompute where it is not

Tokens are worked off in the order of their targets, so that each cost row is formed once for all
tokens that share it, and masked tokens are left out before the first product. What depends on
labels alone, that order and the targets' unit rows, may be prepared before (`target_plan`).
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
from megatron_emo.loss.linear_gradients import LinearGradients, SequenceTokens, Spread
from megatron_emo.loss.statistics import (
    Columns,
    Layout,
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
    token_gradient,
)
from megatron_emo.loss.target_cost import cost_of_targets
from megatron_emo.loss.target_plan import PlannedTargets, TargetPlan, plan_targets
from megatron_emo.loss.vocabulary_blocks import Block, blocks_of
from megatron_emo.objectives import Objective

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Most that one chunk of logits takes: products gain nothing from larger ones."""


class _Call(NamedTuple):
    """What is to be computed, without the tensors that carry gradient."""

    spread: Spread
    mask: Tensor
    """[n] loss_mask of the plan's tokens; 0 where padded."""
    target_rows: Tensor | None
    """[U, D] unit rows of the plan's distinct targets."""
    unit_embedding: Tensor | None
    """[V/tp, D]."""
    objective: Objective
    chunks: list[slice]
    blocks: list[Block]
    compute_dtype: torch.dtype
    layout: Layout
    into_main_grad: bool

    @property
    def plan(self) -> TargetPlan:
        return self.spread.plan

    @property
    def shard(self) -> Shard:
        return self.spread.shard


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
    return_argmax: bool = False,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
    planned: PlannedTargets | None = None,
    deterministic_blocks: int | None = None,
) -> LossOutput:
    """Return what `vocab_parallel_loss` returns for the logits hidden @ weight.T, without keeping
    them.

    Statistics are fp32 (fp64 for fp64), gradients are accumulated over chunks in fp32 and rounded
    once, inputs are not written to. Collectives over tp_group: in the forward one all-reduce of the
    cost rows [U, D] and one all-gather of 3 to 6 numbers per token (on the path `forward` one
    all-gather per chunk); in the backward one all-reduce of the hidden states' gradient [N, h],
    which the last weight product hides. Under sequence parallelism hidden is gathered in the
    forward and, since only the shard is kept, again in the backward, and its gradient is
    reduce-scattered. With deterministic_blocks K the all-gathers bring as many numbers for each of
    the K / tp blocks of a rank, and the hidden states' gradient takes one all-to-all of [N, h] in
    fp32 and, without sequence parallelism, one all-gather of [N / tp, h].

    Args:
        hidden: [..., h], the same on all ranks of tp_group.
        weight: this rank's rows of the output layer [V/tp, h], in hidden's dtype.
        target, objective, cost_embedding, loss_mask, tp_group: as in `vocab_parallel_loss`.
        path: logits, recompute, forward; auto takes logits where logits and cost rows fit
            workspace_mb, else recompute.
        workspace_mb: bound on what a chunk takes, in MiB; on the path logits there are none.
        sequence_parallel: hidden is this rank's part [s/tp, ..., h] of the first dimension; target
            and loss_mask are whole.
        into_main_grad: add weight's gradient to weight.main_grad, as Megatron's gradient
            accumulation fusion does, and set weight.grad_added_to_main_grad; weight.grad then holds
            nothing of use, or zeros where weight.zero_out_wgrad asks for them.
        planned: from `PlannedTargets`, made of the same target, loss_mask and table; else made
            here, which on a GPU waits for the device.
        deterministic_blocks: as in `vocab_parallel_loss`; the gradients of hidden and weight too
            have the same bits at any number of ranks. Chunks, and the choice of auto, then follow
            the whole vocabulary or a block of it, not V/tp.

    Raises:
        ValueError: as `vocab_parallel_loss`, an unknown path, or a workspace below one row.
        RuntimeError: a second backward on the path logits, whose logits are gone.
    """
    LossPathConfig(path, workspace_mb, deterministic_blocks)  # checks them
    hidden = _as_tensor(hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: expected [V/tp, {hidden.shape[-1]}] in {hidden.dtype}, "
            f"got {list(weight.shape)} in {weight.dtype}"
        )
    shard = make_shard(weight.shape[0], tp_group, deterministic_blocks)
    sequence_parallel = sequence_parallel and shard.tp_group is not None
    ranks = shard.tp_group.size() if sequence_parallel else 1
    check_inputs(hidden, target, objective, cost_embedding, loss_mask, shard, ranks)
    if check_target:
        kept = None if loss_mask is None else loss_mask.reshape(-1) != 0
        check_targets(target.reshape(-1), kept, vocab_size or full_vocab_size(shard))
    if cost_embedding is not None:
        cost_embedding = cost_embedding.detach()
        if not cost_embedding_is_normalized:
            cost_embedding = unit_rows(cost_embedding)
    if planned is None:
        planned = PlannedTargets(plan_targets(target, loss_mask), cost_embedding, shard)
    plan, compute_dtype = planned.plan, torch.promote_types(hidden.dtype, torch.float32)
    has_cost = cost_embedding is not None
    path = _path_taken(path, plan, hidden, weight, has_cost, workspace_mb, shard)
    call = _Call(
        Spread(plan, shard, sequence_parallel),
        _mask_of(plan, target, loss_mask, compute_dtype),
        planned.rows(),
        cost_embedding,
        objective,
        _chunks(path, plan, hidden, has_cost, workspace_mb, shard),
        blocks_of(shard),
        compute_dtype,
        Layout(has_cost, return_entropy, return_argmax),
        into_main_grad,
    )
    results = _FusedLinearLoss.apply(hidden, weight, call, path)
    return LossOutput(*(x if x is None else plan.restore(x).view(target.shape) for x in results))


def _as_tensor(hidden: Tensor) -> Tensor:
    """Return a plain tensor for Transformer Engine's quantized ones."""
    is_plain = type(hidden) in (Tensor, torch.nn.Parameter)
    return hidden.dequantize() if not is_plain and hasattr(hidden, "_quantizer") else hidden


def _mask_of(plan: TargetPlan, target: Tensor, loss_mask: Tensor | None, dtype) -> Tensor:
    mask = torch.ones_like(target) if loss_mask is None else loss_mask
    mask = plan.select(mask.reshape(-1)).to(dtype)
    return torch.where(plan.keep(), mask, 0) if plan.is_padded else mask


def _path_taken(
    path: str,
    plan: TargetPlan,
    hidden: Tensor,
    weight: Tensor,
    has_cost: bool,
    workspace_mb: int,
    shard: Shard,
) -> str:
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return "recompute"  # nothing is kept, and no backward will ask for it
    if path != "auto":
        return path
    num_distinct = len(plan.distinct) if has_cost else 0
    # One path at any number of ranks: by what one rank would keep.
    width = full_vocab_size(shard) if shard.is_deterministic else len(weight)
    sizes = (len(plan.order), num_distinct, width, hidden.element_size())
    return auto_path(*sizes, workspace_mb)[0]


def _chunks(
    path: str, plan: TargetPlan, hidden: Tensor, has_cost: bool, workspace_mb: int, shard: Shard
) -> list[slice]:
    count = len(plan.order)
    if path == "logits":  # all are kept, and one large product is best
        return [slice(0, count)] if count else []
    # A row takes its logits, at worst a cost row of its own, and narrow logits a wide copy.
    itemsize = torch.promote_types(hidden.dtype, torch.float32).itemsize
    row_bytes = _row_width(path, shard) * itemsize * (2 if has_cost else 1)
    if row_bytes > workspace_mb << 20:
        raise ValueError(
            f"workspace_mb: expected at least {-(-row_bytes // (1 << 20))} MiB, the size of one "
            f"token's row, got {workspace_mb}"
        )
    budget = min(workspace_mb << 20, _CHUNK_BYTES.get(hidden.device.type, 512 << 20))
    rows = max(1, budget // row_bytes)
    return [slice(i, min(i + rows, count)) for i in range(0, count, rows)]


def _row_width(path: str, shard: Shard) -> int:
    """Return how many columns a chunk holds at a time; the same at any number of ranks if the
    blocks are fixed."""
    if shard.is_deterministic and path == "forward":
        return full_vocab_size(shard)  # a token's gradient needs the statistics of all blocks
    return shard.partition_vocab_size // shard.num_blocks


def auto_path(
    num_tokens: int,
    num_distinct: int,
    partition_vocab_size: int,
    itemsize: int,
    workspace_mb: int,
) -> tuple[str, int]:
    """Return (the path auto takes, the bytes the path logits would keep): logits where logits of
    `itemsize` bytes and fp32 cost rows of the distinct targets fit, else recompute."""
    kept = partition_vocab_size * (num_tokens * itemsize + num_distinct * 4)
    return "logits" if kept <= workspace_mb << 20 else "recompute", kept


class _Scores(NamedTuple):
    """Logits and costs of a chunk of tokens in one block of the vocabulary."""

    z: Tensor
    """[n, block] in hidden's dtype."""
    target: Columns
    cost: Tensor | None
    """[u, block] of the chunk's distinct targets."""
    cost_row: Tensor | None
    """[n] which of them each token has."""


def _scores(tokens: Tensor, weight: Tensor, call: _Call, rows: slice, block: Block) -> _Scores:
    z = torch.mm(tokens[rows], block.rows_of(weight).T)
    target = locate(call.plan.target[rows], block.shard)
    if not call.layout.cost:
        return _Scores(z, target, None, None)
    distinct, table = call.plan.distinct_of(rows), block.rows_of(call.unit_embedding)
    cost = cost_of_targets(call.target_rows[distinct], table, call.compute_dtype)
    return _Scores(z, target, cost, call.plan.cost_row[rows] - distinct.start)


def _statistics_of_all(
    tokens: Tensor, weight: Tensor, call: _Call, kept: list[_Scores] | None
) -> TokenStatistics:
    """Return every token's statistics; one all-gather. Fills `kept` where there is one."""
    shape = len(call.blocks), call.layout.count, len(tokens)
    local = tokens.new_empty(shape, dtype=call.compute_dtype)
    for rows in call.chunks:
        for index, block in enumerate(call.blocks):
            scores = _scores(tokens, weight, call, rows, block)
            local[index, :, rows] = row_statistics(*scores, call.layout, overwrite=kept is None)
            if kept is not None:
                kept.append(scores)
            del scores  # before the next are made
    return merge_statistics(gather_statistics(local, call.layout, call.shard), call.layout)


def _gradients_of_all(
    tokens: SequenceTokens,
    weight: Tensor,
    call: _Call,
    token: TokenGradient,
    kept: list[_Scores] | None,
    gradients: LinearGradients,
) -> None:
    keep = call.plan.keep()
    for rows in call.chunks:
        kept_rows, is_last = None if keep is None else keep[rows], rows == call.chunks[-1]
        for index, block in enumerate(call.blocks):
            # What is kept is one chunk's.
            scores = kept[index] if kept else _scores(tokens.get(), weight, call, rows, block)
            grad_z = _gradient_(scores, token.rows(rows), kept_rows)
            gradients.add(grad_z, tokens, weight, rows, block, is_last=is_last)
            del scores, grad_z  # before the next are made


def _gradient_(scores: _Scores, token: TokenGradient, keep: Tensor | None) -> Tensor:
    """Return dloss/dz, written over the logits."""
    z, target, *cost = scores
    return row_gradient(z, z, target, token, *cost, keep)


def _forward_with_gradients(
    tokens: SequenceTokens, weight: Tensor, call: _Call, gradients: LinearGradients
) -> TokenStatistics:
    """Return statistics, and gather gradients for an upstream gradient equal to the mask."""
    parts, keep = [], call.plan.keep()
    for rows in call.chunks:
        formed = [_scores(tokens.get(), weight, call, rows, block) for block in call.blocks]
        local = torch.stack([row_statistics(*scores, call.layout) for scores in formed])
        stats = merge_statistics(gather_statistics(local, call.layout, call.shard), call.layout)
        _, mle_weight, emo_weight = apply_objective(stats, call.objective)
        token = token_gradient(stats, mle_weight, emo_weight, call.mask[rows])
        kept_rows = None if keep is None else keep[rows]
        for block, scores in zip(call.blocks, formed, strict=True):
            grad_z = _gradient_(scores, token, kept_rows)
            gradients.add(grad_z, tokens, weight, rows, block)
        parts.append(stats)
        del formed, scores, grad_z  # before the next chunk's are made
    return TokenStatistics(*map(_concatenate, zip(*parts, strict=True)))


def _concatenate(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _no_statistics(weight: Tensor, call: _Call) -> TokenStatistics:
    empty = weight.new_empty(0, dtype=call.compute_dtype)
    return TokenStatistics(
        *[empty] * 4,
        entropy=empty if call.layout.entropy else None,
        argmax=empty.long() if call.layout.argmax else None,
    )


class _FusedLinearLoss(torch.autograd.Function):
    """hidden [..., h] as given, weight [V/tp, h]; results [n] in the plan's order."""

    @staticmethod
    def forward(ctx, hidden, weight, call, path):
        tokens = SequenceTokens(hidden, call.spread)
        kept, gradients = None, None
        if not call.chunks:
            stats = _no_statistics(weight, call)
        elif path == "forward":
            gradients = _gradients_for(ctx, hidden, weight, call, is_final=False)
            stats = _forward_with_gradients(tokens, weight, call, gradients)
        else:
            kept = [] if path == "logits" else None
            stats = _statistics_of_all(tokens.get(), weight, call, kept)
        outputs, mle_weight, emo_weight = apply_objective(stats, call.objective)
        ctx.save_for_backward(hidden, weight, *stats[:4], mle_weight, emo_weight)
        ctx.call, ctx.path, ctx.kept, ctx.gradients = call, path, kept, gradients
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        hidden, weight, *stats, mle_weight, emo_weight = ctx.saved_tensors
        call, gradients = ctx.call, ctx.gradients
        scale = None if gradients is None else _uniform_scale(grad_loss, call.mask)
        ctx.gradients = None  # handed over now; a second backward recomputes
        if scale is not None:
            return (*gradients.scaled(scale, hidden, weight), None, None)
        if ctx.path == "logits" and ctx.kept is None and call.chunks:
            raise RuntimeError(
                "fused_linear_loss: a second backward on the path logits, whose logits the "
                "first one overwrote; use path='recompute'"
            )
        stats = TokenStatistics(*stats, entropy=None, argmax=None)
        token = token_gradient(stats, mle_weight, emo_weight, grad_loss)
        gradients = _gradients_for(ctx, hidden, weight, call, is_final=True)
        # Kept logits need tokens for dW alone.
        needs_tokens = ctx.kept is None or ctx.needs_input_grad[1]
        tokens = SequenceTokens(hidden, call.spread) if needs_tokens else None
        _gradients_of_all(tokens, weight, call, token, ctx.kept, gradients)
        ctx.kept = None
        return (*gradients.results(hidden, weight), None, None)


def _gradients_for(
    ctx, hidden: Tensor, weight: Tensor, call: _Call, *, is_final: bool
) -> LinearGradients:
    needs = ctx.needs_input_grad[:2]
    main_grad = weight.main_grad if call.into_main_grad and needs[1] else None
    return LinearGradients(hidden, weight, call.spread, needs, main_grad, is_final=is_final)


def _uniform_scale(grad_loss: Tensor, mask: Tensor) -> Tensor | None:
    """Return s where grad_loss is s * mask exactly, else None; one device synchronisation."""
    scale = grad_loss[0] / mask[0]
    return scale if torch.equal(scale * mask, grad_loss) else None
