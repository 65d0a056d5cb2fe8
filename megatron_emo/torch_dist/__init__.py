"""Single tensors and the saved arguments of Megatron's torch_dist checkpoints, without Megatron.

Such a checkpoint holds pickles, and unpickling runs what the file asks for. Here the index is read
by `index`, which knows torch's index classes only, and everything else with
`weights_only=True`, so that a checkpoint from elsewhere can be looked into without being trusted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from megatron_emo.foreign_files import file_inside, warn_if_world_writable
from megatron_emo.torch_dist.index import DAMAGE, read_index

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_STATE = "common_state/shard_0_1"
"""Where Megatron >= 0.19 keeps what is no tensor, a list of one dictionary; before: common.pt."""


def resolve_checkpoint_dir(checkpoint_dir: str | Path, iteration: int | None = None) -> Path:
    """Return the folder of one iteration, from it or from the run's folder that holds it.

    Warns (WorldWritableWarning) of one into which every user may write.

    Args:
        iteration: which one; by default what latest_checkpointed_iteration.txt names.

    Raises:
        FileNotFoundError: no such folder, tracker or iteration.
        ValueError: an unreadable tracker, or a checkpoint in another format.
    """
    root = Path(checkpoint_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"checkpoint {root}: no such folder")
    if iteration is None and (root / ".metadata").is_file():
        warn_if_world_writable(root)
        return root
    folder = root / _iteration_folder(root, iteration)
    if not folder.is_dir():
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise FileNotFoundError(f"checkpoint {root}: no folder {folder.name}, it holds {there}")
    if not (folder / ".metadata").is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"checkpoint {folder}: expected the torch_dist format (a .metadata file), which "
            f"--ckpt-format torch_dist writes; found {found}"
        )
    warn_if_world_writable(folder)
    return folder


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor in one iteration's folder, by its key."""
    items = _SafeReader(folder).read_metadata().state_dict_metadata.items()
    return {key: tuple(item.size) for key, item in items if isinstance(item, TensorStorageMetadata)}


def read_tensor(folder: str | Path, key: str) -> Tensor:
    """Return one tensor, whole, in its stored dtype on the CPU; nothing else is read.

    Needs no process group and runs no collective.

    Raises:
        KeyError: no tensor of that name.
        ValueError: an index that holds more than torch's own classes, a damaged file.
    """
    return TensorReader(folder).read(key)


class TensorReader:
    """Reads parts of the tensors of one iteration's folder, without process group or collective.

    It keeps the index, and holds one stored piece of a tensor at a time: of a run's checkpoint that
    is a layer's, and of one saved at TP > 1 a rank's share of it.

    Raises:
        ValueError: an index that holds more than torch's own classes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._reader = _SafeReader(folder)
        self._metadata = self._reader.read_metadata()
        items = self._metadata.state_dict_metadata.items()
        self._items = {key: v for key, v in items if isinstance(v, TensorStorageMetadata)}
        self.shapes = {key: tuple(item.size) for key, item in self._items.items()}
        self.dtypes = {key: item.properties.dtype for key, item in self._items.items()}

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Return tensor[index] in its stored dtype; `index` fixes leading dimensions.

        Raises:
            KeyError: no tensor of that name.
            ValueError: pieces that are damaged, absent or do not cover it.
        """
        item, depth = self._items[key], len(index)
        chunks = [
            chunk
            for chunk in item.chunks
            if all(o <= n < o + size for n, o, size in zip(index, *_bounds(chunk), strict=False))
        ]
        # Before anything is allocated: a damaged index may name any size.
        self._check_covered(key, index, chunks)
        result = torch.empty(item.size[depth:], dtype=item.properties.dtype)
        for chunk in chunks:
            piece = self._read_piece(key, chunk.offsets, chunk.sizes)
            piece = piece[tuple(n - o for n, o in zip(index, chunk.offsets, strict=False))]
            spans = zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)
            result[tuple(slice(start, start + size) for start, size in spans)] = piece
        return result

    def _check_covered(
        self, key: str, index: tuple[int, ...], chunks: list[ChunkStorageMetadata]
    ) -> None:
        depth = len(index)
        by_place = {tuple(chunk.offsets): chunk.sizes[depth:].numel() for chunk in chunks}
        covered, expected = sum(by_place.values()), self._items[key].size[depth:].numel()
        if covered != expected or len(by_place) != len(chunks):
            raise ValueError(
                f"checkpoint {self.folder}: {key}{list(index) or ''}: expected {expected} numbers "
                f"in its pieces, found {covered} in {len(by_place)} places"
            )

    def _read_piece(self, key: str, offsets: torch.Size, sizes: torch.Size) -> Tensor:
        where = self._metadata.storage_data.get(MetadataIndex(key, offsets))
        if where is None or where.transform_descriptors:
            raise ValueError(
                f"checkpoint {self.folder}: {key} at {tuple(offsets)}: "
                + ("no such piece" if where is None else f"stored by {where.transform_descriptors}")
            )
        file = file_inside(self.folder, where.relative_path, self.folder / ".metadata")
        try:
            with open(file, "rb") as stream:
                data = self._reader._slice_file(stream, where)
                piece = torch.load(cast(Any, data), map_location="cpu", weights_only=True)
        except DAMAGE as error:
            where_in = f"{key} at {tuple(offsets)}"
            raise ValueError(f"checkpoint {file}: reading {where_in}: {error}") from error
        expected = (sizes, self.dtypes[key])
        found = (piece.shape, piece.dtype) if isinstance(piece, Tensor) else type(piece)
        if found != expected:
            raise ValueError(f"{file}: {key}: expected {expected}, found {found}")
        return piece


