"""Triton row kernels K1 (statistics) and K2 (gradient); products stay with cuBLAS.

One program works off one row of K1 in one read of logits and costs, with a running maximum, so its
sums have a fixed order: no atomics, the same bits every time. K2 writes each element once, into the
logits' own buffer if asked. Offsets are 64-bit: N * V/tp passes 2^31. Arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_emo.loss.statistics import EXP_UNDERFLOW, Columns, Layout, TokenGradient

_STATISTICS_BLOCK = 4096
_GRADIENT_BLOCK = 4096


@triton.jit
def _statistics_kernel(
    z_ptr,
    cost_ptr,
    cost_row_ptr,
    column_ptr,
    owned_ptr,
    out_ptr,
    num_rows,
    num_columns,
    z_stride,
    cost_stride,
    UNDERFLOW: tl.constexpr,
    HAS_COST: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # No column is -1, so a shard that does not own the target masks nothing.
    target = tl.where(tl.load(owned_ptr + row) != 0, tl.load(column_ptr + row), -1)
    z_row = z_ptr + row * z_stride
    if HAS_COST:
        cost_of_row = cost_ptr + tl.load(cost_row_ptr + row).to(tl.int64) * cost_stride
    row_max = -float("inf")
    target_logit = -float("inf")
    sum_exp = 0.0
    sum_cost = 0.0
    sum_logit = 0.0
    argmax = 0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(z_row + columns, mask=inside, other=-float("inf")).to(tl.float32)
        block_max = tl.max(z, axis=0)
        if WITH_ARGMAX:
            first = tl.min(tl.where(z == block_max, columns, num_columns), axis=0)
            argmax = tl.where(block_max > row_max, first, argmax)
        new_max = tl.maximum(row_max, block_max)
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        rescale = tl.exp(row_max - shift)
        is_target = columns == target
        target_logit = tl.maximum(
            target_logit, tl.max(tl.where(is_target, z, -float("inf")), axis=0)
        )
        shifted = z - shift
        exp_z = tl.where(is_target, 0.0, tl.exp(shifted))  # columns outside hold exp(-inf)
        if WITH_ENTROPY:
            # The sum of e^z z so far was about the old maximum.
            moved = tl.maximum(row_max - shift, UNDERFLOW)
            products = exp_z * tl.maximum(shifted, UNDERFLOW)
            sum_logit = rescale * (sum_logit + sum_exp * moved) + tl.sum(products, axis=0)
        sum_exp = sum_exp * rescale + tl.sum(exp_z, axis=0)
        if HAS_COST:
            cost = tl.load(cost_of_row + columns, mask=inside, other=0.0).to(tl.float32)
            sum_cost = sum_cost * rescale + tl.sum(exp_z * cost, axis=0)
        row_max = new_max
    tl.store(out_ptr + row, row_max)
    tl.store(out_ptr + num_rows + row, target_logit)
    tl.store(out_ptr + 2 * num_rows + row, sum_exp)
    if HAS_COST:
        tl.store(out_ptr + 3 * num_rows + row, sum_cost)
    if WITH_ENTROPY:
        tl.store(out_ptr + (3 + HAS_COST) * num_rows + row, sum_logit)
    if WITH_ARGMAX:
        tl.store(out_ptr + (3 + HAS_COST + WITH_ENTROPY) * num_rows + row, argmax.to(tl.float32))


@triton.jit
def _gradient_kernel(
    z_ptr,
    out_ptr,
    cost_ptr,
    cost_row_ptr,
    column_ptr,
    owned_ptr,
    keep_ptr,
    logits_max_ptr,
    log_sum_exp_ptr,
    mle_weight_ptr,
    emo_weight_ptr,
    emo_loss_ptr,
    at_target_ptr,
    num_columns,
    z_stride,
    out_stride,
    cost_stride,
    HAS_COST: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    target = tl.where(tl.load(owned_ptr + row) != 0, tl.load(column_ptr + row), -1)
    z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # Two subtractions: at |z| = 1e4 a single log-normaliser has no digits left for log_sum_exp.
    q = tl.exp((z - tl.load(logits_max_ptr + row)) - tl.load(log_sum_exp_ptr + row))
    factor = tl.load(mle_weight_ptr + row)
    if HAS_COST:
        cost_of_row = cost_ptr + tl.load(cost_row_ptr + row).to(tl.int64) * cost_stride
        cost = tl.load(cost_of_row + columns, mask=inside, other=0.0).to(tl.float32)
        factor = factor + tl.load(emo_weight_ptr + row) * (cost - tl.load(emo_loss_ptr + row))
    gradient = tl.where(columns == target, tl.load(at_target_ptr + row), q * factor)
    if HAS_KEEP:
        gradient = tl.where(tl.load(keep_ptr + row) != 0, gradient, 0.0)
    out = gradient.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, out, mask=inside)


def row_statistics(
    z: Tensor, target: Columns, cost: Tensor | None, cost_row: Tensor | None, layout: Layout
) -> Tensor:
    """Return [layout.count, n] fp32 as `kernels.row_statistics`; z is only read, once."""
    num_rows, num_columns = z.shape
    out = torch.empty(layout.count, num_rows, dtype=torch.float32, device=z.device)
    if num_rows:
        column, owned = _flat(target)
        _statistics_kernel[(num_rows,)](
            z,
            cost,
            cost_row,
            column,
            owned,
            out,
            num_rows,
            num_columns,
            z.stride(0),
            0 if cost is None else cost.stride(0),
            UNDERFLOW=EXP_UNDERFLOW,
            HAS_COST=cost is not None,
            WITH_ENTROPY=layout.entropy,
            WITH_ARGMAX=layout.argmax,
            BLOCK=min(_STATISTICS_BLOCK, triton.next_power_of_2(num_columns)),
        )
    return out


def row_gradient(
    z: Tensor,
    out: Tensor,
    target: Columns,
    token: TokenGradient,
    cost: Tensor | None,
    cost_row: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """Return `out` as `kernels.row_gradient`; each element is read and written once."""
    num_rows, num_columns = z.shape
    if num_rows:
        column, owned = _flat(target)
        block = min(_GRADIENT_BLOCK, triton.next_power_of_2(num_columns))
        _gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
            z,
            out,
            cost,
            cost_row,
            column,
            owned,
            None if keep is None else keep.to(torch.int8),
            *(x.contiguous() for x in token),
            num_columns,
            z.stride(0),
            out.stride(0),
            0 if cost is None else cost.stride(0),
            HAS_COST=cost is not None,
            HAS_KEEP=keep is not None,
            BLOCK=block,
        )
    return out


def _flat(target: Columns) -> tuple[Tensor, Tensor]:
    return target.column[:, 0].contiguous(), target.owned[:, 0].to(torch.int8)
