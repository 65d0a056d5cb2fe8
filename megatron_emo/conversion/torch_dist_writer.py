"""Megatron's torch_dist format written a piece at a time, without Megatron or process groups.

The format is torch's distributed checkpoint: .distcp files that hold pieces of tensors as
`torch.save` writes them, and a pickled index that says what tensor, where in it, and where in which
file. What is no tensor lies in the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle  # nosec B403 # written, never read
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_emo.torch_dist import COMMON_STATE, TRACKER

RELEASE = "release"
"""The folder, and what the tracker names, of weights that no run of Megatron's has trained yet."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, or with shape None an object, in one of the files."""

    key: str
    file: str
    start: int
    length: int
    shape: tuple[int, ...] | None = None
    """Of the whole tensor."""
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    dtype: str = ""


class PieceWriter:
    """Writes pieces to an open file called `name` in the index."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.pieces: list[Piece] = []

    def write(
        self, key: str, tensor: Tensor, index: tuple[int, ...], stack: tuple[int, ...]
    ) -> None:
        """Write a tensor that is [index] of the stacked one, [*stack, *tensor.shape]."""
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would take what it views along
        rest = len(tensor.shape)
        ones = (1,) * len(index)
        self._add(
            key,
            tensor.view(*ones, *tensor.shape),
            shape=(*stack, *tensor.shape),
            offsets=(*index, *((0,) * rest)),
            sizes=(*ones, *tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
        )

    def write_object(self, key: str, value: Any) -> None:
        """Write what is no tensor; Megatron keeps it as a list of one."""
        self._add(key, [value])

    def _add(self, key: str, value: Any, **fields: Any) -> None:
        start = self._stream.tell()
        torch.save(value, self._stream)
        length = self._stream.tell() - start
        self.pieces.append(Piece(key, self._name, start, length, **fields))


def write_index(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write the index of a folder's files, and the file by which Megatron knows the format."""
    items: dict[str, Any] = {}
    storage = {}
    for piece in pieces:
        where = _StorageInfo(piece.file, piece.start, piece.length)
        if piece.shape is None:
            items[piece.key] = BytesStorageMetadata()
            storage[MetadataIndex(piece.key)] = where
            continue
        item = items.setdefault(
            piece.key,
            TensorStorageMetadata(
                TensorProperties(getattr(torch, piece.dtype)), torch.Size(piece.shape), []
            ),
        )
        offsets = torch.Size(piece.offsets)
        item.chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
        storage[MetadataIndex(piece.key, offsets)] = where
    metadata = Metadata(items, storage_data=storage, storage_meta=StorageMeta())
    _write_durably(folder / ".metadata", pickle.dumps(metadata))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    _write_durably(folder / "metadata.json", json.dumps(config).encode())


def write_tracker(root: Path) -> None:
    """Name the folder `RELEASE` of `root` the checkpoint to load."""
    _write_durably(root / TRACKER, RELEASE.encode())


def common_state(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the key and the value of what Megatron reads before any tensor."""
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": args.iteration,
        "num_floating_point_operations_so_far": 0.0,
        # Layers are stacked, gated layers are one tensor: how the keys below are to be read.
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    return COMMON_STATE, state


def extra_state_keys(num_layers: int, num_experts: int | None, *, qk_layernorm: bool) -> list[str]:
    """Return the keys of the empty states that Megatron's modules want to find.

    Those of the local layers are as they write them. Of Transformer Engine's modules the norms and
    the attention have one more each; more than are asked for do no harm.
    """
    layer = [f"self_attention.{name}" for name in ("linear_proj", "linear_qkv", "core_attention")]
    layer += [f"self_attention.{name}_layernorm" for name in "qk" if qk_layernorm]
    layer += [] if num_experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{index}_{num_layers}"
        for index in range(num_layers)
        for module in layer
    ]
    keys += [
        f"decoder.layers.mlp.experts.experts.{module}._extra_state/"
        f"shard_{index}.{expert}_{num_layers}.{num_experts}"
        for index in range(num_layers)
        for expert in range(num_experts or 0)
        for module in ("linear_fc1", "linear_fc2")
    ]
    if num_experts:
        keys += [
            f"decoder.layers.pre_mlp_layernorm._extra_state/shard_{index}_{num_layers}"
            for index in range(num_layers)
        ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def _write_durably(file: Path, data: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
