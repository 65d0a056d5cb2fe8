"""Fewer columns: unit rows on the principal components of all of them.

The components are not centred. Costs are made of inner products, to which the direction that all
rows share counts as any other; with the mean taken away every cosine would be another one. The
components are the leading eigenvectors of the second moment M = sum_j e_j e_j^T over the whole
vocabulary: of all spaces of their number they keep most of the rows' squared length. Rows are
projected and brought back to unit length, so a reduced table is one like any other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.cost_embedding.narrow import CosineError, cosine_error
from megatron_emo.cost_embedding.rows import row_blocks

_VANISHED = 1e-6
"""A projection shorter than this is rounding of the fp32 rows, not a direction."""


@torch.no_grad()
def reduce_rows(
    unit: Tensor, dim: int, tp_group: dist.ProcessGroup | None = None, *, flag: str = "dim"
) -> tuple[Tensor, CosineError]:
    """Return (rows [rows, dim] at unit length, what that did to the cosines).

    Computed in fp64, block after block. Rows of zeros stay zero; so becomes a row of which less
    than 1e-6 lies along the components.

    Collectives over tp_group, none on one rank: an all-reduce of [D, D], a broadcast of [D, dim]
    (so that all ranks hold the same bits of the components) and an all-gather of 4 numbers, all
    fp64.

    Args:
        unit: this rank's unit rows [V/tp, D] of the table, fp32 or fp64.
        dim: columns to keep.
        tp_group: the ranks that share the vocabulary; None for one rank.
        flag: what asked for `dim`, for the error.

    Raises:
        ValueError: `dim` not in 1 to D.
    """
    if not 1 <= dim <= unit.shape[1]:
        raise ValueError(f"{flag} {dim}: expected 1 to {unit.shape[1]}, the columns of the table")
    rows = project_rows(unit, principal_components(unit, dim, tp_group))
    return rows, cosine_error(unit, rows, tp_group)


def principal_components(
    unit: Tensor, dim: int, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the `dim` leading eigenvectors [D, dim] of the rows' second moment, fp64, the largest
    eigenvalue first; the same bits on all ranks of tp_group (see `reduce_rows`)."""
    width = unit.shape[1]
    moment = unit.new_zeros(width, width, dtype=torch.float64)
    for start, stop in row_blocks(*unit.shape):
        block = unit[start:stop].double()
        moment.addmm_(block.T, block)
    if tp_group is None or tp_group.size() == 1:
        return _leading_eigenvectors(moment, dim)
    dist.all_reduce(moment, group=tp_group)
    if tp_group.rank() == 0:
        components = _leading_eigenvectors(moment, dim)
    else:
        components = moment.new_empty(width, dim)
    dist.broadcast(components, dist.get_global_rank(tp_group, 0), group=tp_group)
    return components


def _leading_eigenvectors(moment: Tensor, dim: int) -> Tensor:
    # eigh sorts by rising eigenvalue.
    return torch.linalg.eigh(moment).eigenvectors[:, -dim:].flip(1).contiguous()


def project_rows(unit: Tensor, components: Tensor) -> Tensor:
    """Return rows [rows, D] along components [D, dim], at unit length or zero, in rows' dtype."""
    result = unit.new_empty(len(unit), components.shape[1])
    for start, stop in row_blocks(*unit.shape):
        rows = unit[start:stop].double() @ components
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows.div_(length.clamp(min=_VANISHED)).masked_fill_(length < _VANISHED, 0)
        result[start:stop].copy_(rows)
    return result
