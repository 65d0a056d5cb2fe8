"""Per-token numbers: merged over the vocabulary's shards, and what the gradient needs of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.objectives import Objective

EXP_UNDERFLOW = -1e4
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
    argmax: Tensor | None = None
    """The likeliest token, int64, when asked for; the lowest id of several."""


class Layout(NamedTuple):
    """Which numbers a token sends in the all-gather, beside its max, target logit and sum-exp."""

    cost: bool
    """Sum of e^z c."""
    entropy: bool = False
    """Sum of e^z z."""
    argmax: bool = False
    """The shard's likeliest token, a whole number: exact in fp32 for 2^24 tokens."""

    @property
    def count(self) -> int:
        return 3 + sum(self)


class Shard(NamedTuple):
    """Where this rank's part of the vocabulary lies; plain values for the autograd functions."""

    vocab_start_index: int
    partition_vocab_size: int
    tp_group: dist.ProcessGroup | None
    """None for one rank."""
    num_blocks: int = 1
    """Equal blocks it is worked off in, one by one (see `vocabulary_blocks`)."""
    is_deterministic: bool = False
    """The blocks are the same however many ranks there are, and nothing may depend on ranks."""


class Columns(NamedTuple):
    """Where token ids lie in this shard."""

    column: Tensor
    """[N, 1], clamped into the shard."""
    owned: Tensor
    """[N, 1], whether the shard has the id at all."""

    def rows(self, rows: slice) -> Columns:
        """Return those of a block of tokens."""
        return Columns(self.column[rows], self.owned[rows])


class TokenStatistics(NamedTuple):
    """Per-token numbers [N] over the whole vocabulary, the same bits on every rank."""

    logits_max: Tensor
    log_sum_exp: Tensor
    """log sum_j exp(z_j - logits_max)."""
    mle_loss: Tensor
    emo_loss: Tensor
    entropy: Tensor | None
    argmax: Tensor | None


class TokenGradient(NamedTuple):
    """Per-token numbers [N] from which row kernels form dloss/dz."""

    logits_max: Tensor
    log_sum_exp: Tensor
    mle_weight: Tensor
    """g a, with g the upstream gradient."""
    emo_weight: Tensor
    """g b."""
    emo_loss: Tensor
    """d."""
    at_target: Tensor
    """dloss/dz_t = g [a expm1(-m) - b q_t d], which keeps its digits as q_t tends to 1."""

    def rows(self, rows: slice) -> TokenGradient:
        """Return those of a block of tokens."""
        return TokenGradient(*(x[rows] for x in self))


