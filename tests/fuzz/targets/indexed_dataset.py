"""An .idx beside an honest .bin."""

import struct
from pathlib import Path

import numpy as np
from guard import Parser

from megatron_emo.data.check import check_indexed_dataset

BIN = np.arange(6, dtype=np.uint16).tobytes()


def parse(data: bytes, folder: Path) -> None:
    (folder / "data.idx").write_bytes(data)
    (folder / "data.bin").write_bytes(BIN)
    found = check_indexed_dataset(str(folder / "data"), 100)
    assert found.num_tokens * found.dtype.itemsize == len(BIN)


def seeds() -> list[bytes]:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2, 3)
    numbers = np.array([4, 2], np.int32), np.array([0, 8], np.int64), np.array([0, 1, 2], np.int64)
    return [header + b"".join(array.tobytes() for array in numbers)]


PARSER = Parser(
    parse, seeds, (b"\xff" * 8, b"\0" * 8, b"\x01" + b"\0" * 7, b"\xff\xff\xff\x7f", b"\5")
)
