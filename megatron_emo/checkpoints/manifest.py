"""integrity.json: the files of a checkpoint with their sizes and SHA-256, written last.

The file is Megatron's (core/dist_checkpointing/validation.py of 0.19.2, `--verify-integrity`) with
the sizes added, so that each reads what the other wrote. It tells damage and mistakes, not an
attacker, who would write a manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.checkpoints.files import write_durably

MANIFEST = "integrity.json"
REQUIRED = (".metadata", "metadata.json")
"""The index and the format's name, without which nothing loads."""

_ALGORITHM = "sha256"
_MAX_BYTES = 1 << 28
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OF_RANK = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's files were when it was saved."""

    digests: Mapping[str, str]
    """SHA-256, in hex, by name."""
    sizes: Mapping[str, int]
    """Bytes by name; empty in a manifest that Megatron wrote itself."""

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest of one checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such manifest, names a file twice, or one outside of the folder.
        """
        path = Path(folder, MANIFEST)
        with open(path, "rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"{path}: expected at most {_MAX_BYTES} bytes")
        try:
            content = json.loads(data, object_pairs_hook=_without_repeats)
            manifest = _from_json(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        absent = [name for name in REQUIRED if name not in manifest.digests]
        if absent:
            raise ValueError(f"{path}: expected {absent} among its files")
        return manifest

    def write(self, folder: str | Path) -> None:
        """Write it into the folder, whole or not at all.

        Raises:
            OSError.
        """
        content = {
            "algorithm": _ALGORITHM,
            "files": dict(sorted(self.digests.items())),
            "bytes": dict(sorted(self.sizes.items())),
        }
        write_durably(Path(folder, MANIFEST), json.dumps(content, indent=1).encode())


def digest(path: str | Path) -> tuple[str, int]:
    """Return a file's SHA-256 in hex and its bytes, reading it once. A link is not followed.

    Raises:
        OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, _ALGORITHM).hexdigest(), os.fstat(descriptor).st_size


def divide(sizes: Mapping[str, int], world_size: int, by_writer: bool) -> list[list[str]]:
    """Share files out among ranks; the same on each that has the same sizes.

    Args:
        sizes: bytes by name.
        by_writer: give a rank the shards it wrote, which its host still has in memory. Otherwise,
            and for all other files, the largest file goes to who has the fewest bytes so far.
    """
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        match = _OF_RANK.fullmatch(name)
        writer = int(match[1]) if match and by_writer else world_size
        rank = writer if writer < world_size else loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += sizes[name]
    return shares


def is_plain_name(name: str) -> bool:
    """Whether it names a file of the folder itself."""
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def _without_repeats(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _from_json(content: object) -> Manifest:
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("expected an object with the files and their digests")
    if content.get("algorithm", _ALGORITHM) != _ALGORITHM:
        raise ValueError(f"algorithm: expected '{_ALGORITHM}', found {content['algorithm']!r}")
    digests, sizes = content["files"], content.get("bytes", {})
    for name, value in digests.items():
        if not is_plain_name(name) or name == MANIFEST:
            raise ValueError(f"expected names of files in this folder, found {name!r}")
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            raise ValueError(f"{name}: expected 64 hexadecimal digits, found {value!r:.80}")
    if not isinstance(sizes, dict) or (sizes and set(sizes) != set(digests)):
        raise ValueError("expected sizes of the same files as have digests")
    if not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise ValueError("expected sizes in bytes")
    return Manifest(digests, sizes)