def make_shard(
    partition_vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    deterministic_blocks: int | None = None,
) -> Shard:
    """Return this rank's shard of an evenly split vocabulary.

    Raises:
        ValueError: deterministic_blocks that the ranks or the vocabulary cannot be split by.
    """
    if tp_group is None or tp_group.size() == 1:
        shard = Shard(0, partition_vocab_size, None)
    else:
        start = dist.get_rank(tp_group) * partition_vocab_size
        shard = Shard(start, partition_vocab_size, tp_group)
    if deterministic_blocks is None:
        return shard
    num_ranks, vocab_size = 1 if shard.tp_group is None else tp_group.size(), full_vocab_size(shard)
    if deterministic_blocks % num_ranks:
        raise ValueError(
            f"deterministic_blocks: expected a multiple of the {num_ranks} tensor-parallel ranks, "
            f"got {deterministic_blocks}"
        )
    if vocab_size % deterministic_blocks:
        raise ValueError(
            f"deterministic_blocks: expected a divisor of the padded vocabulary {vocab_size}, "
            f"got {deterministic_blocks}"
        )
    return shard._replace(num_blocks=deterministic_blocks // num_ranks, is_deterministic=True)


def full_vocab_size(shard: Shard) -> int:
    """Return the vocabulary's size over all shards, padding included."""
    return shard.partition_vocab_size * (1 if shard.tp_group is None else shard.tp_group.size())


def locate(token_ids: Tensor, shard: Shard) -> Columns:
    """Return where ids [N] lie in the shard."""
    column = (token_ids - shard.vocab_start_index)[:, None]
    owned = (column >= 0) & (column < shard.partition_vocab_size)
    return Columns(column.clamp(0, shard.partition_vocab_size - 1), owned)


def gather_statistics(statistics: Tensor, layout: Layout, shard: Shard) -> Tensor:
    """Return all blocks' statistics [blocks, S, N], in the order of the vocabulary, from those of
    this shard's; one all-gather, none on one rank. Blocks are the ranks' parts unless fixed.

    Overwrites columns of these blocks with token ids.
    """
    if layout.argmax:
        size = shard.partition_vocab_size // len(statistics)
        for index, block in enumerate(statistics):
            block[-1] += shard.vocab_start_index + index * size
    if shard.tp_group is None:
        return statistics
    gathered = statistics.new_empty(shard.tp_group.size(), *statistics.shape)
    dist.all_gather(list(gathered.unbind()), statistics, group=shard.tp_group)
    return gathered.flatten(0, 1)


def merge_statistics(statistics: Tensor, layout: Layout) -> TokenStatistics:
    """Return the whole vocabulary's numbers from every block's [blocks, S, N], summed in their
    order."""
    block_max, block_target = statistics[:, 0], statistics[:, 1]
    logits_max, z_target = block_max.amax(dim=0), block_target.amax(dim=0)
    scale = torch.where(block_max == -torch.inf, 0.0, torch.exp(block_max - logits_max))
    num_sums = 1 + layout.cost + layout.entropy
    sums = statistics[:, 2 : 2 + num_sums] * scale[:, None]
    if layout.entropy:
        # e^z z was taken about each block's own maximum; move it to the common one.
        sums[:, -1] += sums[:, 0] * (block_max - logits_max).clamp(min=EXP_UNDERFLOW)
    # An explicit loop: a reduction may choose its order by shape.
    total = sums[0]
    for block_sums in sums[1:]:
        total = total + block_sums
    others = total[0]
    shifted_target = z_target - logits_max
    target_exp = torch.exp(shifted_target)
    sum_exp = others + target_exp
    # When the target leads, its exp is 1 and log1p keeps the digits of a small remainder.
    log_sum_exp = torch.where(shifted_target == 0, torch.log1p(others), torch.log(sum_exp))
    emo_loss = total[1] / sum_exp if layout.cost else torch.zeros_like(others)
    entropy, argmax = None, None
    if layout.entropy:
        mean_logit = total[-1] + target_exp * shifted_target.clamp(min=EXP_UNDERFLOW)
        entropy = log_sum_exp - mean_logit / sum_exp
    if layout.argmax:
        # The lowest id among the blocks that hold the maximum.
        ids = torch.where(block_max == logits_max, statistics[:, -1], torch.inf).amin(dim=0)
        argmax = ids.nan_to_num(nan=0.0, posinf=0.0).long()
    mle_loss = log_sum_exp - shifted_target
    return TokenStatistics(logits_max, log_sum_exp, mle_loss, emo_loss, entropy, argmax)


def apply_objective(
    stats: TokenStatistics, objective: Objective
) -> tuple[LossOutput, Tensor, Tensor]:
    """Return (results [N], a, b) of every token."""
    m, d = stats.mle_loss, stats.emo_loss
    q_t = torch.exp(-m)
    loss, mle_weight, emo_weight = objective(m, q_t, d)
    weight = objective.dynamic_weight(m, q_t, d)
    # An objective may return m or d itself; the differentiable output needs its own tensor.
    results = LossOutput(loss.clone(), m, d, weight, stats.entropy, stats.argmax)
    return results, mle_weight, emo_weight


def token_gradient(
    stats: TokenStatistics, mle_weight: Tensor, emo_weight: Tensor, grad_loss: Tensor
) -> TokenGradient:
    """Return what the row kernels need; the upstream gradient [N] is folded into the weights."""
    m, d = stats.mle_loss, stats.emo_loss
    a, b = grad_loss * mle_weight, grad_loss * emo_weight
    at_target = a * torch.expm1(-m) - b * d * torch.exp(-m)
    return TokenGradient(stats.logits_max, stats.log_sum_exp, a, b, d, at_target)
