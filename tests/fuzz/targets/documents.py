"""JSON lines and text as the preprocessing reads them."""

import gzip
import json
from functools import partial
from pathlib import Path

from guard import Parser, parse_any

from megatron_emo.data.documents import DocumentReader, InputFormat, decode_document


def read(path: Path) -> None:
    try:
        for document in DocumentReader([path], InputFormat()):
            decode_document(document, ("text",))
    except ValueError as error:
        assert str(error).startswith(f"{path}:"), error
        raise


def parse(data: bytes, folder: Path) -> None:
    paths = [folder / name for name in ("a.jsonl", "a.txt", "a.jsonl.gz")]
    for path in paths:
        path.write_bytes(data)
    parse_any(partial(read, path) for path in paths)


def seeds() -> list[bytes]:
    lines = [{"text": "one\ntwo"}, {"text": "\u00e9\u2581"}, {"text": "", "more": [1, {}]}]
    plain = "\n".join(json.dumps(line) for line in lines).encode()
    return [plain, gzip.compress(plain), "eins\n\nzwei \u00e9\n".encode()]


PARSER = Parser(
    parse,
    seeds,
    (
        b'{"text":',
        b'"\\ud800"',
        b"\xff",
        b"\0",
        b"\xef\xbb\xbf",
        b"1" * 5000,
        b"[" * 3000,
        b"NaN",
        b"\r",
    ),
)
