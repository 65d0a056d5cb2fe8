"""Rows at unit length, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import megatron_emo.cost_embedding.rows as rows_module
from megatron_emo.cost_embedding import unit_rows

VOCAB_SIZE, DIM = 21, 6


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, DIM)


def unit_rows_in_numpy(table: torch.Tensor) -> np.ndarray:
    rows = table.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("block_elements", [1, 40, 1 << 22])
def test_unit_rows_are_the_rows_over_their_norms(table, monkeypatch, block_elements):
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", block_elements)
    np.testing.assert_allclose(unit_rows(table), unit_rows_in_numpy(table), rtol=0, atol=2e-7)


def test_unit_rows_computes_float64_in_float64(table):
    rows = unit_rows(table.double())
    assert rows.dtype == torch.float64
    np.testing.assert_allclose(rows, unit_rows_in_numpy(table), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unit_rows_computes_16_bit_tables_in_float32(table, dtype):
    rows = unit_rows(table.to(dtype))
    assert rows.dtype == torch.float32
    expected = unit_rows_in_numpy(table.to(dtype))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-7)


def test_rows_without_a_direction_become_zero_and_never_nan():
    table = torch.ones(5, 4)
    table[1] = 0.0
    table[2] = 1e-40
    table[3] = -0.0
    assert unit_rows(table).tolist() == [[0.5] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.5] * 4]


def test_rows_whose_squares_leave_float32_keep_their_direction():
    table = torch.tensor([[3e30, -4e30], [3e-30, 4e-30], [3.4e38, 3.4e38]])
    expected = torch.tensor([[0.6, -0.8], [0.6, 0.8], [0.5**0.5, 0.5**0.5]])
    torch.testing.assert_close(unit_rows(table), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_rows_are_counted_and_the_first_is_named(table, monkeypatch, value):
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 3 * DIM)
    table[7, 2] = table[7, 3] = table[15, 0] = value
    with pytest.raises(ValueError, match=r"2 rows hold NaN or infinity.*first is row 7"):
        unit_rows(table)


def test_unit_rows_leaves_its_input_alone_and_takes_no_gradient(table):
    table.requires_grad_()
    before = table.detach().clone()
    rows = unit_rows(table)
    assert not rows.requires_grad
    assert torch.equal(table.detach(), before)
    again = rows.clone()
    unit_rows(rows)
    assert torch.equal(rows, again)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.long)])
def test_unit_rows_refuses_what_is_no_floating_matrix(bad):
    with pytest.raises(ValueError, match="floating matrix"):
        unit_rows(bad)
