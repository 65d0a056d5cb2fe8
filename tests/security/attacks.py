"""Checkpoints that try to run something, made out of an honest one."""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_emo.torch_dist import COMMON_STATE, read_arguments

EXTRA_STATE = "decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1"


class Canary:
    """Copies this file when it is unpickled in earnest."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self):
        return shutil.copyfile, (__file__, self.made)


def metadata_itself(folder: Path, made: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(made)))


def metadata_within(folder: Path, made: Path) -> None:
    """An honest index, with something where planners keep what they like."""
    index = _index(folder)
    index.planner_data = {"plan": Canary(made)}
    _write(folder, index)


def metadata_by_name(folder: Path, made: Path) -> None:
    """By a function that a module of torch's has imported, and not by its own name."""
    path = f"V{made}\n".encode()
    (folder / ".metadata").write_bytes(
        b"ctorch.distributed.checkpoint.filesystem\nos.mkdir\n(" + path + b"tR."
    )


def sharded_object(folder: Path, made: Path) -> None:
    """The bytes of an object that is no tensor: of the common state, and of a layer's."""
    arguments = read_arguments(folder) or argparse.Namespace()
    arguments.hook = Canary(made)
    _append(folder, COMMON_STATE, [{"args": arguments, "iteration": 0, "rng": Canary(made)}])
    _append(folder, EXTRA_STATE, [Canary(made)])


def common_pt(folder: Path, made: Path) -> None:
    """The file of older versions, which those of today still prefer."""
    arguments = read_arguments(folder) or argparse.Namespace()
    arguments.hook = Canary(made)
    torch.save({"args": arguments, "hook": Canary(made)}, folder / "common.pt")


def tensor_piece(folder: Path, made: Path) -> None:
    """The bytes of a tensor."""
    index = _index(folder)
    key = next(k for k in index.storage_data if "word_embeddings" in k.fqn)
    _append(folder, key, Canary(made))


ATTACKS = {
    attack.__name__: attack
    for attack in (
        *(metadata_itself, metadata_within, metadata_by_name),
        *(sharded_object, common_pt, tensor_piece),
    )
}


def copy_attacked(source: Path, target: Path, name: str, made: Path) -> Path:
    """Copy a checkpoint of one iteration's folder and spoil the copy; return that folder."""
    shutil.copytree(source, target)
    ATTACKS[name](target / "release", made)
    return target / "release"


def _index(folder: Path) -> Metadata:
    with open(folder / ".metadata", "rb") as stream:
        return pickle.load(stream)


def _write(folder: Path, index: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _append(folder: Path, key: str | MetadataIndex, value: Any) -> None:
    """Store an object in a file of its own, under a key that may be another's."""
    index = _index(folder)
    name = f"__9_{len(list(folder.iterdir()))}.distcp"
    torch.save(value, folder / name)
    place = _StorageInfo(name, 0, (folder / name).stat().st_size)
    if isinstance(key, str):
        index.state_dict_metadata[key] = BytesStorageMetadata()
        key = MetadataIndex(key)
    index.storage_data[key] = place
    _write(folder, index)
