"""The other engine: megatron-bridge's mappings on Megatron's own model, whole in memory.

It covers what the plain route covers, by other people's code: a second opinion, not more models.
"""

from __future__ import annotations

import argparse
import pickle  # nosec B403 # written, never read
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_emo.conversion.hf import HFFolder
from megatron_emo.conversion.mapping import LEADING_ROWS, PADDED_KEYS, Item, pad_vocabulary
from megatron_emo.conversion.settings import ModelSettings
from megatron_emo.conversion.torch_dist_writer import PieceWriter
from megatron_emo.torch_dist import TensorReader

if TYPE_CHECKING:
    from megatron_emo.conversion.export_hf import MegatronCheckpoint

ENGINES = ("auto", "plain", "bridge")


def import_through_bridge(
    source: HFFolder,
    output: Path,
    args: argparse.Namespace,
    settings: ModelSettings,
    items: Iterable[Item],
) -> None:
    """Write the weights of `source` into `output` as a release checkpoint, padded as `args` say.

    Under the keys of Megatron's local layers. The model has no place for leading rows (see `Rule`);
    they go beside it as the plain route writes them.

    Raises:
        ImportError: megatron-bridge is missing; says how to install it.
        ValueError: weights that are missing or left over.
    """
    from megatron_emo.conversion import bridge, megatron_model

    with megatron_model.one_process():
        model = megatron_model.build_model(args, settings.vocab_size)
        bridge.hf_to_model(source.path, model)
        state = model.state_dict()
        for key in PADDED_KEYS:
            if key in state:
                state[key] = pad_vocabulary(state[key], args.padded_vocab_size)
        padded = megatron_model.build_model(args)
        padded.load_state_dict(state)
        folder = megatron_model.save_checkpoint(padded, output, args)
    for item in items:
        if item.rule.leading_rows:
            (name,) = item.hf_names
            rows = source.read(name)[: item.rule.leading_rows].to(args.params_dtype)
            _append(folder, item.rule.megatron + LEADING_ROWS, rows)


def tensors_through_bridge(
    checkpoint: MegatronCheckpoint, dtypes: dict[Item, torch.dtype]
) -> Callable[[Item], list[Tensor]]:
    """Return what gives an item's Hugging Face tensors, all of which are in memory.

    They are the model's as Megatron loads it: the optimizer's master weights are not looked at.

    Raises:
        ImportError: megatron-bridge is missing; says how to install it.
        ValueError: weights that are missing or left over.
    """
    from megatron_emo.conversion import bridge, megatron_model

    settings = checkpoint.settings
    with megatron_model.one_process():
        model = megatron_model.build_model(checkpoint.args, settings.vocab_size)
        megatron_model.load_checkpoint(model, checkpoint.folder)
        named = dict(bridge.model_to_hf(model, checkpoint.config))
    reader = TensorReader(checkpoint.folder)
    for item in dtypes:
        kept = [k for k in reader.shapes if k.endswith(item.rule.megatron + LEADING_ROWS)]
        if item.rule.leading_rows and kept:
            (name,) = item.hf_names
            rows = reader.read(kept[0]).to(named[name].dtype)
            named[name] = torch.cat([rows, named[name][len(rows) :]])
    return lambda item: [named[name].to(dtypes[item]) for name in item.hf_names]


def _append(folder: Path, key: str, tensor: Tensor) -> None:
    """Add a tensor to a checkpoint that is complete."""
    name = f"{key}.distcp"
    with open(folder / name, "wb") as stream:
        writer = PieceWriter(stream, name)
        writer.write(key, tensor, (), ())
    (piece,) = writer.pieces
    metadata = FileSystemReader(folder).read_metadata()
    start = torch.Size([0] * tensor.dim())
    metadata.state_dict_metadata[key] = TensorStorageMetadata(
        TensorProperties(tensor.dtype), tensor.shape, [ChunkStorageMetadata(start, tensor.shape)]
    )
    metadata.storage_data[MetadataIndex(key, start)] = _StorageInfo(name, 0, piece.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
