"""Principal components of unit rows, against numpy's singular values in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_emo.cost_embedding.rows as rows_module
from megatron_emo.cost_embedding import CostEmbeddingInfo, unit_rows, write_cost_embedding
from megatron_emo.cost_embedding.reduce import principal_components, project_rows, reduce_rows

ROWS, DIM = 90, 12


@pytest.fixture
def unit() -> torch.Tensor:
    """Columns of falling length and a shared direction; row 7 is zero."""
    table = torch.randn(ROWS, DIM) * torch.linspace(3, 0.5, DIM) + 0.8
    table[7] = 0
    return unit_rows(table)


def right_singular_vectors(unit) -> np.ndarray:
    """[D, D], a column for each, the largest singular value first."""
    return np.linalg.svd(unit.double().numpy(), full_matrices=False)[2].T


def truncated(unit, dim) -> np.ndarray:
    """The rows [rows, D] in the space of the leading singular vectors, at unit length."""
    vectors = right_singular_vectors(unit)[:, :dim]
    rows = unit.double().numpy() @ vectors @ vectors.T
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


@pytest.mark.parametrize("dim", [1, 5, DIM])
def test_components_span_the_space_of_the_leading_singular_vectors(unit, dim):
    ours = principal_components(unit, dim).numpy()
    vectors = right_singular_vectors(unit)[:, :dim]
    np.testing.assert_allclose(ours.T @ ours, np.eye(dim), atol=1e-12)
    np.testing.assert_allclose(ours @ ours.T, vectors @ vectors.T, atol=1e-10)
    # In their order too.
    np.testing.assert_allclose(np.abs((ours * vectors).sum(axis=0)), 1.0, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 5, DIM])
@pytest.mark.parametrize("block_elements", [5 * DIM, 1 << 22])
def test_cosines_are_those_of_the_truncated_svd_at_unit_length(
    unit, dim, block_elements, monkeypatch
):
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", block_elements)
    rows, error = reduce_rows(unit, dim)
    assert rows.shape == (ROWS, dim) and rows.dtype == torch.float32
    ours, expected = rows.double().numpy(), truncated(unit, dim)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=1e-6)
    exact = unit.double().numpy()
    difference = (expected @ expected.T - exact @ exact.T)[np.arange(ROWS) != 7]
    difference = difference[:, np.arange(ROWS) != 7]
    assert error.rms == pytest.approx(np.sqrt((difference**2).mean()), abs=1e-7)
    assert error.max == pytest.approx(np.abs(difference).max(), abs=1e-6)
    assert error.num_pairs == (ROWS - 1) ** 2


def test_all_components_keep_every_cosine(unit):
    rows, error = reduce_rows(unit, DIM)
    torch.testing.assert_close(rows @ rows.T, unit @ unit.T, rtol=0, atol=1e-6)
    assert error.max <= 1e-6


def test_a_table_of_few_directions_loses_nothing_however_wide_it_is():
    unit = unit_rows(torch.randn(50, 3) @ torch.randn(3, 64))
    rows, error = reduce_rows(unit, 3)
    torch.testing.assert_close(rows @ rows.T, unit @ unit.T, rtol=0, atol=1e-6)
    assert error.max <= 1e-6


def test_the_direction_that_all_rows_share_is_kept():
    # Centred components would drop it, and turn cosines near 1 into ones near 0.
    shared = torch.zeros(DIM)
    shared[4] = 30.0
    rows, _ = reduce_rows(unit_rows(torch.randn(ROWS, DIM) + shared), 2)
    assert (rows @ rows.T).min() > 0.9


def test_rows_of_zeros_and_rows_outside_the_space_become_zero(unit):
    assert (reduce_rows(unit, 5)[0][7] == 0).all()
    plane = torch.cat([torch.randn(40, 2), torch.zeros(40, 2)], dim=1)
    plane[3] = torch.tensor([1e-7, 0.0, 0.0, 1.0])
    rows, error = reduce_rows(unit_rows(plane), 2)
    lengths = rows.norm(dim=1)
    assert lengths[3] == 0
    np.testing.assert_allclose(np.delete(lengths.numpy(), 3), 1.0, atol=1e-6)
    assert error.max == pytest.approx(1.0)  # with itself


def test_sampled_errors_are_those_of_all_pairs_but_for_the_sample():
    unit = unit_rows(torch.randn(1500, 24))
    rows, error = reduce_rows(unit, 18)
    difference = (rows @ rows.T - unit @ unit.T).double().numpy()
    of_targets = (difference**2).mean(axis=0)
    num_targets = error.num_pairs // 1500
    assert num_targets >= 64
    deviation = of_targets.std() / np.sqrt(num_targets)
    assert error.rms**2 == pytest.approx(of_targets.mean(), abs=3 * deviation)
    largest = np.abs(difference).max(axis=0)
    assert np.median(largest) <= error.max <= largest.max() + 1e-6


def test_float64_rows_stay_float64(unit):
    rows = project_rows(unit.double(), principal_components(unit.double(), 5))
    assert rows.dtype == torch.float64
    ours, expected = rows.numpy(), truncated(unit, 5)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=1e-12)


@pytest.mark.parametrize("dim", [0, -1, DIM + 1])
def test_other_numbers_of_columns_are_refused_by_the_flag(unit, dim):
    message = f"--emo-cost-dim {dim}: expected 1 to {DIM}, the columns of the table"
    with pytest.raises(ValueError, match=message):
        reduce_rows(unit, dim, flag="--emo-cost-dim")


# What the file says of it


def rewrite_header(path, drop=(), **changes):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata = {key: value for key, value in metadata.items() if key not in drop} | changes
    save_file(load_file(path), path, metadata=metadata)


def test_files_from_before_there_was_a_reduction_still_read(unit, tmp_path):
    path = tmp_path / "table.safetensors"
    info = write_cost_embedding(path, unit, source="a test", tokenizer_fingerprint="")
    assert (info.source_dim, info.cosine_error_rms, info.cosine_error_max) == (DIM, 0.0, 0.0)
    rewrite_header(path, drop=("source_dim", "cosine_error_rms", "cosine_error_max"))
    assert CostEmbeddingInfo.from_file(path) == info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_dim": "wide"}, "source_dim: expected a whole number, found wide"),
        ({"cosine_error_rms": "small"}, "cosine_error_rms: expected a number, found small"),
        ({"cosine_error_max": ""}, "cosine_error_max: expected a number, found "),
    ],
)
def test_headers_that_say_nonsense_of_it_are_refused_by_field(unit, tmp_path, changes, message):
    path = tmp_path / "table.safetensors"
    write_cost_embedding(path, unit, source="a test", tokenizer_fingerprint="")
    rewrite_header(path, **changes)
    with pytest.raises(ValueError, match=message):
        CostEmbeddingInfo.from_file(path)
