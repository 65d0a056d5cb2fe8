"""Results and tables that are there whole or not at all, whenever their writer stops.

Not brought to the disk: what must outlive a machine's fall is written by `checkpoints.files` or
`scaling.running.study_files`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file, UTF-8 where it is text; folders that lack are made.

    Raises:
        OSError: the former content is then still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON of plain values; as `write_whole`.

    Raises:
        ValueError: a number that is not finite.
    """
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Write a JSON value a line; as `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: str | os.PathLike, names: Sequence[str], rows: Iterable[Mapping]) -> None:
    """Write a head and a line for each row, cells beyond `names` left out; as `write_whole`."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())
