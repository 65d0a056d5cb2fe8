"""Costs of every token of a shard for given targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.cost_embedding.narrow import FP8_ALIGNMENT, FP8_SCALE, select_rows, widen_rows
from megatron_emo.loss.statistics import Shard, locate

_WIDEN_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""A narrow table is widened this much at a time, in fp32."""


def gather_target_rows(
    token_ids: Tensor, unit_embedding: Tensor, shard: Shard, *, wait: bool = True
) -> tuple[Tensor, dist.Work | None]:
    """Return (unit rows [U, D] of tokens [U] on every rank, what to wait for before reading them).

    One all-reduce of [U, D] in the table's own dtype, none on one rank: adding zeros to the owner's
    row is exact. fp8 travels as bytes.

    Args:
        wait: return when the rows are there, and None beside them.
    """
    target = locate(token_ids, shard)
    column = target.column[:, 0]
    if shard.tp_group is None:
        return select_rows(unit_embedding, column), None
    as_bytes = unit_embedding.dtype == torch.float8_e4m3fn
    table = unit_embedding.view(torch.uint8) if as_bytes else unit_embedding
    rows = table.index_select(0, column) * target.owned.to(table.dtype)
    work = dist.all_reduce(rows, group=shard.tp_group, async_op=not wait)
    return rows.view(unit_embedding.dtype), work


def cost_of_targets(
    target_rows: Tensor, unit_embedding: Tensor, compute_dtype: torch.dtype
) -> Tensor:
    """Return the cost [U, V/tp] of every token of the shard for given targets, in `compute_dtype`.

    The target's own column is not 0 but whatever rounding left: nobody reads it, since the target
    stays out of the sums and its gradient is formed apart.

    Args:
        target_rows: [U, D] rows of the same table, in its dtype; of an fp8 table also widened.
        unit_embedding: this rank's unit rows [V/tp, D], or fp8 rows of `narrow_rows`.
        compute_dtype: fp32 or fp64.
    """
    product = _choose_product(unit_embedding, compute_dtype)
    cosines = product(target_rows, unit_embedding, compute_dtype)
    # Cauchy-Schwarz bounds the cost below by 0; rounding may not.
    return cosines.neg_().add_(1.0).clamp_(min=0.0)


def _choose_product(table: Tensor, compute_dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return what multiplies rows with a table. The values are those of the dtypes the rows are
    held in, whichever it is; sums are fp32 or wider.

        fp8, V/tp a multiple of 16, CUDA of capability 8.9 on   e4m3 on tensor cores
        fp8 else, bf16; CUDA of capability 8.0 on, a torch      bf16 on tensor cores, to which e4m3
            whose mm gives fp32 for bf16                        widens exactly
        all else: CPU, fp32 tables, fp64 losses                 in compute_dtype
    """
    if compute_dtype == torch.float32:
        capability = _capability(table.device)
        aligned = all(size % FP8_ALIGNMENT == 0 for size in table.shape)
        if table.dtype == torch.float8_e4m3fn and aligned and capability >= (8, 9):
            return _fp8_product
        is_narrow = table.dtype in (torch.float8_e4m3fn, torch.bfloat16)
        if is_narrow and capability >= (8, 0) and _mm_can_widen():
            return _bf16_product
    return _wide_product


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; (0, 0) of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def _mm_can_widen() -> bool:
    """Whether torch.mm multiplies bf16 into fp32 on CUDA; torch before 2.8 cannot."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def _fp8_product(rows: Tensor, table: Tensor, compute_dtype: torch.dtype) -> Tensor:
    if rows.dtype != table.dtype:
        rows = (rows * FP8_SCALE).to(table.dtype)  # exact: they were e4m3 before
    if len(rows) == 0:
        return rows.new_empty(0, len(table), dtype=compute_dtype)
    scale = torch.full((), 1 / FP8_SCALE, dtype=torch.float32, device=table.device)
    return torch._scaled_mm(rows, table.T, scale, scale, out_dtype=compute_dtype)


def _bf16_product(rows: Tensor, table: Tensor, compute_dtype: torch.dtype) -> Tensor:
    rows = widen_rows(rows, torch.bfloat16)
    if table.dtype == torch.bfloat16:
        return torch.mm(rows, table.T, out_dtype=compute_dtype)
    cosines = rows.new_empty(len(rows), len(table), dtype=compute_dtype)
    for columns in _column_blocks(table):
        block = widen_rows(table[columns], torch.bfloat16)
        cosines[:, columns] = torch.mm(rows, block.T, out_dtype=compute_dtype)
    return cosines


def _wide_product(rows: Tensor, table: Tensor, compute_dtype: torch.dtype) -> Tensor:
    rows = widen_rows(rows, compute_dtype)
    cosines = rows.new_empty(len(rows), len(table))
    for columns in _column_blocks(table):
        torch.mm(rows, widen_rows(table[columns], compute_dtype).T, out=cosines[:, columns])
    return cosines


def _column_blocks(table: Tensor) -> Iterator[slice]:
    limit = _WIDEN_BYTES.get(table.device.type, _WIDEN_BYTES["cuda"])
    block = max(1, limit // (4 * table.shape[1]))
    return (slice(start, start + block) for start in range(0, len(table), block))
