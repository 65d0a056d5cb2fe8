"""The product of target rows and table, in every dtype a table is held in."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import (
    DTYPES,
    MAX_COST_ERROR,
    cost_error,
    narrow_rows,
    widen_rows,
)
from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.loss.target_cost import cost_of_targets

PRODUCT_BOUND = {"fp32": 1e-6, "bf16": 1e-5, "fp8": 1e-3}
"""Of the root mean square error of costs over their mean, against float64 from the same narrow
values. Products of bf16 numbers are exact in fp32, only the sums round; the fp8 tensor cores of
Hopper keep about 14 bits of a sum."""


def check_narrow_tables(settings: Settings, record: Record) -> None:
    """Costs from fp32, bf16 and fp8 tables against float64 of the same values."""
    # Multiples of 16, which the fp8 product of the tensor cores asks for, and sizes that are not.
    shapes = ((320, 48), (301, 45)) if settings.small else ((16384, 4096), (50257, 768))
    for vocab_size, dim in shapes:
        unit = make_table(vocab_size, dim, settings.device)
        target = torch.arange(0, vocab_size, max(1, vocab_size // 64), device=settings.device)
        for name, dtype in DTYPES.items():
            table = narrow_rows(unit.clone(), dtype)
            case = f"{name} V={vocab_size} d={dim}"
            error = product_error(table, target)
            record.bound(f"{case}: product", error, PRODUCT_BOUND[name])
            if name != "fp32":
                off = cost_error(unit, table)
                record.bound(f"{case}: costs against fp32's", off, MAX_COST_ERROR)


def make_table(vocab_size: int, dim: int, device: str) -> Tensor:
    """Return unit rows [V, D] fp32 with neighbours: costs from near 0 to above 1."""
    generator = torch.Generator(device).manual_seed(3)
    centres = torch.randn(64, dim, device=device, generator=generator)
    nearest = torch.randint(0, 64, (vocab_size,), device=device, generator=generator)
    noise = torch.randn(vocab_size, dim, device=device, generator=generator)
    return unit_rows(centres[nearest].add_(noise, alpha=0.5))


def product_error(table: Tensor, target: Tensor) -> float:
    """Return the root mean square error of costs [U, V] over their mean."""
    costs = cost_of_targets(table.index_select(0, target), table, torch.float32)
    wide = widen_rows(table.cpu(), torch.float64)
    exact = 1.0 - wide[target.cpu()] @ wide.T
    # Nobody reads a target's own column.
    others = torch.ones_like(exact, dtype=torch.bool)
    others.scatter_(1, target.cpu()[:, None], False)
    error = costs.double().cpu()[others] - exact.clamp_(min=0.0)[others]
    return (error.square().mean().sqrt() / exact[others].mean()).item()
