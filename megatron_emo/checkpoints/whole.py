"""Whether one checkpoint is whole: at a glance by names and sizes, or by the hash of every byte."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_emo.checkpoints.manifest import MANIFEST, REQUIRED, Manifest, digest, divide
from megatron_emo.torch_dist import read_arguments
from megatron_emo.torch_dist.index import read_index

Exchange = Callable[[Any], list[Any]]
"""Takes each rank's object, of what JSON can hold, and returns all of them, by rank."""

_OF_OPEN_FILES = ".nfs"
"""How NFS calls a file that was removed while someone has it open."""


@dataclass(frozen=True)
class Findings:
    """What is wrong with a checkpoint; nothing if it is whole. The same on every rank."""

    problems: tuple[str, ...] = ()
    """Each begins with the name of a file, where one is at fault."""
    is_cut_off: bool = False
    """Whether its save never came to its end, so that it never was a checkpoint."""


@dataclass
class Glance:
    """What one look at a checkpoint's folder found, without reading what is large."""

    problems: list[str] = field(default_factory=list)
    """Each begins with the name of a file, where one is at fault."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of every plain file but the manifest."""
    others: dict[str, str] = field(default_factory=dict)
    """What else is in the folder, by name: folders, links."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 that the manifest expects, by name; empty without a manifest."""
    is_cut_off: bool = False
    """Whether its save never came to its end, so that it never was a checkpoint."""


def glance(folder: str | Path) -> Glance:
    """Compare a checkpoint's files with its manifest by names, kinds and sizes.

    Without a manifest, files are compared with the index. That serves for checkpoints of Megatron's
    own default; one whose own arguments say that it was saved with a manifest has lost it.
    """
    folder, found = Path(folder), Glance()
    try:
        _list_files(folder, found)
    except FileNotFoundError:
        found.problems.append(f"{folder.name}: no such folder")
        return found
    except OSError as error:
        found.problems.append(f"{folder.name}: {error.strerror or error}")
        return found
    try:
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        _compare_with_index(folder, found)
    except (ValueError, OSError) as error:
        found.problems.append(str(error).removeprefix(f"{folder}{os.sep}"))
    else:
        _compare_with_manifest(manifest, found)
    return found


def inspect(
    folder: str | Path, *, exchange: Exchange, rank: int, reads_all: bool = True
) -> Findings:
    """Return what is wrong with a checkpoint, the same on every rank.

    Rank 0 looks at the folder; then, with `reads_all`, each rank hashes its share of the files, so
    that every byte is read once. One exchange, or two.
    """
    found = glance(folder) if rank == 0 else Glance()
    said = exchange([*dataclasses.astuple(found)] if rank == 0 else None)
    found = Glance(*said[0])
    if found.problems or not reads_all or not found.digests:
        return Findings(tuple(found.problems), found.is_cut_off)
    share = divide(found.sizes, len(said), by_writer=False)[rank]
    answers = exchange(_hash_share(Path(folder), share))
    return Findings(
        tuple(
            f"{name}: {'altered' if value else f'cannot be read: {reason}'}"
            for name, (value, reason) in _merged(answers)
            if value != found.digests[name]
        )
    )


def sign(folder: str | Path, *, exchange: Exchange, rank: int) -> list[str]:
    """Write the manifest of a checkpoint whose files are all written; return what went wrong.

    Each rank hashes what it wrote, and its share of the rest. The files are those that rank 0 sees
    and those that the index names: on a network file system others' may show up later. The manifest
    is the last file of a checkpoint: without it there is none. The same list on every rank; three
    exchanges.
    """
    folder, found = Path(folder), Glance()
    if rank == 0:
        try:
            _list_files(folder, found)
            for name in _ends_by_file(folder):
                found.sizes.setdefault(name, 0)
        except (ValueError, OSError) as error:
            found.problems.append(str(error).removeprefix(f"{folder}{os.sep}"))
    said = exchange([found.problems, found.sizes] if rank == 0 else None)
    problems, sizes = said[0]
    if problems:
        return problems
    share = divide(sizes, len(said), by_writer=True)[rank]
    hashed = _merged(exchange(_hash_share(folder, share)))
    problems = [f"{name}: {reason}" for name, (value, reason) in hashed if value is None]
    own = None
    if rank == 0 and not problems:
        digests, sizes = ({name: value[i] for name, value in hashed} for i in (0, 1))
        own = _write(Manifest(digests, sizes), folder)
    return problems + [problem for problem in exchange(own) if problem]


