"""Narrow cost tables: what they cost in accuracy, what is refused, and how they are multiplied."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_emo.cost_embedding.rows as rows_module
from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import (
    DTYPES,
    FP8_SCALE,
    cosine_error,
    cost_error,
    narrow_rows,
    narrow_rows_checked,
    rotate_rows,
    select_rows,
    widen_rows,
)
from megatron_emo.loss import target_cost
from megatron_emo.loss.target_cost import cost_of_targets
from megatron_emo.reference import reference_loss

FP8 = DTYPES["fp8"]


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


# The rotation before fp8


@pytest.mark.parametrize(("dim", "width"), [(48, 48), (10, 16), (33, 48), (1, 16)])
def test_rotation_is_the_orthonormal_cosine_transform_after_signs(dim, width):
    rotated = rotate_rows(torch.eye(dim, dtype=torch.float64), width).numpy()
    i, k = np.arange(dim)[:, None], np.arange(width)[None, :]
    cosines = np.sqrt(2 / width) * np.cos(np.pi * (2 * i + 1) * k / (2 * width))
    cosines[:, 0] /= np.sqrt(2)
    signs = np.sign(rotated[:, :1])
    np.testing.assert_allclose(rotated, signs * cosines, rtol=0, atol=1e-14)
    assert dim < 10 or 0.2 < (signs < 0).mean() < 0.8


def test_rotation_keeps_inner_products_and_is_always_the_same():
    rows = torch.randn(20, 37)
    rotated = rotate_rows(rows, 48)
    assert rotated.shape == (20, 48) and rotated.dtype == torch.float32
    torch.testing.assert_close(rotated @ rotated.T, rows @ rows.T, rtol=0, atol=3e-5)
    torch.manual_seed(99)
    assert torch.equal(rotate_rows(rows, 48), rotated)


def outlier_table(rows, dim):
    """Three long columns, and a direction that all rows share."""
    table = torch.randn(rows, dim)
    table[:, :3] *= 10
    table[:, 0] += 10
    return unit_rows(table + 0.2 * torch.randn(dim))


def test_rotation_takes_fp8_back_to_the_error_of_a_table_without_structure():
    isotropic, outliers = unit_rows(torch.randn(1000, 768)), outlier_table(1000, 768)
    even = 0.037 / math.sqrt(768)
    for unit, spoilt in ((isotropic, 1.0), (outliers, 5.5)):
        before = cosine_error(unit, (unit * FP8_SCALE).to(FP8)).rms
        after = cosine_error(unit, narrow_rows(unit, FP8)).rms
        assert before == pytest.approx(spoilt * even, rel=0.1)
        assert after == pytest.approx(even, rel=0.1)


def test_fp8_rows_of_zeros_stay_zero_and_widths_are_multiples_of_16():
    for dim, width in ((10, 16), (16, 16), (48, 48), (50, 64)):
        narrow = narrow_rows(table(dim=dim), FP8)
        assert narrow.shape == (200, width) and narrow.dtype == FP8
        assert (narrow.float()[7] == 0).all()
    assert narrow_rows(narrow, FP8) is narrow


class LargestStorage(TorchDispatchMode):
    """Notes the bytes of the largest tensor made that is not fp8; what is there already is not."""

    def __init__(self, there):
        super().__init__()
        self.there, self.bytes = there.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype != FP8:
            storage = out.untyped_storage()
            if storage.data_ptr() != self.there:
                self.bytes = max(self.bytes, storage.nbytes())
        return out


def test_blocks_give_the_same_rows_and_no_wide_copy_of_the_table(monkeypatch):
    unit = table(rows=200, dim=64)
    whole = narrow_rows(unit, FP8)
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 7 * 64)
    with LargestStorage(unit) as made:
        blocks = narrow_rows(unit, FP8)
    assert torch.equal(blocks.view(torch.uint8), whole.view(torch.uint8))
    assert 0 < made.bytes <= 7 * 64 * 8  # complex64


# Errors of cosines


def test_cosine_error_of_a_small_table_is_over_all_pairs():
    unit = table(rows=100, dim=32)
    narrow = narrow_rows(unit, FP8)
    kept = [i for i in range(100) if i != 7]
    exact, other = (widen_rows(x, torch.float64).numpy()[kept] for x in (unit, narrow))
    difference = other @ other.T - exact @ exact.T
    error = cosine_error(unit, narrow)
    assert error.rms == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-12)
    assert error.max == pytest.approx(np.abs(difference).max(), rel=1e-12)
    assert error.mean_cost == pytest.approx((1 - exact @ exact.T).mean(), rel=1e-12)
    assert error.num_pairs == 99 * 99
    assert cost_error(unit, narrow) == pytest.approx(error.rms / error.mean_cost, rel=1e-12)


def test_cosine_error_of_a_large_table_is_a_sample_the_same_in_blocks(monkeypatch):
    unit = table(rows=1000, dim=32)
    narrow = narrow_rows(unit, FP8)
    error = cosine_error(unit, narrow)
    assert 64 <= error.num_pairs / 999 < 128
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 1000)
    again = cosine_error(unit, narrow)
    assert (again.rms, again.max) == pytest.approx((error.rms, error.max), rel=1e-12)


@pytest.mark.parametrize("name", list(DTYPES))
def test_selected_rows_are_those_at_the_index(name):
    narrow = narrow_rows(table(), DTYPES[name])
    index = torch.tensor([3, 7, 3, 199])
    chosen = select_rows(narrow, index)
    assert chosen.dtype == narrow.dtype
    assert torch.equal(chosen.double(), narrow.double()[index])


# Products


@pytest.fixture
def products(monkeypatch):
    """Return run(table, capability, ...) -> (costs, the products that were asked for).

    A CUDA device is imitated where it differs from a CPU: mm has no fp32 result for bf16 there.
    torch._scaled_mm is the real one.
    """
    asked = []
    real_mm, real_scaled_mm = torch.mm, torch._scaled_mm

    def mm(a, b, *, out_dtype=None, out=None):
        asked.append((a.dtype, b.dtype, out_dtype))
        if out_dtype is None:
            return real_mm(a, b, out=out)
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return real_mm(a.float(), b.float())

    def scaled_mm(a, b, scale_a, scale_b, *, out_dtype):
        asked.append((a.dtype, b.dtype, out_dtype))
        # What cuBLAS asks for beyond what the CPU's twin does.
        assert a.is_contiguous() and b.stride(0) == 1
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        return real_scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)

    def run(table, capability, rows, compute=torch.float32, can_widen=True):
        asked.clear()
        monkeypatch.setattr(target_cost, "_capability", lambda device: capability)
        monkeypatch.setattr(target_cost, "_mm_can_widen", lambda: can_widen)
        return cost_of_targets(rows, table, compute), set(asked)

    return run


F32, BF16 = torch.float32, torch.bfloat16
FP8_PRODUCT, BF16_PRODUCT, F32_PRODUCT = (FP8, FP8, F32), (BF16, BF16, F32), (F32, F32, None)


@pytest.mark.parametrize(
    ("name", "num_rows", "capability", "can_widen", "product"),
    [
        ("fp8", 208, (9, 0), True, FP8_PRODUCT),
        ("fp8", 208, (8, 9), False, FP8_PRODUCT),
        ("fp8", 201, (9, 0), True, BF16_PRODUCT),
        ("fp8", 208, (8, 0), True, BF16_PRODUCT),
        ("fp8", 201, (9, 0), False, F32_PRODUCT),
        ("fp8", 208, (7, 5), True, F32_PRODUCT),
        ("fp8", 208, (0, 0), True, F32_PRODUCT),
        ("bf16", 201, (9, 0), True, BF16_PRODUCT),
        ("bf16", 208, (8, 0), False, F32_PRODUCT),
        ("bf16", 208, (0, 0), True, F32_PRODUCT),
        ("fp32", 208, (9, 0), True, F32_PRODUCT),
    ],
)
def test_products_run_where_they_should_and_give_the_tables_own_values(
    products, monkeypatch, name, num_rows, capability, can_widen, product
):
    narrow = narrow_rows(table(rows=num_rows, dim=50), DTYPES[name])
    monkeypatch.setitem(target_cost._WIDEN_BYTES, "cpu", 4 * narrow.shape[1] * 60)
    index = torch.tensor([5, 7, 0, 199, 5])
    wide = widen_rows(narrow, torch.float64)
    exact = (1 - wide[index] @ wide.T).clamp(min=0)
    own = select_rows(narrow, index)
    widened = [widen_rows(own, BF16)] if name == "fp8" else []
    for rows in (own, *widened):
        cost, asked = products(narrow, capability, rows, can_widen=can_widen)
        assert asked == {product}
        assert cost.dtype == F32
        torch.testing.assert_close(cost.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_float64_loss_multiplies_in_float64_on_any_device(products, name):
    narrow = narrow_rows(table(rows=208), DTYPES[name])
    cost, asked = products(narrow, (9, 0), narrow[:4], torch.float64)
    assert asked == {(torch.float64, torch.float64, None)}
    wide = widen_rows(narrow, torch.float64)
    torch.testing.assert_close(cost, (1 - wide[:4] @ wide.T).clamp(min=0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", list(DTYPES))
def test_no_targets_have_no_costs(products, name):
    narrow = narrow_rows(table(rows=208), DTYPES[name])
    cost, _ = products(narrow, (9, 0), narrow[:0])
    assert cost.shape == (0, 208) and cost.dtype == F32
