"""llama2.c's tokenizer file."""

import struct
from pathlib import Path

from guard import Parser

from megatron_emo.conversion.llama2c_tokenizer import read_vocabulary

PIECES = [
    b"<unk>",
    b"\n<s>\n",
    b"\n</s>\n",
    *(b"<0x%02X>" % byte for byte in range(256)),
    b"a",
    b"b",
    b"ab",
]


def parse(data: bytes, folder: Path) -> None:
    path = folder / "tokenizer.bin"
    path.write_bytes(data)
    vocabulary = read_vocabulary(path, len(PIECES))
    vocabulary.merges()


def seeds() -> list[bytes]:
    pieces = (struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate(PIECES))
    return [struct.pack("<i", 7) + b"".join(pieces)]


PARSER = Parser(
    parse, seeds, (b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\xff", b"\0\0\0\0", b"<0x41>")
)
