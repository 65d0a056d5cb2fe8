"""The cost embedding's file and rows, against numpy, hashlib and the safetensors library itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import megatron_emo.cost_embedding.file as file_module
import megatron_emo.cost_embedding.rows as rows_module
from megatron_emo.cost_embedding import (
    CostEmbeddingInfo,
    CostEmbeddingWarning,
    adaptive_cost_embedding,
    check_cost_embedding,
    load_cost_embedding_shard,
    unit_rows,
    verify_cost_embedding,
    write_cost_embedding,
)

REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB_SIZE, DIM = 21, 6


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, DIM)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cost_embedding.safetensors"


def write(path, table, **settings) -> CostEmbeddingInfo:
    settings = {"source": "a test", "tokenizer_fingerprint": "f00d"} | settings
    return write_cost_embedding(path, table, **settings)


def rewrite_header(path, **changes) -> None:
    """Write the file anew with other metadata; None removes a field."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"] | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(path), path, metadata=metadata)


# The file


def test_written_rows_are_plain_safetensors_and_the_info_describes_them(table, path):
    table[3] = 0.0
    info = write(path, table)
    stored = load_file(path)
    assert list(stored) == ["cost_embedding"]
    assert torch.equal(stored["cost_embedding"], unit_rows(table))
    assert info == CostEmbeddingInfo(
        source="a test",
        vocab_size=VOCAB_SIZE,
        dim=DIM,
        dtype="float32",
        normalized=True,
        tokenizer_fingerprint="f00d",
        num_zero_rows=1,
        sha256=hashlib.sha256(stored["cost_embedding"].numpy().tobytes()).hexdigest(),
    )
    assert CostEmbeddingInfo.from_file(path) == info
    assert verify_cost_embedding(path) == info


@pytest.mark.parametrize("tied", [True, False, None])
def test_the_revision_and_whether_the_head_is_tied_are_in_the_header(table, path, tied):
    write(path, table, revision="iteration 7", tied=tied)
    info = CostEmbeddingInfo.from_file(path)
    assert (info.revision, info.tied) == ("iteration 7", tied)
    with safe_open(path, "np") as file:
        header = file.metadata()
    assert header["revision"] == "iteration 7"
    assert header["tied"] == {True: "True", False: "False", None: ""}[tied]


def test_a_file_from_before_these_fields_is_read(table, path):
    info = write(path, table, revision="iteration 7", tied=True)
    rewrite_header(path, revision=None, tied=None)
    assert verify_cost_embedding(path) == dataclasses.replace(info, revision="", tied=None)


def test_sha256_runs_over_blocks_as_over_the_whole(table, path, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 4 * DIM)
    info = write(path, table.t().contiguous().t(), dtype=torch.bfloat16)
    stored = load_file(path)["cost_embedding"]
    raw = stored.view(torch.int16).numpy().tobytes()
    assert info.sha256 == hashlib.sha256(raw).hexdigest()
    assert verify_cost_embedding(path).sha256 == info.sha256


def test_rows_may_be_stored_as_they_are(table, path):
    table[4] = 1e-40
    info = write(path, table, normalize=False)
    assert (info.normalized, info.num_zero_rows) == (False, 1)
    assert torch.equal(load_file(path)["cost_embedding"], table)


