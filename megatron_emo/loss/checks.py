"""What a loss refuses, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_emo.loss.statistics import Shard
from megatron_emo.objectives import Objective


def check_inputs(
    scores: Tensor,
    target: Tensor,
    objective: Objective,
    cost_embedding: Tensor | None,
    loss_mask: Tensor | None,
    shard: Shard,
    sequence_ranks: int = 1,
) -> None:
    """Raise ValueError where shapes or dtypes do not fit.

    Args:
        scores: logits [..., V/tp] or hidden states [..., h].
        sequence_ranks: how many ranks hold a part each of scores' first dimension.
    """
    if not scores.is_floating_point():
        raise ValueError(f"logits or hidden states: expected a float dtype, got {scores.dtype}")
    expected = scores.shape[:-1]
    if sequence_ranks > 1:
        expected = torch.Size((expected[0] * sequence_ranks, *expected[1:]))
    if target.shape != expected or target.is_floating_point():
        raise ValueError(
            f"target: expected integers of shape {tuple(expected)}, "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    if loss_mask is not None and loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask: expected shape {tuple(target.shape)}, got {tuple(loss_mask.shape)}"
        )
    if cost_embedding is None:
        if objective.uses_cost:
            raise ValueError(f"cost_embedding: objective {objective.name} needs one, got None")
    elif cost_embedding.dim() != 2 or cost_embedding.shape[0] != shard.partition_vocab_size:
        raise ValueError(
            f"cost_embedding: expected [{shard.partition_vocab_size}, D], one row per token of "
            f"this rank, got {list(cost_embedding.shape)}"
        )


def check_targets(target: Tensor, keep: Tensor | None, vocab_size: int) -> None:
    """Raise ValueError for targets [N] outside the vocabulary where they count; synchronises."""
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
