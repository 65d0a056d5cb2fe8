"""The CSV and JSON lines of a task."""

from functools import partial
from pathlib import Path

from guard import Parser, parse_any

from megatron_emo.evaluation.icl_data import read_task_data
from megatron_emo.evaluation.icl_tasks import parse_task

TASK = {
    "name": "mine",
    "template": "{text} is {label}",
    "labels": {"0": "bad", "1": "good"},
    "columns": {"text": "text", "label": "label"},
}


def read(kind: str, path: Path) -> None:
    fields = TASK | {"format": kind, "files": {"test": path.name}}
    read_task_data(parse_task(fields | ({"header": True} if kind == "csv" else {})), path.parent)


def parse(data: bytes, folder: Path) -> None:
    paths = {kind: folder / f"a.{kind}" for kind in ("csv", "jsonl", "label-text")}
    for path in paths.values():
        path.write_bytes(data)
    parse_any(partial(read, kind, path) for kind, path in paths.items())


def seeds() -> list[bytes]:
    return [b'text,label\n"a, b",1\nc,0\n', b'{"text": "a", "label": "1"}\n', b"1 good\n0 bad\n"]


PARSER = Parser(
    parse, seeds, (b'"', b"\0", b"\r", b"x" * 140_000, b"[" * 3000, b",,,", b"\xff", b'{"text":')
)