def test_values_that_the_stored_dtype_cannot_hold_are_refused(table, path):
    table[5] = 1e6
    with pytest.raises(ValueError, match=r"1 rows .*float16.* row 5"):
        write(path, table, normalize=False, dtype=torch.float16)
    assert not path.exists()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_tables_without_rows_or_columns_are_refused(path, shape):
    with pytest.raises(ValueError, match="expected rows and columns"):
        write(path, torch.ones(shape))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(table, path, monkeypatch):
    before = write(path, table)

    def half_a_file(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(file_module, "save_file", half_a_file)
    with pytest.raises(OSError, match="No space"):
        write(path, table + 1)
    assert verify_cost_embedding(path) == before
    assert os.listdir(path.parent) == [path.name]


def test_verify_finds_one_flipped_bit(table, path):
    write(path, table)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    assert CostEmbeddingInfo.from_file(path).dim == DIM
    with pytest.raises(ValueError, match=rf"{path.name}: sha256 of the rows: expected \w+, found"):
        verify_cost_embedding(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format: expected megatron_emo.cost_embedding, found None"),
        ({"format_version": "2"}, "format_version: expected 1, found 2"),
        ({"sha256": None}, "sha256: expected present, found missing"),
        ({"vocab_size": "many"}, "vocab_size: expected a whole number, found many"),
        ({"normalized": "1"}, "normalized: expected True or False, found 1"),
        ({"tied": "yes"}, "tied: expected True or False, found yes"),
        ({"vocab_size": "20"}, r"shape: expected \[20, 6\], found \[21, 6\]"),
        ({"dtype": "float16"}, "dtype: expected float16, found float32"),
    ],
)
def test_headers_that_are_not_ours_are_refused_by_field(table, path, changes, message):
    write(path, table)
    rewrite_header(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        CostEmbeddingInfo.from_file(path)
    assert str(path) in str(caught.value)


def test_another_tensor_name_is_refused(table, path):
    info = write(path, table)
    metadata = {key: str(value) for key, value in dataclasses.asdict(info).items()}
    metadata |= {"format": "megatron_emo.cost_embedding", "format_version": "1"}
    save_file({"weight": table}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"expected \['cost_embedding'\], found \['weight'\]"):
        CostEmbeddingInfo.from_file(path)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty"])
def test_what_is_no_safetensors_file_is_refused_without_running_it(table, path, damage):
    if damage == "pickle":
        torch.save({"cost_embedding": table}, path)
    else:
        write(path, table)
        path.write_bytes(path.read_bytes()[:-10] if damage == "truncated" else b"")
    with pytest.raises(ValueError, match=f"{path.name}: expected a safetensors file"):
        load_shard(path, 0, VOCAB_SIZE)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CostEmbeddingInfo.from_file(tmp_path / "nowhere")


# Shards


def load_shard(path, start, end, **settings):
    settings = {"vocab_size": VOCAB_SIZE} | settings
    return load_cost_embedding_shard(path, vocab_start_index=start, vocab_end_index=end, **settings)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_shards_together_are_the_padded_table(table, path, tp_size, normalize):
    write(path, table, normalize=normalize)
    part = 32 // tp_size
    shards = [load_shard(path, rank * part, (rank + 1) * part) for rank in range(tp_size)]
    whole = torch.cat(shards)
    assert torch.equal(whole[:VOCAB_SIZE], unit_rows(table))
    assert torch.equal(whole[VOCAB_SIZE:], torch.zeros(32 - VOCAB_SIZE, DIM))


def test_a_shard_of_padding_alone_is_zero(table, path):
    write(path, table)
    assert torch.equal(load_shard(path, 24, 32), torch.zeros(8, DIM))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_16_bit_files_does_not_change_the_length_of_rows(table, path, dtype):
    write(path, table, dtype=dtype)
    shard = load_shard(path, 0, VOCAB_SIZE)
    assert shard.dtype == torch.float32
    np.testing.assert_allclose(shard.norm(dim=1), 1.0, atol=2e-7)
    assert load_shard(path, 0, VOCAB_SIZE, dtype=torch.bfloat16).dtype == torch.bfloat16


class RowRecorder:
    """Stands in front of safe_open and notes which rows are asked for."""

    asked: list[slice] = []

    def __init__(self, *args, **kwargs) -> None:
        self.file = REAL_OPEN(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name):
        assert name != "get_tensor", "the whole table was read"
        return getattr(self.file, name)

    def get_slice(self, name):
        recorder, rows = self, self.file.get_slice(name)

        class Rows:
            get_shape, get_dtype = rows.get_shape, rows.get_dtype

            def __getitem__(self, index):
                recorder.asked.append(index)
                return rows[index]

        return Rows()


REAL_OPEN = file_module.safe_open


def test_a_rank_asks_for_its_own_rows_only(table, path, monkeypatch):
    write(path, table)
    monkeypatch.setattr(file_module, "safe_open", RowRecorder)
    monkeypatch.setattr(RowRecorder, "asked", [])
    load_shard(path, 16, 24)
    assert RowRecorder.asked == [slice(16, 21)]
    RowRecorder.asked.clear()
    load_shard(path, 24, 32)
    CostEmbeddingInfo.from_file(path)
    assert RowRecorder.asked == []


def test_a_shard_keeps_no_memory_but_its_own_rows(table, path):
    write(path, table)
    shard = load_shard(path, 4, 8)
    assert shard.untyped_storage().nbytes() == 4 * DIM * 4
    path.write_bytes(b"")
    assert torch.equal(shard, unit_rows(table)[4:8])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
def test_loading_a_shard_takes_memory_for_the_shard_not_for_the_table(path):
    write(path, torch.ones(64 * 1024, 512))
    program = (
        "import sys; from megatron_emo.cost_embedding import load_cost_embedding_shard as load\n"
        "def peak(): return int(next(line for line in open('/proc/self/status')"
        " if line.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "load(sys.argv[1], vocab_start_index=1024, vocab_end_index=2048, vocab_size=64 * 1024)\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, cwd=REPOSITORY, check=True
    )
    # The table has 128 MiB, the shard 2 MiB.
    assert int(result.stdout) < 32 * 1024


def test_another_vocabulary_size_is_refused_with_both_sizes(table, path):
    write(path, table)
    with pytest.raises(ValueError, match=r"--emo-cost-embedding .*21 rows.*has 22"):
        load_shard(path, 0, 11, vocab_size=22)


def test_another_table_tokenizer_or_width_is_refused(table, path):
    info = write(path, table)
    same = {"tokenizer_fingerprint": "f00d", "sha256": info.sha256, "dim": DIM}
    assert check_cost_embedding(path, vocab_size=VOCAB_SIZE, **same) == info
    with pytest.raises(ValueError, match=r"a test.*fingerprint f00d.*has beef"):
        check_cost_embedding(path, vocab_size=VOCAB_SIZE, tokenizer_fingerprint="beef")
    with pytest.raises(ValueError, match=rf"--emo-cost-embedding .*{info.sha256}, expected 0123"):
        check_cost_embedding(path, vocab_size=VOCAB_SIZE, sha256="0123")
    with pytest.raises(ValueError, match="have 6 columns, expected 7"):
        load_shard(path, 0, 8, dim=7)


def test_an_unknown_tokenizer_on_either_side_is_accepted(table, path):
    write(path, table, tokenizer_fingerprint="")
    assert check_cost_embedding(path, vocab_size=VOCAB_SIZE, tokenizer_fingerprint="beef")
    write(path, table)
    assert check_cost_embedding(path, vocab_size=VOCAB_SIZE)


def test_zero_rows_are_warned_of_with_their_number_by_the_first_shard_only(table, path):
    table[2] = table[20] = 0.0
    write(path, table)
    with pytest.warns(CostEmbeddingWarning, match="2 of 21 rows are zero"):
        load_shard(path, 0, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_shard(path, 16, 32)[4], torch.zeros(DIM))


@pytest.mark.parametrize("normalized", ["True", "False"])
def test_non_finite_rows_in_a_file_are_named_by_their_row_in_the_table(path, table, normalized):
    write(path, table)
    table[18, 1] = torch.nan
    raw = path.read_bytes()
    path.write_bytes(raw[: -table.nbytes] + table.numpy().tobytes())
    rewrite_header(path, normalized=normalized)
    with pytest.raises(ValueError, match=rf"{path.name}: .*1 rows .*first is row 18"):
        load_shard(path, 16, 32)


# The live head


def test_the_adaptive_view_is_the_heads_unit_rows_with_zero_padding():
    weight = torch.nn.Parameter(torch.randn(8, DIM, dtype=torch.bfloat16))
    before = weight.detach().clone()
    rows = adaptive_cost_embedding(weight, vocab_start_index=16, vocab_size=21)
    assert not rows.requires_grad and rows.dtype == torch.float32
    assert torch.equal(rows[:5], unit_rows(weight)[:5])
    assert torch.equal(rows[5:], torch.zeros(3, DIM))
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize(("start", "num_live"), [(0, 8), (16, 5), (24, 0)])
def test_the_adaptive_view_zeroes_padding_wherever_the_shard_lies(start, num_live):
    weight = torch.randn(8, DIM)
    rows = adaptive_cost_embedding(weight, vocab_start_index=start, vocab_size=21)
    assert int(rows.any(dim=1).sum()) == num_live


def test_the_package_needs_neither_megatron_nor_transformers():
    program = (
        "import sys; sys.modules['megatron'] = sys.modules['transformers'] = None\n"
        "import megatron_emo.cost_embedding, megatron_emo.cost_embedding.sources\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
