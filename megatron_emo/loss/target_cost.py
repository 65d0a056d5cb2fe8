"""Costs of every token of a shard for given targets."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.cost_embedding.narrow import widen_rows
from megatron_emo.loss.statistics import Shard, locate

_WIDEN_BYTES = 256 << 20
"""A narrow table is widened this much at a time."""


def gather_target_rows(token_ids: Tensor, unit_embedding: Tensor, shard: Shard) -> Tensor:
    """Return the unit rows [U, D] of tokens [U] on every rank, in the table's dtype (fp8: bf16).

    One all-reduce of [U, D], none on one rank: adding zeros to the owner's row is exact, and so is
    an e4m3 number in bf16.
    """
    target = locate(token_ids, shard)
    rows = unit_embedding[target.column[:, 0]]
    if rows.dtype == torch.float8_e4m3fn:
        rows = widen_rows(rows, torch.bfloat16)
    rows = rows * target.owned.to(rows.dtype)
    if shard.tp_group is not None:
        dist.all_reduce(rows, group=shard.tp_group)
    return rows


def cost_of_targets(
    target_rows: Tensor, unit_embedding: Tensor, compute_dtype: torch.dtype
) -> Tensor:
    """Return the cost [U, V/tp] of every token of the shard for targets with unit rows [U, D].

    The target's own column is not 0 but whatever rounding left: nobody reads it, since the target
    stays out of the sums and its gradient is formed apart.
    """
    rows = target_rows.to(compute_dtype)
    num_tokens, dim = unit_embedding.shape
    cost = rows.new_empty(len(rows), num_tokens)
    block = max(1, _WIDEN_BYTES // (4 * dim))
    for start in range(0, num_tokens, block):
        # Widened before the product: sums are then exact to compute_dtype.
        columns = slice(start, start + block)
        wide = widen_rows(unit_embedding[columns], compute_dtype)
        torch.mm(rows, wide.T, out=cost[:, columns])
    # Cauchy-Schwarz bounds the cost below by 0; rounding may not.
    return cost.neg_().add_(1.0).clamp_(min=0.0)
