"""Narrow cost tables: what they cost in accuracy, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import (
    DTYPES,
    cost_error,
    narrow_rows,
    narrow_rows_checked,
    widen_rows,
)
from megatron_emo.reference import reference_loss


def table(rows=200, dim=256):
    unit = unit_rows(torch.randn(rows, dim))
    unit[7] = 0
    return unit


@pytest.mark.parametrize(("name", "bound"), [("fp32", 1e-12), ("bf16", 1e-3), ("fp8", 4e-3)])
def test_expected_cost_keeps_its_digits_however_sure_the_model_is(name, bound):
    unit = table()
    narrow = narrow_rows(unit, DTYPES[name])
    logits = torch.randn(30, 200)
    target = torch.randint(0, 200, (30,))
    for boost in (0.0, 8.0, 14.0):  # up to q_t = .9999
        logits[torch.arange(30), target] = boost
        ours = vocab_parallel_loss(
            logits, target, build_objective("emo"), narrow, cost_embedding_is_normalized=True
        ).emo_loss
        exact = reference_loss(logits.double(), target, "emo", unit.double()).emo_loss
        assert ((ours - exact).abs() / exact).max() <= max(bound, 1e-6)
        assert (ours > 0).all()


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_the_values_are_those_of_the_rounded_table(name):
    # Nothing but the table's own rounding: the reference on the widened rows agrees to fp32.
    narrow = narrow_rows(table(), DTYPES[name])
    wide = widen_rows(narrow, torch.float64)
    hidden, weight = torch.randn(20, 8), torch.randn(200, 8, requires_grad=True)
    target = torch.randint(0, 200, (20,))
    out = fused_linear_loss(
        hidden,
        weight,
        target,
        build_objective("emo1"),
        narrow,
        cost_embedding_is_normalized=True,
    )
    logits = hidden.double() @ weight.detach().double().T
    q = torch.softmax(logits, 1)
    cost = 1 - wide @ wide[target].T
    cost[target, torch.arange(20)] = 0
    torch.testing.assert_close(out.emo_loss.double(), (q * cost.T).sum(1), rtol=1e-5, atol=1e-5)


def test_the_error_is_of_the_size_that_eight_bits_have():
    unit = table(rows=500, dim=1024)
    # e4m3 rounds an entry by up to 1/16 of it: 0.037 rms, averaged over 1024 products.
    assert cost_error(unit, narrow_rows(unit, DTYPES["fp8"])) == pytest.approx(
        0.037 / 1024**0.5, rel=0.3
    )
    assert cost_error(unit, unit) == 0.0
    assert cost_error(torch.zeros(4, 3), torch.zeros(4, 3)) == 0.0


def test_a_table_that_fp8_spoils_is_refused_by_the_flag():
    outliers = torch.randn(200, 64)
    outliers[:, 0] += 200.0  # one direction that all rows share: what is left lies below e4m3
    message = r"--emo-cost-dtype fp8: costs of this table would be off by .*%, expected at most 1%"
    with pytest.raises(ValueError, match=message):
        narrow_rows_checked(unit_rows(outliers), DTYPES["fp8"], "--emo-cost-dtype")
    narrow, error = narrow_rows_checked(table(), DTYPES["fp8"], "--emo-cost-dtype")
    assert narrow.dtype == torch.float8_e4m3fn and error < 0.01
