"""safetensors files read and written a tensor at a time.

The library's own reader maps whole files into memory, and its writer wants all of a file's tensors
at once; here no more than one tensor is held. The format: 8 bytes little-endian with the size of a
JSON header, the header, then the tensors' bytes, row-major and little-endian.
"""

from __future__ import annotations

import json
import math
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
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{file}: expected a safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{file}: expected a safetensors header, found a {type(header)}")
    header.pop("__metadata__", None)
    found = {name: _stored(file, name, header[name], 8 + header_size) for name in header}
    end = 8 + header_size
    for name, (tensor, num_bytes_stored) in sorted(found.items(), key=_start):
        if tensor.start != end:
            raise ConversionError(
                f"{file}: {name} begins at byte {tensor.start}, expected {end}, where the tensor "
                "before it ends"
            )
        end += num_bytes_stored
    if end != size:
        raise ConversionError(
            f"{file}: expected {end} bytes by its header, found {size}: truncated or damaged"
        )
    return {name: tensor for name, (tensor, _) in found.items()}


def _start(item: tuple[str, tuple[StoredTensor, int]]) -> tuple[int, int]:
    tensor, num_bytes_stored = item[1]
    return tensor.start, num_bytes_stored


def _stored(file: Path, name: str, entry: Any, base: int) -> tuple[StoredTensor, int]:
    """Return where a tensor lies, and its bytes by its offsets."""
    entry = entry if isinstance(entry, dict) else {}
    offsets, shape, dtype = (entry.get(key) for key in ("data_offsets", "shape", "dtype"))
    are_whole = all(
        isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        for numbers in (offsets, shape)
    )
    if not are_whole or len(offsets) != 2 or offsets[0] > offsets[1] or not isinstance(dtype, str):
        raise ConversionError(f"{file}: {name}: expected dtype, shape and offsets, found {entry}")
    count = offsets[1] - offsets[0]
    if dtype in DTYPES and count != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ConversionError(f"{file}: {name}: found {count} bytes for {dtype} of shape {shape}")
    return StoredTensor(file, base + offsets[0], tuple(shape), dtype), count


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
