"""Row kernels: what happens to a block of logits rows between the matrix products.

Plain torch. Both write into the block they are given, which is the caller's working copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_emo.loss.statistics import EXP_UNDERFLOW, Columns, TokenGradient

_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Size of one block of rows in fp32: within cache on a CPU, large enough to fill a GPU."""


def row_blocks(num_rows: int, row_bytes: int, device_type: str) -> list[slice]:
    """Return slices that cut [0, num_rows) into blocks of at most `_BLOCK_BYTES`, one row at
    least."""
    rows = max(1, _BLOCK_BYTES.get(device_type, _BLOCK_BYTES["cuda"]) // row_bytes)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def row_statistics_(
    z: Tensor, target: Columns, cost: Tensor | None, cost_row: Tensor | None, with_entropy: bool
) -> Tensor:
    """Return [S, n]: max, target logit, then sums over j != t about this shard's max: e^z, and as
    asked e^z c and e^z z.

    The target stays out of the sums so that m keeps its relative accuracy as q_t tends to 1.

    Args:
        z: [n, V/tp] fp32 or fp64, overwritten.
        cost: [U, V/tp]; row cost_row[i] belongs to row i of z.
    """
    z_max = z.amax(dim=1, keepdim=True)
    z_target = torch.where(target.owned, z.gather(1, target.column), -torch.inf)
    # A shard of -inf logits has no finite maximum to shift by; its sums are 0 with any shift.
    z.sub_(torch.where(z_max == -torch.inf, 0.0, z_max))
    finite_z = z.clamp(min=EXP_UNDERFLOW) if with_entropy else None
    exp_z = z.exp_()
    at_target = exp_z.gather(1, target.column).masked_fill_(target.owned, 0)
    exp_z.scatter_(1, target.column, at_target)
    parts = [z_max[:, 0], z_target[:, 0], exp_z.sum(dim=1)]
    if cost is not None:
        parts.append(cost[cost_row].mul_(exp_z).sum(dim=1))
    if finite_z is not None:
        parts.append(finite_z.mul_(exp_z).sum(dim=1))
    return torch.stack(parts)


def row_gradient_(
    z: Tensor, target: Columns, token: TokenGradient, cost: Tensor | None, cost_row: Tensor | None
) -> Tensor:
    """Return z overwritten by dloss/dz = q (g a - g b d + g b c), and the target's own form.

    Args:
        z: [n, V/tp] fp32 or fp64 logits, overwritten.
        token: per-token numbers [n] of these rows.
        cost, cost_row: as in `row_statistics_`.
    """
    # Two subtractions: at |z| = 1e4 a single log-normaliser has no digits left for log_sum_exp.
    q = z.sub_(token.logits_max[:, None]).sub_(token.log_sum_exp[:, None]).exp_()
    if cost is None:
        q.mul_(token.base[:, None])
    else:
        q.mul_(cost[cost_row].mul_(token.emo_weight[:, None]).add_(token.base[:, None]))
    at_target = torch.where(target.owned, token.at_target[:, None], q.gather(1, target.column))
    return q.scatter_(1, target.column, at_target)