def read_arguments(folder: str | Path) -> argparse.Namespace | None:
    """Return the Megatron arguments saved in one iteration's folder, None if none can be read.

    Objects of classes that torch does not hold safe (Megatron's enums, say) come back as empty
    stand-ins; numbers, strings and dtypes as they are.
    """
    legacy = Path(folder) / "common.pt"
    try:
        if legacy.is_file():
            file = file_inside(folder, legacy.name, folder)
            common = _load_inert(io.BytesIO(file.read_bytes()))
        else:
            common = _load(_SafeReader(folder), {COMMON_STATE: io.BytesIO()})[COMMON_STATE][0]
        arguments = common["args"]
    except DAMAGE:
        return None
    return arguments if isinstance(arguments, argparse.Namespace) else None


def _bounds(chunk: ChunkStorageMetadata) -> tuple[torch.Size, torch.Size]:
    return chunk.offsets, chunk.sizes


def _iteration_folder(root: Path, iteration: int | None) -> str:
    if iteration is not None:
        return f"iter_{iteration:07d}"
    tracker = root / TRACKER
    if not tracker.is_file():
        raise FileNotFoundError(
            f"checkpoint {root}: expected {TRACKER} or .metadata in it, found "
            f"{sorted(entry.name for entry in root.iterdir())}"
        )
    text = tracker.read_text().strip()
    if text != "release" and not text.isdecimal():
        raise ValueError(f"{tracker}: expected an iteration or 'release', found {text!r}")
    return text if text == "release" else f"iter_{int(text):07d}"


def _load(reader: _SafeReader, state: dict[str, Any]) -> dict[str, Any]:
    """Fill `state`: tensors in place, other objects in the dictionary that is returned."""
    planner = _SafePlanner()
    with warnings.catch_warnings():
        # It is said even when no_dist asks for it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            causes = "; ".join(str(failure[0]) for failure in error.failures.values())
            raise ValueError(
                f"checkpoint {reader.path}: reading {list(state)}: {causes}"
            ) from error
        except DAMAGE as error:
            raise ValueError(f"checkpoint {reader.path}: reading {list(state)}: {error}") from error
    return planner.state_dict


class _SafeReader(dcp.FileSystemReader):
    """torch's reader, which unpickles the index by `read_index`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path) / ".metadata")


class _SafePlanner(dcp.DefaultLoadPlanner):
    """torch's planner, reading objects that are no tensors with weights_only=True."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = _load_inert(value)


def _load_inert(file: io.BytesIO) -> Any:
    """Load with weights_only=True; each class that is not allowed becomes an empty stand-in."""
    with _no_numpy_registered():
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        stand_ins = [(type("StandIn", (_StandIn,), {}), name) for name in unknown]
        allowed = [pair for pair in stand_ins if pair[1] != "argparse.Namespace"]
        file.seek(0)
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _no_numpy_registered() -> Iterator[None]:
    """Set aside what this process has declared safe for torch.load of numpy.

    Megatron declares the classes that arrays are made with, and not their dtypes: then an array,
    as a random state holds it, can be neither built nor passed over.
    """
    registered = torch.serialization.get_safe_globals()
    of_numpy = [entry for entry in registered if _module_of(entry).split(".")[0] == "numpy"]
    others = [entry for entry in registered if entry not in of_numpy]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(others)
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(of_numpy)


def _module_of(entry: Any) -> str:
    """Of a class or function, or of a pair of one and the name that stands for it."""
    return getattr(entry[0] if isinstance(entry, tuple) else entry, "__module__", None) or ""


class _StandIn:
    """Takes any construction and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...
