"""Texts from files."""

from __future__ import annotations

import json
import os
from pathlib import Path


def read_texts(path: str | os.PathLike, field: str = "text", limit: int | None = None) -> list[str]:
    """Return the texts of a file, at most `limit` of them.

    Args:
        path: .jsonl, one object a line; .json, a list of objects or strings, or an object of lists;
            any other, one text a line, empty lines left out.
        field: which of an object's values is the text.
        limit: take the first ones.

    Raises:
        ValueError: a line that is not JSON, an object without the field, a text that is not a
            string, or no text at all; the file and the line named.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {limit}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, byte {error.start} is not") from error
    if path.suffix == ".jsonl":
        rows = [
            (f"{path}:{number}", _parse(line, f"{path}:{number}"))
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    elif path.suffix == ".json":
        rows = _rows_of_json(_parse(content, str(path)), path, field)
    else:
        rows = [(str(path), line) for line in content.split("\n") if line.strip()]
    texts = [_text_of(row, field, where) for where, row in rows[:limit]]
    if not texts:
        raise ValueError(f"{path}: expected texts, found none")
    return texts


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of 5000 digits, endless nesting
        raise ValueError(f"{where}: expected JSON: {error}") from error


def _rows_of_json(content, path: Path, field: str) -> list[tuple[str, object]]:
    if isinstance(content, dict):
        if not isinstance(content.get(field), list):
            lists = sorted(key for key, value in content.items() if isinstance(value, list))
            raise ValueError(f"{path}: --field: expected one of {lists}, got {field!r}")
        content = content[field]
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of texts, got {type(content).__name__}")
    return [(f"{path}[{index}]", row) for index, row in enumerate(content)]


def _text_of(row, field: str, where: str) -> str:
    if isinstance(row, dict):
        if field not in row:
            raise ValueError(f"{where}: --field: expected one of {sorted(row)}, got {field!r}")
        row = row[field]
    if not isinstance(row, str):
        raise ValueError(f"{where}: expected a string, got {type(row).__name__}")
    return row
