"""Texts, records and rows that the evaluation reads."""

import json
from functools import partial
from pathlib import Path

from guard import Parser, parse_any

from megatron_emo.evaluation.records import SCHEMA, read_records
from megatron_emo.evaluation.rows import read_rows
from megatron_emo.evaluation.texts import read_texts


def parse(data: bytes, folder: Path) -> None:
    readers = {
        **dict.fromkeys(("a.jsonl", "a.json", "a.txt"), read_texts),
        "rows.jsonl": read_rows,
        "records.json": lambda path: read_records([path]),
    }
    for name in readers:
        (folder / name).write_bytes(data)
    parse_any(partial(read, folder / name) for name, read in readers.items())


def seeds() -> list[bytes]:
    record = {"metric": "ppl", "value": 1.5, "unit": "", "definition": "d", "n": 3}
    record["interval"] = {"low": 1.0, "high": 2.0, "level": 0.95, "method": "m"}
    content = {"schema": SCHEMA, "records": [record]}
    rows = '{"text": "a"}\n{"text": "b", "settings": "0"}\n'
    return [json.dumps(content).encode(), rows.encode(), b'["a", {"text": "b"}]', b"a\nb\n"]


PARSER = Parser(
    parse,
    seeds,
    (
        b'"records":',
        b"null",
        b"[" * 3000,
        b'"n":"x"',
        b"NaN",
        b"1e999",
        b"1" * 5000,
        b"\xff",
        b"{}",
    ),
)
