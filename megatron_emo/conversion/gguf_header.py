"""The front of a GGUF file walked within its bounds, before a reader believes what it says.

Little-endian: "GGUF", uint32 version, uint64 tensors, uint64 pairs; each pair is a string, a
uint32 type and a value; each tensor a string, uint32 dimensions, as many uint64, a uint32 type and
a uint64 offset. A string is a uint64 and as many bytes, an array a uint32 type, a uint64 count and
values. The gguf package goes on reading an array of a count that no file holds.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from megatron_emo.conversion.errors import ConversionError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type: integers and floats of 1 to 8 bytes, and truth values."""
_MAX_DIMENSIONS = 8


def check_gguf_header(path: Path) -> None:
    """Check that every count and length in front of the tensors fits into the file.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: another kind of file, a damaged one, or one that was cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--gguf {path}: no such file")
    with open(path, "rb") as stream:
        magic = stream.read(len(_MAGIC))
        if magic != _MAGIC:
            raise ConversionError(f"--gguf {path}: it begins with {magic!r}, expected {_MAGIC!r}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path, data).all()


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._place = path, data, len(_MAGIC)

    def all(self) -> None:
        version, num_tensors, num_pairs = self._numbers("<IQQ")
        if version not in _VERSIONS:
            raise self._error(f"version {version}, expected one of {_VERSIONS}")
        for _ in range(num_pairs):  # ends where the file does, whatever the number
            self._string()
            self._value(*self._numbers("<I"))
        for _ in range(num_tensors):
            self._string()
            (num_dimensions,) = self._numbers("<I")
            if num_dimensions > _MAX_DIMENSIONS:
                raise self._error(
                    f"{num_dimensions} dimensions, expected at most {_MAX_DIMENSIONS}"
                )
            self._skip(8 * num_dimensions + 4)
            (offset,) = self._numbers("<Q")
            if offset > len(self._data):
                raise self._error(f"a tensor at byte {offset} behind")

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            kind, count = self._numbers("<IQ")
            if kind == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._skip(self._size(kind) * count)
        else:
            self._skip(self._size(kind))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise self._error(f"type {kind}")
        return _SIZES[kind]

    def _string(self) -> None:
        self._skip(*self._numbers("<Q"))

    def _numbers(self, layout: str) -> tuple[int, ...]:
        start = self._place
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._place:
            raise self._error(f"{count} bytes")
        self._place += count

    def _error(self, found: str) -> ConversionError:
        return ConversionError(
            f"--gguf {self._path}: damaged or cut off: found {found} at byte {self._place} of "
            f"{len(self._data)}"
        )