def _list_files(folder: Path, found: Glance) -> None:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                if entry.name != MANIFEST and not entry.name.startswith(_OF_OPEN_FILES):
                    found.sizes[entry.name] = status.st_size
                continue
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no plain file"
            found.others[entry.name] = "a symbolic link" if stat.S_ISLNK(status.st_mode) else kind


def _compare_with_manifest(manifest: Manifest, found: Glance) -> None:
    found.problems += [
        f"{name}: {kind}, expected plain files alone" for name, kind in found.others.items()
    ]
    for name in manifest.digests:
        size = manifest.sizes.get(name)
        if name not in found.sizes and name not in found.others:
            found.problems.append(f"{name}: missing")
        elif size is not None and found.sizes.get(name, size) != size:
            found.problems.append(f"{name}: {found.sizes[name]} bytes, saved were {size}")
    found.problems += [
        f"{name}: not in {MANIFEST}" for name in found.sizes if name not in manifest.digests
    ]
    found.digests = dict(manifest.digests)


def _compare_with_index(folder: Path, found: Glance) -> None:
    """For want of a manifest; what the index does not name is passed over."""
    if any(name.startswith("mp_rank_") for name in found.others):
        found.problems.append(
            "it is in the format torch; expected torch_dist (--ckpt-format torch_dist)"
        )
        return
    absent = [name for name in REQUIRED if not (folder / name).is_file()]
    if absent:
        found.is_cut_off = True
        found.problems.append(f"{', '.join(absent)}: missing, its save was cut off")
        return
    try:
        for name, end in sorted(_ends_by_file(folder).items()):
            size = os.stat(folder / name).st_size if (folder / name).exists() else None
            if size is None:
                found.problems.append(f"{name}: missing")
            elif size < end:
                found.problems.append(f"{name}: {size} bytes, the index needs {end}")
        arguments = read_arguments(folder)
    except (ValueError, OSError) as error:
        found.problems.append(str(error).removeprefix(f"{folder}{os.sep}"))
        return
    if getattr(arguments, "verify_integrity", False):
        found.is_cut_off = not found.problems
        found.problems.append(f"{MANIFEST}: missing, its save was cut off or the file was removed")


def _ends_by_file(folder: Path) -> dict[str, int]:
    """The byte behind the last one that the index points to, by file."""
    ends: dict[str, int] = {}
    for place in read_index(folder / ".metadata").storage_data.values():
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    return ends


def _hash_share(folder: Path, names: list[str]) -> dict[str, tuple[str | None, int | str]]:
    """(SHA-256, bytes) by name; (None, why) where a file cannot be read."""
    answers: dict[str, tuple[str | None, int | str]] = {}
    for name in names:
        try:
            answers[name] = digest(folder / name)
        except OSError as error:
            answers[name] = None, error.strerror or str(error)
    return answers


def _merged(answers: list[Mapping[str, list]]) -> list[tuple[str, list]]:
    return sorted(item for answer in answers for item in answer.items())


def _write(manifest: Manifest, folder: Path) -> str | None:
    try:
        for name in REQUIRED:  # the shards were brought to the disk by who wrote them
            with open(folder / name, "rb") as stream:
                os.fsync(stream.fileno())
        manifest.write(folder)
    except OSError as error:
        return f"{MANIFEST}: {error.strerror or error}"
    return None
