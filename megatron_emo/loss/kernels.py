"""Row kernels: what happens to logits rows between the matrix products.

Two functions, each with a Triton kernel for CUDA tensors (`triton_kernels.py`) and a plain torch
twin for the rest and for fp64. Both give the same numbers; tests hold both against the reference.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from megatron_emo.loss.statistics import (
    EXP_UNDERFLOW,
    Columns,
    Layout,
    TokenGradient,
)

_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Working copy of the torch twins, in fp32: within cache on a CPU, large enough to fill a GPU."""


def row_statistics(
    z: Tensor,
    target: Columns,
    cost: Tensor | None,
    cost_row: Tensor | None,
    layout: Layout,
    *,
    overwrite: bool = False,
) -> Tensor:
    """Return [layout.count, n]: max, target logit, then sums over j != t about this shard's max:
    e^z, and as asked e^z c and e^z z; then, as asked, the column of the max.

    The target stays out of the sums so that m keeps its relative accuracy as q_t tends to 1.

    Args:
        z: logits [n, V/tp].
        target: where the rows' targets lie.
        cost: [U, V/tp]; row cost_row[i] belongs to row i of z.
        overwrite: z may be used as working space.
    """
    if _runs_triton(z):
        from megatron_emo.loss import triton_kernels

        return triton_kernels.row_statistics(z, target, cost, cost_row, layout)
    dtype = torch.promote_types(z.dtype, torch.float32)
    parts = [
        _block_statistics_(
            z[rows].to(dtype, copy=not overwrite),
            target.rows(rows),
            cost,
            None if cost is None else cost_row[rows],
            layout,
        )
        for rows in _row_blocks(z, dtype)
    ]
    if not parts:
        return z.new_empty(layout.count, 0, dtype=dtype)
    return torch.cat(parts, dim=1)


def row_gradient(
    z: Tensor,
    out: Tensor,
    target: Columns,
    token: TokenGradient,
    cost: Tensor | None,
    cost_row: Tensor | None,
    keep: Tensor | None = None,
) -> Tensor:
    """Return dloss/dz = q (g a + g b (c - d)), and the target's own form, written into `out`.

    c - d comes first: where one token holds nearly all of q, d is its cost to the last bit, and b
    can be in the thousands.

    Args:
        z: logits [n, V/tp].
        out: like z, and may be z itself.
        token: per-token numbers [n].
        cost, cost_row: as in `row_statistics`.
        keep: [n]; rows that are False become 0 whatever z holds. None keeps all.
    """
    if _runs_triton(z):
        from megatron_emo.loss import triton_kernels

        return triton_kernels.row_gradient(z, out, target, token, cost, cost_row, keep)
    dtype = token.emo_loss.dtype
    for rows in _row_blocks(z, dtype):
        block = _block_gradient_(
            z[rows].to(dtype, copy=out is not z),
            target.rows(rows),
            token.rows(rows),
            cost,
            None if cost is None else cost_row[rows],
        )
        if keep is not None:
            block.masked_fill_(~keep[rows, None], 0.0)
        if out is not z or out.dtype != dtype:
            out[rows] = block
    return out


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_triton(z: Tensor) -> bool:
    return z.is_cuda and z.dtype != torch.float64 and _has_triton()


def _row_blocks(z: Tensor, dtype: torch.dtype) -> list[slice]:
    limit = _BLOCK_BYTES.get(z.device.type, _BLOCK_BYTES["cuda"])
    rows = max(1, limit // (z.shape[1] * dtype.itemsize))
    return [slice(start, min(start + rows, len(z))) for start in range(0, len(z), rows)]


def _block_statistics_(
    z: Tensor, target: Columns, cost: Tensor | None, cost_row: Tensor | None, layout: Layout
) -> Tensor:
    """The torch twin on one block; overwrites z."""
    if layout.argmax:
        z_max, first = z.max(dim=1, keepdim=True)
    else:
        z_max = z.amax(dim=1, keepdim=True)
    z_target = torch.where(target.owned, z.gather(1, target.column), -torch.inf)
    # A shard of -inf logits has no finite maximum to shift by; its sums are 0 with any shift.
    z.sub_(torch.where(z_max == -torch.inf, 0.0, z_max))
    finite_z = z.clamp(min=EXP_UNDERFLOW) if layout.entropy else None
    exp_z = z.exp_()
    at_target = exp_z.gather(1, target.column).masked_fill_(target.owned, 0)
    exp_z.scatter_(1, target.column, at_target)
    parts = [z_max[:, 0], z_target[:, 0], exp_z.sum(dim=1)]
    if cost is not None:
        parts.append(cost[cost_row].mul_(exp_z).sum(dim=1))
    if finite_z is not None:
        parts.append(finite_z.mul_(exp_z).sum(dim=1))
    if layout.argmax:
        parts.append(first[:, 0].to(z.dtype))
    return torch.stack(parts)


def _block_gradient_(
    z: Tensor, target: Columns, token: TokenGradient, cost: Tensor | None, cost_row: Tensor | None
) -> Tensor:
    """The torch twin on one block; overwrites z."""
    # Two subtractions: at |z| = 1e4 a single log-normaliser has no digits left for log_sum_exp.
    q = z.sub_(token.logits_max[:, None]).sub_(token.log_sum_exp[:, None]).exp_()
    if cost is None:
        q.mul_(token.mle_weight[:, None])
    else:
        factor = cost[cost_row].sub_(token.emo_loss[:, None])
        q.mul_(factor.mul_(token.emo_weight[:, None]).add_(token.mle_weight[:, None]))
    at_target = torch.where(target.owned, token.at_target[:, None], q.gather(1, target.column))
    return q.scatter_(1, target.column, at_target)
