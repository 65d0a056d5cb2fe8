"""Narrow copies of unit rows: bf16, or fp8 (e4m3), rotated, with a constant scale.

The entries of a unit row lie in [-1, 1], so no scale needs to be looked for: times 256 they stay
below e4m3's 448, and clear of its subnormal range for any usual width. What eight bits spoil is a
table whose length sits in few columns, since rounding errors then have few products to average
over. Costs are made of inner products, which no rotation changes, so fp8 rows are rotated first,
all by the same matrix: each direction, and the one that all rows share, is spread over all columns.

A tensor of dtype float8_e4m3fn means such rows throughout this package: rotated, as wide as the
next multiple of 16, times 256. Their inner products are those of the unit rows; the entries alone
mean nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.cost_embedding.rows import row_blocks

FP8_SCALE = 256.0
FP8_ALIGNMENT = 16
"""fp8 products on tensor cores want widths that are multiples of this."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
MAX_COST_ERROR = 0.01
_SAMPLED_TARGETS = 64
_SIGN_SEED = 20240507


@torch.no_grad()
def narrow_rows(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return unit rows [rows, dim] in `dtype`; the same tensor if it has it already.

    fp8 rows come back rotated, [rows, dim rounded up to 16], formed block after block.
    """
    if dtype != torch.float8_e4m3fn or unit.dtype == dtype:
        return unit.to(dtype)
    width = -(-unit.shape[1] // FP8_ALIGNMENT) * FP8_ALIGNMENT
    narrow = torch.empty(len(unit), width, dtype=dtype, device=unit.device)
    for start, stop in row_blocks(len(unit), width):
        narrow[start:stop].copy_(rotate_rows(unit[start:stop], width).mul_(FP8_SCALE))
    return narrow


def rotate_rows(rows: Tensor, width: int) -> Tensor:
    """Return rows [rows, dim] in an orthonormal basis of `width` >= dim columns, in fp32 or fp64.

    Random signs (always the same), zero columns up to `width`, then the orthonormal DCT-II

        y_k = sqrt(2 / width) sum_i cos(pi (2 i + 1) k / (2 width)) x_i      (y_0 over sqrt(2))

    through one FFT of the same length (Makhoul 1980), which for wide tables costs a fraction of the
    product with the matrix and keeps none.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    dim, generator = rows.shape[1], torch.Generator().manual_seed(_SIGN_SEED)
    signs = torch.randint(0, 2, (dim,), generator=generator).mul_(2).sub_(1)
    wide = rows.new_zeros(len(rows), width, dtype=dtype)
    torch.mul(rows, signs.to(rows.device, dtype), out=wide[:, :dim])
    folded = torch.cat([wide[:, ::2], wide[:, 1::2].flip(1)], dim=1)
    angle = torch.arange(width, dtype=torch.float64) * (-math.pi / (2 * width))
    length = torch.full((width,), math.sqrt(2 / width), dtype=torch.float64)
    length[0] = math.sqrt(1 / width)
    turn = torch.polar(length, angle).to(rows.device, torch.promote_types(dtype, torch.complex64))
    return torch.fft.fft(folded).mul_(turn).real


def widen_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of any of `DTYPES` as unit rows in a wide dtype; exact. fp8 rows stay rotated."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.to(dtype).mul_(1 / FP8_SCALE)
    return rows.to(dtype)


def select_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index] of any of `DTYPES`; fp8 as bytes, since not every torch can index it."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.view(torch.uint8).index_select(0, index).view(rows.dtype)
    return rows.index_select(0, index)


@dataclass(frozen=True)
class CosineError:
    """How far the cosines of sampled pairs of rows lie from the exact ones."""

    rms: float
    max: float
    mean_cost: float
    """1 - the exact cosine, averaged over the pairs."""
    num_pairs: int


def cosine_error(
    unit: Tensor, other: Tensor, tp_group: dist.ProcessGroup | None = None
) -> CosineError:
    """Return the error of cosines between rows of `other`, for 64 to 127 targets spread over the
    rows, against every row. Rows of zeros, exact in any form, are left out. fp64, in blocks.

    Over a group each rank samples pairs of its own rows; one all-gather of 4 numbers merges what
    they found, so that all ranks return the same. None, and none on one rank, without.

    Args:
        unit: [rows, dim] unit rows.
        other: the same tokens' rows, narrowed or reduced; any width.
    """
    sums = _cosine_error_sums(unit, other)
    if tp_group is not None and tp_group.size() > 1:
        gathered = sums.new_empty(tp_group.size(), len(sums))
        dist.all_gather(list(gathered.unbind()), sums, group=tp_group)
        sums = torch.cat([gathered[:, :3].sum(dim=0), gathered[:, 3:].amax(dim=0)])
    squares, costs, pairs, largest = sums.tolist()
    if not pairs:
        return CosineError(0.0, 0.0, 0.0, 0)
    return CosineError(math.sqrt(squares / pairs), largest, costs / pairs, int(pairs))


@torch.no_grad()
def _cosine_error_sums(unit: Tensor, other: Tensor) -> Tensor:
    """[4] fp64 over the sampled pairs: squared errors, exact costs, pairs, the largest error."""
    kept = unit.any(dim=1).nonzero()[:, 0]
    sums = unit.new_zeros(4, dtype=torch.float64)
    if len(kept) < 2:
        return sums
    targets = kept[:: max(1, len(kept) // _SAMPLED_TARGETS)]

    def cosines(table: Tensor, index: Tensor) -> Tensor:
        rows, columns = (widen_rows(select_rows(table, i), torch.float64) for i in (index, targets))
        return rows @ columns.T

    for start, stop in row_blocks(len(kept), max(unit.shape[1], len(targets))):
        exact = cosines(unit, kept[start:stop])
        error = cosines(other, kept[start:stop]) - exact
        sums[0] += error.square().sum()
        sums[1] += (1 - exact).sum()
        sums[2] += exact.numel()
        sums[3] = torch.maximum(sums[3], error.abs().amax())
    return sums


def cost_error(unit: Tensor, narrow: Tensor, tp_group: dist.ProcessGroup | None = None) -> float:
    """Return the root mean square error of costs over their mean, sampled by `cosine_error`.

    A cost is 1 - <e_j, e_t>. This is the error of an expected cost whose mass lies on one token;
    mass spread over many averages it out.
    """
    error = cosine_error(unit, narrow, tp_group)
    return error.rms / error.mean_cost if error.rms else 0.0


def narrow_rows_checked(
    unit: Tensor, dtype: torch.dtype, flag: str, tp_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, float]:
    """Return (narrow rows, their `cost_error` over tp_group).

    Raises:
        ValueError: an error above 1%, naming `flag`; on all ranks of tp_group or none.
    """
    narrow = narrow_rows(unit, dtype)
    error = cost_error(unit, narrow, tp_group)
    if error > MAX_COST_ERROR:
        name = next(name for name, value in DTYPES.items() if value == dtype)
        raise ValueError(
            f"{flag} {name}: costs of this table would be off by {error:.2%}, expected at most "
            f"{MAX_COST_ERROR:.0%}; use a wider dtype"
        )
    return narrow, error
