"""The index of a torch_dist checkpoint, `.metadata`: a pickle, read without running it.

What torch would call while it unpickles is limited to the classes that such an index is made of;
what comes out is checked field by field against itself before anything is opened or allocated.
"""

from __future__ import annotations

import importlib
import io
import pickle  # nosec B403 # with a list of the classes it may find
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron_emo.foreign_files import file_inside

DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(MemoryError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error),
)
"""What reading a pickle, or a tensor that torch stored, raises where its bytes are damaged."""

_INDEX_CLASSES = {
    (cls.__module__, cls.__qualname__): cls
    for module, names in (
        (
            metadata,
            "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
            "BytesStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING",
        ),
        (planner, "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData"),
        (filesystem, "_StorageInfo _StoragePrefix SerializationFormat"),
    )
    for cls in (getattr(module, name) for name in names.split() if hasattr(module, name))
}
_OLDER_MEGATRON = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}
_OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
}


def read_index(path: Path) -> Metadata:
    """Return the index with what says where tensors and objects lie, and nothing else of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle of other classes, a damaged one, file names that lead elsewhere, or
            pieces that do not fit their tensor or their file.
    """
    data = path.read_bytes()
    before = {cls: dict(vars(cls)) for cls in _INDEX_CLASSES.values()}
    try:
        found = _IndexUnpickler(io.BytesIO(data)).load()
    except DAMAGE as error:
        raise ValueError(f"{path}: expected torch's checkpoint index: {error}") from error
    finally:
        changed = _undo_changes(before)
    if changed:
        raise ValueError(f"{path}: it sets attributes of {', '.join(changed)}, which are torch's")
    try:
        return _checked(path, found)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: expected torch's checkpoint index: {error!r}") from error


def _undo_changes(before: dict[type, dict[str, Any]]) -> list[str]:
    """Give classes the attributes they had; return the names of those that had others."""
    changed = []
    for cls, attributes in before.items():
        now = dict(vars(cls))
        names = now.keys() | attributes.keys()
        wrong = [n for n in names if now.get(n, names) is not attributes.get(n, names)]
        for name in wrong:
            if name in attributes:
                type.__setattr__(cls, name, attributes[name])
            else:
                type.__delattr__(cls, name)
        if wrong:
            changed.append(cls.__qualname__)
    return changed


def _checked(path: Path, found: Any) -> Metadata:
    """Return a fresh index of the parts of `found` that are read here."""
    entries, places = found.state_dict_metadata, found.storage_data
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise TypeError("state_dict_metadata and storage_data are no dictionaries")
    for key, place in places.items():
        if not isinstance(key, MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            raise TypeError(f"a {type(place).__name__} is stored under a {type(key).__name__}")
        file_inside(path.parent, place.relative_path, path)
        if not _are_counts(place.offset, place.length):
            raise ValueError(f"{path}: {key.fqn}: found bytes {place.offset}+{place.length}")
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(path, key, entry, places)
        elif not isinstance(entry, BytesStorageMetadata) or not isinstance(key, str):
            raise TypeError(f"an entry is a {type(entry).__name__}")
    # Not its planner_data, storage_meta or version: nothing here needs them.
    return Metadata(state_dict_metadata=entries, storage_data=places, storage_meta=StorageMeta())


def _check_tensor(
    path: Path, key: object, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]
) -> None:
    dtype, size = entry.properties.dtype, entry.size
    if not isinstance(key, str) or not isinstance(dtype, torch.dtype) or not _is_size(size):
        raise TypeError(f"{key!r} has dtype {dtype!r} and size {size!r}")
    for chunk in entry.chunks:
        if not isinstance(chunk, ChunkStorageMetadata) or not _is_size(chunk.offsets, chunk.sizes):
            raise TypeError(f"{key}: a piece is a {type(chunk).__name__}")
        ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > limit for end, limit in zip(ends, size, strict=True)):
            raise ValueError(f"{path}: {key}: found a piece up to {ends}, expected within {size}")
        place = places.get(MetadataIndex(key, chunk.offsets))
        num_bytes = chunk.sizes.numel() * dtype.itemsize
        # torch stores a piece as it is, unless something is said of how it is compressed.
        if place is not None and num_bytes > place.length and not _transforms(place):
            raise ValueError(
                f"{path}: {key}: found {place.length} bytes in {place.relative_path}, expected at "
                f"least {num_bytes} for a piece of {tuple(chunk.sizes)}"
            )


def _transforms(place: filesystem._StorageInfo) -> object:
    # Absent from indices that older versions of torch wrote.
    return getattr(place, "transform_descriptors", None)


def _is_size(*sizes: object) -> bool:
    return all(isinstance(size, torch.Size) and _are_counts(*size) for size in sizes)


def _are_counts(*numbers: object) -> bool:
    return all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers)


class _IndexUnpickler(pickle.Unpickler):
    """Finds the classes of torch's checkpoint index, sizes, dtypes and paths, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES:
            return _INDEX_CLASSES[module, name]
        if (module, name) in _OLDER_MEGATRON:
            return SimpleNamespace
        if (module, name) in _OTHERS:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"found {module}.{name}, which has no place there")
