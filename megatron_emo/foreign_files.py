"""Files that someone else may have written: names that stay in their folder, JSON that is bounded.

A name inside a file decides what is opened next; here it may only name a plain file beside it.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

_MAX_JSON = 200 * 1024 * 1024
"""Bytes; the index of a model with a million tensors is 100 MB."""
_REPEATED = 80
"""Characters of a bad name that an error repeats."""


_CODE_KEYS = (
    *("auto_map", "custom_pipelines", "_attn_implementation_internal"),
    *("_experts_implementation_internal",),
)
_IMPLEMENTATION_KEYS = (
    *("_attn_implementation", "attn_implementation"),
    *("_experts_implementation", "experts_implementation"),
)
"""Values with a slash stand for kernels of the hub."""


def file_inside(folder: str | Path, name: object, source: str | Path) -> Path:
    """Return `folder/name`, which may not exist, for a name that a file of that folder gives.

    A link is followed only within the folder or, in a snapshot of the hub's cache, to its
    repository's blobs.

    Args:
        source: the file that the name stands in, for the message.

    Raises:
        ValueError: no string, an empty one, one with a folder, a NUL or a line break in it, or a
            link that leads out.
    """
    is_plain = isinstance(name, str) and name not in ("", ".", "..")
    if not is_plain or set(name) & set("\\/\0\r\n"):
        raise ValueError(
            f"{source}: expected the name of a file beside it, found {repr(name)[:_REPEATED]}"
        )
    path = Path(folder) / name
    if path.is_symlink():
        _refuse_link_out(path)
    return path


def refuse_links_out(folder: str | Path, names: tuple[str, ...]) -> None:
    """Raise ValueError for the first of these files that is a link which leads out of `folder`."""
    for name in names:
        if (path := Path(folder) / name).is_symlink():
            _refuse_link_out(path)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: not UTF-8, not JSON, no object, nested without end, or more than 200 MB.
        OSError: as reading does.
    """
    path = Path(path)
    if (size := path.stat().st_size) > _MAX_JSON:
        raise ValueError(f"{path}: found {size} bytes, expected at most {_MAX_JSON}")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


class WorldWritableWarning(UserWarning):
    """Anyone on this machine may change what is about to be read."""


def warn_if_world_writable(folder: str | Path) -> None:
    """Warn of a folder into which every user may write; a group's is common on shared machines."""
    mode = Path(folder).stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        warnings.warn(
            f"{folder}: every user of this machine may write into it "
            f"(mode {stat.S_IMODE(mode):o}); chmod o-w it",
            WorldWritableWarning,
            stacklevel=3,
        )


def read_weight_map(index: str | Path) -> dict[str, str]:
    """Return the file of each tensor by a model.safetensors.index.json.

    Raises:
        ValueError: as `read_json_object` and `file_inside`; no such map in it.
    """
    found = read_json_object(index).get("weight_map")
    if not isinstance(found, dict):
        raise ValueError(f"{index}: expected an object weight_map, found {type(found).__name__}")
    for name in dict.fromkeys(map(_hashable, found.values())):
        file_inside(Path(index).parent, name, index)
    return found


def _hashable(value: object) -> object:
    return value if isinstance(value, str) else repr(value)[:_REPEATED] + "/"


def code_in_folder(folder: Path) -> list[str]:
    """Return the scripts at the top of a model's folder and the keys of its configs, at any depth,
    with which transformers loads code: `auto_map`, and what CVE-2026-4372 came in by.

    Raises:
        ValueError: a config that is no JSON object.
    """
    found = sorted(entry.name for entry in folder.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        if (file := folder / name).is_file():
            found += [f"{key} in {name}" for key in code_keys(read_json_object(file))]
    return found


def code_keys(config: Any) -> list[str]:
    found: list[str] = []
    stack = [config]
    while stack:
        part = stack.pop()
        stack += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict):
            found += [key for key in _CODE_KEYS if key in part]
            found += [k for k in _IMPLEMENTATION_KEYS if "/" in str(part.get(k))]
    return list(dict.fromkeys(found))


def _refuse_link_out(path: Path) -> None:
    folder = path.parent.resolve()
    # models--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH, as the hub's client lays it out.
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path}: found a link out of its folder, to {target}; copy the file there instead"
        )
