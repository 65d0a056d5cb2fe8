"""The file of a cost embedding: one safetensors tensor and a header that says what it is."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_emo.cost_embedding.rows import (
    check_finite_rows,
    count_zero_rows,
    row_blocks,
    unit_rows,
)

TENSOR_NAME = "cost_embedding"
FILE_FORMAT = "megatron_emo.cost_embedding"
FORMAT_VERSION = "1"

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class CostEmbeddingInfo:
    """What a cost embedding file says about itself."""

    source: str
    """Where the rows come from, in words, such as "hf:DIR"."""
    vocab_size: int
    """Rows; the tokenizer's vocabulary without padding."""
    dim: int
    """Columns; free, the model's hidden size plays no part."""
    dtype: str
    """What the rows are stored in: float64, float32, float16 or bfloat16."""
    normalized: bool
    """Whether the rows had unit length (or zero) before they were rounded to `dtype`."""
    tokenizer_fingerprint: str
    """See `fingerprint_tokenizer`; empty when unknown."""
    num_zero_rows: int
    """Rows without a direction; they cost 1 against every other token."""
    sha256: str
    """Of the tensor's bytes, row after row."""
    source_dim: int = 0
    """Columns before a reduction to principal components; `dim` (0 stands for it) without one."""
    cosine_error_rms: float = 0.0
    """What the reduction did to the cosines of sampled pairs of rows, before rounding to `dtype`;
    root mean square."""
    cosine_error_max: float = 0.0
    """The same, largest."""
    revision: str = ""
    """Which state of the source: the commit of a Hugging Face snapshot, or "iteration 1000" of a
    checkpoint; empty when unknown, as in files that were written before there was this field."""
    tied: bool | None = None
    """Whether the rows are the source model's input embedding, too; None when unknown."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source_dim", self.source_dim or self.dim)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> CostEmbeddingInfo:
        """Return what the header says; no row is read.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, not one of ours, or header and tensor disagree.
        """
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            _expect(path, "format", metadata.get("format"), FILE_FORMAT)
            _expect(path, "format_version", metadata.get("format_version"), FORMAT_VERSION)
            _expect(path, "tensors", sorted(file.keys()), [TENSOR_NAME])
            rows = file.get_slice(TENSOR_NAME)
            shape, dtype = list(rows.get_shape()), rows.get_dtype()
        info = _info_from_metadata(path, metadata)
        _expect(path, "shape", shape, [info.vocab_size, info.dim])
        _expect(path, "dtype", _DTYPE_NAMES.get(dtype, dtype), info.dtype)
        return info


def write_cost_embedding(
    path: str | os.PathLike[str],
    table: Tensor,
    *,
    source: str,
    tokenizer_fingerprint: str,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    source_dim: int = 0,
    cosine_error_rms: float = 0.0,
    cosine_error_max: float = 0.0,
    revision: str = "",
    tied: bool | None = None,
) -> CostEmbeddingInfo:
    """Write `table` [vocab_size, dim] as a cost embedding file and return its description.

    The file appears whole or not at all: it is written beside `path`, synced, then renamed over it.
    The arguments from `source_dim` on describe where the table comes from: see `CostEmbeddingInfo`.

    Raises:
        ValueError: an empty or non-finite table, or values that `dtype` cannot hold.
    """
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"cost embedding: expected rows and columns, got {list(table.shape)}")
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"cost embedding: expected a floating dtype to store, got {dtype}")
    rows = (unit_rows(table) if normalize else table.detach()).to("cpu", dtype).contiguous()
    check_finite_rows(rows, f"after the cast to {dtype}")
    info = CostEmbeddingInfo(
        source=source,
        vocab_size=rows.shape[0],
        dim=rows.shape[1],
        dtype=str(dtype).removeprefix("torch."),
        normalized=normalize,
        tokenizer_fingerprint=tokenizer_fingerprint,
        num_zero_rows=count_zero_rows(rows),
        sha256=_sha256(rows[start:stop] for start, stop in row_blocks(*rows.shape)),
        source_dim=source_dim,
        cosine_error_rms=cosine_error_rms,
        cosine_error_max=cosine_error_max,
        revision=revision,
        tied=tied,
    )
    metadata = {name: "" if value is None else str(value) for name, value in asdict(info).items()}
    metadata |= {"format": FILE_FORMAT, "format_version": FORMAT_VERSION}
    with _atomic_target(Path(path)) as temporary:
        save_file({TENSOR_NAME: rows}, temporary, metadata=metadata)
    return info


def verify_cost_embedding(path: str | os.PathLike[str]) -> CostEmbeddingInfo:
    """Return the description of a file whose rows still have the sha256 its header states.

    Reads the whole file, block after block. Raises what `CostEmbeddingInfo.from_file` raises, and
    ValueError with both hashes when they differ.
    """
    info = CostEmbeddingInfo.from_file(path)
    with open_safetensors(path) as file:
        rows = file.get_slice(TENSOR_NAME)
        blocks = row_blocks(info.vocab_size, info.dim)
        found = _sha256(rows[start:stop] for start, stop in blocks)
    _expect(path, "sha256 of the rows", found, info.sha256)
    return info


def _sha256(blocks: Iterator[Tensor]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _info_from_metadata(
    path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> CostEmbeddingInfo:
    values: dict[str, Any] = {}
    for field in fields(CostEmbeddingInfo):
        default = "" if field.default is None else str(field.default)
        text = metadata.get(field.name, None if field.default is MISSING else default)
        _expect(path, field.name, "missing" if text is None else "present", "present")
        values[field.name] = text
    for name in ("vocab_size", "dim", "num_zero_rows", "source_dim"):
        if not values[name].isdecimal():
            _expect(path, name, values[name], "a whole number")
        values[name] = int(values[name])
    for name in ("cosine_error_rms", "cosine_error_max"):
        try:
            values[name] = float(values[name])
        except ValueError:
            _expect(path, name, values[name], "a number")
    for name, unknown in (("normalized", ()), ("tied", ("",))):
        if values[name] not in ("True", "False", *unknown):
            _expect(path, name, values[name], "True or False")
        values[name] = None if values[name] == "" else values[name] == "True"
    return CostEmbeddingInfo(**values)


def _expect(path: str | os.PathLike[str], field: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(
            f"cost embedding file {path}: {field}: expected {expected}, found {found} "
            "(tools/prepare_cost_embedding.py makes such files)"
        )


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"cost embedding file {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"cost embedding file {path}: expected a safetensors file: {error}"
        ) from error


@contextmanager
def _atomic_target(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path`, durably, when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
