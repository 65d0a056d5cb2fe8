"""The data check against sound pairs written by Megatron's builder, and damaged copies of them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_emo.data.check import check_indexed_dataset
from megatron_emo.data.upstream import import_indexed_dataset

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 2]]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "megatron_indexed"
HEADER_BYTES = 34


@pytest.fixture
def write(tmp_path):
    """Return write(name, documents, dtype): a pair's prefix, written by Megatron's builder."""

    def write_pair(name="data", documents=DOCUMENTS, dtype=np.uint16) -> str:
        builder = import_indexed_dataset().IndexedDatasetBuilder(
            str(tmp_path / f"{name}.bin"), dtype=dtype
        )
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        return str(tmp_path / name)

    return write_pair


def patch(path: str, offset: int, data: bytes) -> None:
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(data)] = data
    Path(path).write_bytes(content)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_sound_pair_is_counted(write, dtype):
    found = check_indexed_dataset(write(dtype=dtype), vocab_size=13)
    assert (found.num_documents, found.num_sequences, found.num_tokens) == (3, 3, 9)
    assert (found.num_tokens_checked, found.max_token, found.dtype) == (9, 12, dtype)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(write, suffix):
    prefix = write()
    Path(prefix + suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"--data-path .*data: .*data\{suffix} does not"):
        check_indexed_dataset(prefix, 13)


def test_every_truncation_of_either_file_is_refused(write):
    for suffix in (".bin", ".idx"):
        prefix = write()
        whole = Path(prefix + suffix).read_bytes()
        for size in range(len(whole)):
            Path(prefix + suffix).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=rf"data\{suffix}: .*{size} bytes"):
                check_indexed_dataset(prefix, 13)


def test_an_index_of_another_pair_is_refused_with_both_sizes(write):
    prefix, other = write(), write("other", [[1, 2], [3]])
    Path(prefix + ".idx").write_bytes(Path(other + ".idx").read_bytes())
    with pytest.raises(ValueError, match=r"data\.bin: 18 bytes, expected 6 .* are not a pair"):
        check_indexed_dataset(prefix, 13)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "index version 2, expected 1"),
        (17, b"\x06", "dtype code 6 is no integer type"),
        (17, b"\x63", "dtype code 99 is no integer type"),
        (18, struct.pack("<Q", 2**63), "truncated or damaged"),
        (26, struct.pack("<Q", 2**63), "truncated or damaged"),
        (HEADER_BYTES, struct.pack("<i", -3), "sequence 0 has length -3"),
        (HEADER_BYTES + 12, struct.pack("<q", 2), "sequence 0 starts at byte 2, expected 0"),
        (HEADER_BYTES + 20, struct.pack("<q", 4), "sequence 1 starts at byte 4, expected 6"),
        (HEADER_BYTES + 36 + 8, struct.pack("<q", 3), r"must ascend from 0 to 3 .*ending"),
        (HEADER_BYTES + 36, struct.pack("<q", 1), r"must ascend from 0 to 3 .*ending"),
        (HEADER_BYTES + 36 + 24, struct.pack("<q", 4), r"must ascend from 0 to 3 .*ending"),
    ],
)
def test_a_damaged_index_is_refused(write, offset, data, message):
    prefix = write()
    patch(prefix + ".idx", offset, data)
    with pytest.raises(ValueError, match=rf"data\.idx: .*{message}"):
        check_indexed_dataset(prefix, 13)


def test_an_index_with_a_changed_length_is_refused(write):
    prefix = write()
    patch(prefix + ".idx", HEADER_BYTES + 8, struct.pack("<i", 4))  # the last: no pointer after it
    with pytest.raises(ValueError, match=r"data\.bin: 18 bytes, expected 16"):
        check_indexed_dataset(prefix, 13)


def test_no_changed_byte_of_the_index_escapes(write):
    """Lengths, pointers, bounds and counts are all implied by one another and by the .bin."""
    prefix = write()
    whole = Path(prefix + ".idx").read_bytes()
    escaped = []
    for offset in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            patch(prefix + ".idx", offset, bytes([whole[offset] ^ flip]))
            try:
                check_indexed_dataset(prefix, 13)
            except ValueError:
                pass
            else:
                escaped.append((offset, flip))
        Path(prefix + ".idx").write_bytes(whole)
    # Only this is unknowable: where documents end between two sequences, while still ascending.
    bounds = range(HEADER_BYTES + 36 + 8, HEADER_BYTES + 36 + 24)
    assert [offset for offset, _ in escaped if offset not in bounds] == []


@pytest.mark.parametrize(
    ("dtype", "bad"), [(np.uint16, 13), (np.uint16, 65535), (np.int32, 13), (np.int32, -1)]
)
def test_a_token_outside_the_vocabulary_is_located(write, dtype, bad):
    prefix = write(documents=[[5, 6], [7, bad, 8]], dtype=dtype)
    with pytest.raises(ValueError, match=rf"data\.bin: token 3 is {bad}, .* \[0, 13\)"):
        check_indexed_dataset(prefix, 13)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_an_empty_data_set_is_refused(write, documents):
    with pytest.raises(ValueError, match="the data set is empty"):
        check_indexed_dataset(write(documents=documents), 13)


def test_a_large_data_set_is_sampled_from_end_to_end(write):
    block = 1 << 20
    tokens = np.zeros(5 * block + 3, dtype=np.uint16)
    for position, is_seen in ((0, True), (len(tokens) - 1, True), (block + 5, False)):
        tokens[:] = 0
        tokens[position] = 99
        prefix = write(documents=[tokens])
        if is_seen:
            with pytest.raises(ValueError, match=f"token {position} is 99"):
                check_indexed_dataset(prefix, 13, max_tokens_checked=2 * block)
        else:
            found = check_indexed_dataset(prefix, 13, max_tokens_checked=2 * block)
            assert found.num_tokens_checked == block + 3
    with pytest.raises(ValueError, match=f"token {block + 5} is 99"):
        check_indexed_dataset(prefix, 13, max_tokens_checked=None)


@pytest.mark.skipif(not SHARED.exists(), reason="no data set made by Megatron-DeepSpeed here")
@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("meg-gpt2-openwebtext_text_document", 5000), ("ag_news_prompt_inputs_document", 250_880)],
)
@pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")
def test_data_sets_of_megatron_deepspeed_are_counted_as_megatron_counts_them(name, vocab_size):
    found = check_indexed_dataset(str(SHARED / name), vocab_size)
    dataset = import_indexed_dataset().IndexedDataset(str(SHARED / name))
    tokens = np.concatenate([dataset[index] for index in range(len(dataset))])
    assert found.num_documents == len(dataset.document_indices) - 1
    assert (found.num_tokens, found.max_token) == (len(tokens), tokens.max())
    assert found.dtype == dataset.index.dtype
    with pytest.raises(ValueError, match="another tokenizer"):
        check_indexed_dataset(str(SHARED / name), int(tokens.max()))
