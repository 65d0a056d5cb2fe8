"""Checks of an indexed data set that Megatron's own reader does not make.

A truncated .bin, an .idx that belongs to another .bin, or tokens of another tokenizer are read
without an error by megatron-core 0.19, and train a model on noise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
# The codes of megatron.core.datasets.indexed_dataset.DType that can hold a token.
_TOKEN_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class IndexedDatasetSummary:
    """What `check_indexed_dataset` found in a sound data set."""

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int
    num_tokens_checked: int
    """Tokens compared with the vocabulary size; fewer than num_tokens in a large data set."""
    max_token: int
    """Largest of them."""


def check_indexed_dataset(
    prefix: str, vocab_size: int, max_tokens_checked: int | None = 1 << 28
) -> IndexedDatasetSummary:
    """Check `{prefix}.bin` and `{prefix}.idx` against each other and the vocabulary.

    Both sizes must be what the index says, pointers must follow from lengths, document bounds must
    ascend to the number of sequences, and tokens must lie in [0, vocab_size). Reads local files;
    numpy and the .idx alone, no collective: meant for one rank at the start of training.

    Args:
        prefix: path without suffix, as in --data-path.
        vocab_size: the tokenizer's size, before padding.
        max_tokens_checked: a larger data set is sampled in evenly spaced blocks of about a million
            tokens; None reads every token.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: naming the file, what it holds and what was expected.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise FileNotFoundError(f"--data-path {prefix}: {path} does not exist")
    dtype, lengths, document_bounds = _read_index(idx_path)
    num_tokens = int(lengths.sum(dtype=np.int64))
    _check_bin_size(bin_path, idx_path, num_tokens, dtype)
    tokens = np.memmap(bin_path, dtype=dtype, mode="r")
    num_checked, max_token = _check_tokens(bin_path, tokens, vocab_size, max_tokens_checked)
    return IndexedDatasetSummary(
        prefix=prefix,
        dtype=dtype,
        num_sequences=len(lengths),
        num_documents=len(document_bounds) - 1,
        num_tokens=num_tokens,
        num_tokens_checked=num_checked,
        max_token=max_token,
    )


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Return token dtype, sequence lengths [n] int32 and document bounds [d + 1] int64."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        header = handle.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise ValueError(f"{path}: not a Megatron index (no MMIDIDX header; {size} bytes)")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
        if version != 1:
            raise ValueError(f"{path}: index version {version}, expected 1")
        if code not in _TOKEN_DTYPES:
            raise ValueError(f"{path}: dtype code {code} is no integer type of an indexed data set")
        # Before anything is read: the counts of a damaged header can be astronomical.
        expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size not in (expected, expected + num_sequences):  # multimodal: a byte per sequence
            raise ValueError(
                f"{path}: {size} bytes, expected {expected} for the {num_sequences} sequences and "
                f"{num_bounds} document bounds that its header names: truncated or damaged"
            )
        lengths = np.fromfile(handle, dtype=np.int32, count=num_sequences)
        pointers = np.fromfile(handle, dtype=np.int64, count=num_sequences)
        bounds = np.fromfile(handle, dtype=np.int64, count=num_bounds)
    dtype = np.dtype(_TOKEN_DTYPES[code])
    _check_index(path, dtype, lengths, pointers, bounds)
    return dtype, lengths, bounds


def _check_index(
    path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray
) -> None:
    if len(lengths) == 0:
        raise ValueError(f"{path}: the data set is empty (0 sequences)")
    if (lengths < 0).any():
        index = int((lengths < 0).argmax())
        raise ValueError(f"{path}: sequence {index} has length {lengths[index]}")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    wrong = pointers != np.concatenate(([0], ends[:-1]))
    if wrong.any():
        index = int(wrong.argmax())
        expected = ends[index - 1] if index else 0
        raise ValueError(
            f"{path}: sequence {index} starts at byte {pointers[index]}, expected {expected}, "
            "where the one before it ends"
        )
    is_ascending = len(bounds) >= 2 and bounds[0] == 0 and (np.diff(bounds) >= 0).all()
    if not is_ascending or bounds[-1] != len(lengths):
        raise ValueError(
            f"{path}: document bounds must ascend from 0 to {len(lengths)} (the number of "
            f"sequences); found {len(bounds)} of them, ending {bounds[-3:].tolist()}"
        )


def _check_bin_size(bin_path: Path, idx_path: Path, num_tokens: int, dtype: np.dtype) -> None:
    size, expected = bin_path.stat().st_size, num_tokens * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{bin_path}: {size} bytes, expected {expected} ({num_tokens} tokens of {dtype} in "
            f"{idx_path}): truncated, or the two files are not a pair"
        )
    if size == 0:
        raise ValueError(f"{bin_path}: the data set is empty (0 tokens)")


def _check_tokens(
    path: Path, tokens: np.ndarray, vocab_size: int, max_tokens_checked: int | None
) -> tuple[int, int]:
    """Return how many tokens were looked at, and the largest of them."""
    starts = np.arange(0, len(tokens), _BLOCK_TOKENS)
    if max_tokens_checked is not None and len(tokens) > max_tokens_checked:
        num_blocks = max(2, max_tokens_checked // _BLOCK_TOKENS)  # the first and the last at least
        starts = starts[np.linspace(0, len(starts) - 1, num_blocks).round().astype(int)]
    num_checked, max_token = 0, 0
    for start in starts:
        block = tokens[start : start + _BLOCK_TOKENS]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocab_size:
            position = int(start) + int(((block < 0) | (block >= vocab_size)).argmax())
            raise ValueError(
                f"{path}: token {position} is {tokens[position]}, expected an id in "
                f"[0, {vocab_size}): the data was made with another tokenizer or is damaged"
            )
        num_checked += len(block)
        max_token = max(max_token, high)
    return num_checked, max_token
