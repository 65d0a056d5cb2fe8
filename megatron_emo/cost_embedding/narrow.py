"""Narrow copies of unit rows: bf16, or fp8 (e4m3) with a constant scale.

The entries of a unit row lie in [-1, 1], so no scale needs to be looked for: times 256 they stay
below e4m3's 448, and clear of its subnormal range for any usual width. A tensor of dtype
float8_e4m3fn means such rows throughout this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_SCALE = 256.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
MAX_COST_ERROR = 0.01
_SAMPLED_TARGETS = 64


def narrow_rows(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return unit rows [rows, dim] in `dtype`; the same tensor if it has it already."""
    if dtype == torch.float8_e4m3fn:
        return (unit * FP8_SCALE).to(dtype)
    return unit.to(dtype)


def widen_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of any of `DTYPES` as unit rows in a wide dtype; exact."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.to(dtype).mul_(1 / FP8_SCALE)
    return rows.to(dtype)


@torch.no_grad()
def cost_error(unit: Tensor, narrow: Tensor) -> float:
    """Return the root mean square error of costs over their mean, for targets spread over the rows.

    A cost is 1 - <e_j, e_t>. This is the error of an expected cost whose mass lies on one token;
    mass spread over many averages it out. Rows of zeros, exact in any dtype, are left out.

    Args:
        unit: [rows, dim] unit rows.
        narrow: the same, narrowed.
    """
    kept = (unit != 0).any(dim=1).nonzero()[:, 0]
    if len(kept) < 2:
        return 0.0
    targets = kept[:: max(1, len(kept) // _SAMPLED_TARGETS)]
    wide = widen_rows(narrow[kept], torch.float32)
    exact = 1.0 - unit[kept].float() @ unit[targets].float().T
    error = 1.0 - wide @ widen_rows(narrow[targets], torch.float32).T - exact
    return (error.square().mean().sqrt() / exact.mean()).item()


def narrow_rows_checked(unit: Tensor, dtype: torch.dtype, flag: str) -> tuple[Tensor, float]:
    """Return (narrow rows, their `cost_error`).

    Raises:
        ValueError: an error above 1%, naming `flag`.
    """
    narrow = narrow_rows(unit, dtype)
    error = cost_error(unit, narrow)
    if error > MAX_COST_ERROR:
        name = next(name for name, value in DTYPES.items() if value == dtype)
        raise ValueError(
            f"{flag} {name}: costs of this table would be off by {error:.2%}, expected at most "
            f"{MAX_COST_ERROR:.0%}; use a wider dtype"
        )
    return narrow, error
