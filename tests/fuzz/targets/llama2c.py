"""llama2.c's model file: sizes in front, then fp32 matrices."""

import struct
from pathlib import Path

from guard import Parser

from megatron_emo.conversion.llama2c import Llama2cModel


def parse(data: bytes, folder: Path) -> None:
    path = folder / "model.bin"
    path.write_bytes(data)
    model = Llama2cModel(path)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert total <= len(data)
    model.config()


def seeds() -> list[bytes]:
    dim, hidden, layers, vocab, length = 4, 6, 1, 5, 3
    per_layer = 2 * dim + 4 * dim * dim + 3 * dim * hidden
    rotary = 2 * length * (dim // 2 // 2)
    count = vocab * dim + layers * per_layer + dim + rotary
    header = struct.pack("<7i", dim, hidden, layers, 2, 2, vocab, length)
    untied = struct.pack("<7i", dim, hidden, layers, 2, 2, -vocab, length)
    return [header + bytes(4 * count), untied + bytes(4 * (count + vocab * dim))]


PARSER = Parser(
    parse, seeds, (b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"\0\0\0\0", b"24ka")
)
