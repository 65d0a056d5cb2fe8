"""Rows of a matrix at unit length, in blocks, so that no second copy of a large table is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22


def unit_rows(table: Tensor) -> Tensor:
    """Return the rows of `table` [rows, dim] scaled to unit length, in fp32 (fp64 for fp64).

    A row whose length is zero or below the smallest normal number of that dtype becomes zero.
    Works block after block: beside the result no copy of the table is made. No gradient flows.

    Raises:
        ValueError: not a floating matrix, or a NaN or infinity in it (count, first row).
    """
    result = unit_rows_unchecked(table)
    check_finite_rows(result)
    return result


@torch.no_grad()
def unit_rows_unchecked(table: Tensor) -> Tensor:
    """Return `unit_rows` without looking for non-finite rows, which come out as NaN."""
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(
            f"cost embedding: expected a floating matrix [rows, dim], got {table.dtype} with shape "
            f"{list(table.shape)}"
        )
    compute = torch.float64 if table.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(compute).tiny
    result = torch.empty(table.shape, dtype=compute, device=table.device)
    for start, stop in row_blocks(*table.shape):
        rows = result[start:stop].copy_(table[start:stop])
        # By the largest entry first: squares of huge or tiny entries leave the dtype's range.
        largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
        finite = largest.isfinite()
        scale = largest.clamp(min=tiny)
        norm = torch.linalg.vector_norm(rows.div_(scale), dim=1, keepdim=True)
        rows.div_(norm.clamp(min=1.0))
        rows.masked_fill_(scale * norm < tiny, 0).masked_fill_(~finite, torch.nan)
    return result


def check_finite_rows(table: Tensor, when: str = "", first_row: int = 0) -> None:
    """Raise ValueError with the count and the first index of rows with a NaN or an infinity."""
    num_bad, first = 0, -1
    for start, stop in row_blocks(*table.shape):
        bad = (~table[start:stop].isfinite()).any(dim=1).nonzero().flatten()
        if len(bad) and num_bad == 0:
            first = first_row + start + int(bad[0])
        num_bad += len(bad)
    if num_bad:
        raise ValueError(
            f"cost embedding: {num_bad} rows hold NaN or infinity {when}".rstrip()
            + f", the first is row {first}; expected finite rows"
        )


def count_zero_rows(table: Tensor) -> int:
    """Rows that `unit_rows` makes zero."""
    return sum(
        int((unit_rows_unchecked(table[start:stop]) == 0).all(dim=1).sum())
        for start, stop in row_blocks(*table.shape)
    )


def row_blocks(num_rows: int, dim: int) -> Iterator[tuple[int, int]]:
    """Row ranges of a few million entries each."""
    step = max(1, BLOCK_ELEMENTS // max(1, dim))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
