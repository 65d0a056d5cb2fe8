"""Stamps: what made a task's files, kept beside its log, so that it need not be made again."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_emo.whole_files import write_json

HASHED_BYTES = 64 << 20
"""Files up to this size are told apart by what they hold, larger ones by size and time."""


@dataclass(frozen=True)
class Stamp:
    """A command, its environment and its inputs, as hashes."""

    command: str
    env: str
    inputs: Mapping[str, str]
    """{path: fingerprint}"""
    seconds: float = 0.0
    """Wall time the command took."""

    @classmethod
    def take(cls, command: Sequence[str], env: Mapping[str, str], inputs: Sequence[Path]) -> Stamp:
        """Return the stamp of a command on its inputs as they are now."""
        return cls(
            _hash(list(command)),
            _hash(sorted(env.items())),
            {str(path): fingerprint(path) for path in inputs},
        )


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """Return a hash of a file, or of the names and files under a folder.

    A file that was copied or unpacked again is the same; above `HASHED_BYTES` size and time decide.
    """
    if not path.exists():
        return "missing"
    if not path.is_dir():
        return _hash(_file_state(path))
    files = sorted(Path(root, name) for root, _, names in os.walk(path) for name in names)
    return _hash([[str(file.relative_to(path)), *_file_state(file)] for file in files])


def _file_state(path: Path) -> list[int | str]:
    is_broken_link = path.is_symlink() and not path.exists()
    status = os.lstat(path) if is_broken_link else os.stat(path)
    if is_broken_link or status.st_size > HASHED_BYTES:
        return [status.st_size, status.st_mtime_ns]
    return [status.st_size, _hash_content(str(path), status.st_size, status.st_mtime_ns)]


@functools.lru_cache(maxsize=4096)
def _hash_content(path: str, size: int, mtime_ns: int) -> str:
    """Size and time are there for the cache: a file is read again where they have changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_change(old: Stamp, new: Stamp) -> str:
    """Return what differs, in words, or ""."""
    if old.command != new.command:
        return "its command changed"
    if old.env != new.env:
        return "its environment changed"
    for path in sorted(set(old.inputs) | set(new.inputs)):
        if old.inputs.get(path) != new.inputs.get(path):
            return f"{Path(path).name} changed"
    return ""


def stamp_path(log_dir: Path, name: str) -> Path:
    """Return where a task's stamp lies."""
    return log_dir / f"{name}.json"


def read_stamp(log_dir: Path, name: str) -> Stamp | None:
    """Return a task's stamp; None where there is none, or none that can be read."""
    try:
        return Stamp(**json.loads(stamp_path(log_dir, name).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(log_dir: Path, name: str, stamp: Stamp) -> None:
    """Write a task's stamp, whole or not at all."""
    write_json(stamp_path(log_dir, name), asdict(stamp))


def clear_stamp(log_dir: Path, name: str) -> None:
    """Remove a task's stamp, if there is one."""
    stamp_path(log_dir, name).unlink(missing_ok=True)
