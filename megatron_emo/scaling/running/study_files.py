"""Names in a study's folder, and files in it that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN_LOCK = ".run.lock"
"""Held by the runner and by torchrun while a run is at work."""
RANKS_LOCK = ".ranks.lock"
"""Held, shared, by the run's ranks (training/result.py)."""


def run_folder(output: Path, name: str) -> Path:
    """Return a run's folder."""
    return output / "runs" / name


def result_file(folder: Path) -> Path:
    """Return where a run's result lies."""
    return folder / "result.json"


def checkpoints_of(folder: Path) -> Path:
    """Return a run's --save folder."""
    return folder / "train" / "checkpoints"


def write_durably(path: Path, text: str, is_script: bool = False) -> None:
    """Write a text file to the disk, whole or not at all.

    As `checkpoints.files` does, whose package brings torch, which a runner goes without.

    Raises:
        OSError: the former content is then still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if is_script:
            part.chmod(0o755)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_if_changed(path: Path, text: str, is_script: bool = False) -> bool:
    """Write a text file where it has another content; returns whether it was written."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text, is_script)
    return True


def to_json(content: Any) -> str:
    """Return JSON text of plain values that are finite."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Let one process at a time write plan, manifest and scripts; others wait."""
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / ".writing.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def take_lock(path: Path) -> int | None:
    """Return a descriptor that holds a lock file alone, None where another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_locked(path: Path) -> bool:
    """Return whether any process holds a lock file, in whatever way."""
    if not path.exists():
        return False
    descriptor = take_lock(path)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False
