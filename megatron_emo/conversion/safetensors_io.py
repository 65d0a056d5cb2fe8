"""safetensors files read and written a tensor at a time.

The library's own reader maps whole files into memory, and its writer wants all of a file's tensors
at once; here no more than one tensor is held. The format: 8 bytes little-endian with the size of a
JSON header, the header, then the tensors' bytes, row-major and little-endian.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 100_000_000
"""The library's own limit."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str
    """In the words of the format."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return what a file holds, by name.

    Raises:
        ConversionError: not such a file, or one that ends before its tensors do.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if not 0 < header_size <= min(size - 8, _MAX_HEADER):
            raise ConversionError(f"{file}: expected a safetensors file, found {size} bytes")
        try:
            header = json.loads(stream.read(header_size))
        except ValueError as error:
            raise ConversionError(f"{file}: expected a safetensors header: {error}") from error
    header.pop("__metadata__", None)
    base = 8 + header_size
    end = base + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ConversionError(
            f"{file}: expected {end} bytes by its header, found {size}: truncated or damaged"
        )
    return {
        name: StoredTensor(file, base + entry["data_offsets"][0], tuple(entry["shape"]), dtype)
        for name, entry in header.items()
        for dtype in [entry["dtype"]]
    }


def read_tensor(stored: StoredTensor) -> Tensor:
    """Return one tensor, in its stored dtype."""
    tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
    with open(stored.file, "rb") as stream:
        stream.seek(stored.start)
        count = stream.readinto(_bytes_of(tensor))
    if count != tensor.nbytes:
        raise ConversionError(f"{stored.file}: expected {tensor.nbytes} bytes, read {count}")
    return tensor


def write_header(
    stream: BinaryIO,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> None:
    """Write the header of a file with these tensors, whose bytes follow in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + num_bytes(dtype, shape)
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    stream.write(len(data).to_bytes(8, "little") + data)


def write_tensors(stream: BinaryIO, tensors: Iterable[Tensor]) -> None:
    """Write the bytes of tensors, in the order of the header."""
    for tensor in tensors:
        stream.write(_bytes_of(tensor.contiguous()))


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.empty(shape, dtype=dtype, device="meta").nbytes


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
