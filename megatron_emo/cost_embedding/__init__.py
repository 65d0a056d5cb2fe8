"""The cost embedding: a frozen table [vocab_size, dim] whose rows say how far two tokens lie apart.

Predicting j when t is right costs c(j, t) = 1 - <e_j, e_t>, with e the rows at unit length. A row
of zero length (an untrained token, or vocabulary padding) stays zero: it costs 1 against all.
The table is one safetensors file. A rank reads its own rows only, at every start; the table is no
parameter and no module buffer, so that wrappers do not cast it and checkpoints do not hold it.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from megatron_emo.cost_embedding.file import (
    TENSOR_NAME,
    CostEmbeddingInfo,
    open_safetensors,
    verify_cost_embedding,
    write_cost_embedding,
)
from megatron_emo.cost_embedding.rows import check_finite_rows, unit_rows, unit_rows_unchecked
from megatron_emo.vocabulary import fingerprint_tokenizer, fingerprint_vocabulary

__all__ = [
    "CostEmbeddingInfo",
    "CostEmbeddingWarning",
    "adaptive_cost_embedding",
    "check_cost_embedding",
    "fingerprint_tokenizer",
    "fingerprint_vocabulary",
    "load_cost_embedding_shard",
    "unit_rows",
    "verify_cost_embedding",
    "write_cost_embedding",
]

FLAG = "--emo-cost-embedding"


class CostEmbeddingWarning(UserWarning):
    """Something about a cost embedding that is allowed but worth a look."""


def check_cost_embedding(
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    tokenizer_fingerprint: str = "",
    sha256: str = "",
    dim: int | None = None,
) -> CostEmbeddingInfo:
    """Return a file's description after comparing its header with what the model needs.

    Args:
        vocab_size: the model's vocabulary without padding.
        tokenizer_fingerprint: the run's own; compared when both sides know theirs.
        sha256: the table an earlier part of the run used, when it is known.
        dim: the width expected, where it matters.

    Raises:
        FileNotFoundError, ValueError: as `CostEmbeddingInfo.from_file`, or naming what differs.
    """
    info = CostEmbeddingInfo.from_file(path)
    if info.vocab_size != vocab_size:
        raise ValueError(
            f"{FLAG} {path} (source {info.source}): it has {info.vocab_size} rows, the model's "
            f"vocabulary without padding has {vocab_size}; expected the same size"
        )
    known = tokenizer_fingerprint and info.tokenizer_fingerprint
    if known and tokenizer_fingerprint != info.tokenizer_fingerprint:
        raise ValueError(
            f"{FLAG} {path} (source {info.source}): made for the tokenizer with fingerprint "
            f"{info.tokenizer_fingerprint}, this run's tokenizer has {tokenizer_fingerprint}"
        )
    if sha256 and sha256 != info.sha256:
        raise ValueError(
            f"{FLAG} {path} (source {info.source}): its table has sha256 {info.sha256}, expected "
            f"{sha256}, the table this run was started with"
        )
    if dim is not None and dim != info.dim:
        raise ValueError(f"{FLAG} {path}: its rows have {info.dim} columns, expected {dim}")
    return info


def load_cost_embedding_shard(
    path: str | os.PathLike[str],
    *,
    vocab_start_index: int,
    vocab_end_index: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dim: int | None = None,
    tokenizer_fingerprint: str = "",
    sha256: str = "",
) -> Tensor:
    """Return rows [vocab_start_index, vocab_end_index) of the table at unit length, in `dtype`.

    Shape [vocab_end_index - vocab_start_index, dim]. Only these rows are read. Rows from
    `vocab_size` on are vocabulary padding: zero, so that they cost 1. The shard that starts at row
    0 warns (CostEmbeddingWarning) of the zero rows in the whole table, so one TP rank says it.
    The rows are checked to be finite; the sha256 of the whole table is not recomputed.

    Raises:
        FileNotFoundError, ValueError: as `check_cost_embedding`, or a non-finite row.
    """
    info = check_cost_embedding(
        path,
        vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint,
        sha256=sha256,
        dim=dim,
    )
    if not 0 <= vocab_start_index <= vocab_end_index:
        raise ValueError(f"expected 0 <= start <= end, got {vocab_start_index}, {vocab_end_index}")
    if info.num_zero_rows and vocab_start_index == 0:
        warnings.warn(
            f"{FLAG} {path}: {info.num_zero_rows} of {info.vocab_size} rows are zero; these tokens "
            "cost 1 against every other token",
            CostEmbeddingWarning,
            stacklevel=2,
        )
    num_rows = vocab_end_index - vocab_start_index
    shard = torch.zeros(num_rows, info.dim, dtype=dtype, device=device)
    num_real = max(0, min(vocab_end_index, vocab_size) - vocab_start_index)
    if num_real:
        with open_safetensors(path) as file:
            rows = file.get_slice(TENSOR_NAME)[vocab_start_index : vocab_start_index + num_real]
            # A slice is a view of the mapped file; copying it lets go of the mapping.
            shard[:num_real].copy_(_loaded_rows(path, rows, info, vocab_start_index))
    return shard


def adaptive_cost_embedding(
    output_weight: Tensor, *, vocab_start_index: int, vocab_size: int
) -> Tensor:
    """Return the live head's shard [partition_vocab_size, h] at unit length, detached.

    Computed in fp32 (fp64 for fp64); rows from `vocab_size` on are padding and become zero. The
    weight is left as it is. Non-finite weights are passed on, since looking for them would wait for
    the device at every step.
    """
    rows = unit_rows_unchecked(output_weight)
    rows[max(0, vocab_size - vocab_start_index) :] = 0
    return rows


def _loaded_rows(
    path: str | os.PathLike[str], rows: Tensor, info: CostEmbeddingInfo, first_row: int
) -> Tensor:
    """Rows read from a file at unit length; 16-bit rows are normalised again, to undo rounding."""
    exact = info.normalized and rows.dtype in (torch.float32, torch.float64)
    result = rows if exact else unit_rows_unchecked(rows)
    try:
        check_finite_rows(result, first_row=first_row)
    except ValueError as error:
        raise ValueError(f"{FLAG} {path}: {error}") from None
    return result
