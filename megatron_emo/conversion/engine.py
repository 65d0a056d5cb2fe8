"""The other engine: megatron-bridge's mappings on Megatron's own model, whole in memory.

It covers what the plain route covers, by other people's code: a second opinion, not more models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_emo.conversion.mapping import PADDED_KEYS, Item, pad_vocabulary
from megatron_emo.conversion.settings import ModelSettings

if TYPE_CHECKING:
    from megatron_emo.conversion.export_hf import MegatronCheckpoint

ENGINES = ("auto", "plain", "bridge")


def import_through_bridge(
    hf_dir: Path, output: Path, args: argparse.Namespace, settings: ModelSettings
) -> None:
    """Write the weights of `hf_dir` into `output` as a release checkpoint, padded as `args` say.

    Raises:
        ImportError: megatron-bridge is missing; says how to install it.
        ValueError: weights that are missing or left over.
    """
    from megatron_emo.conversion import bridge, megatron_model

    with megatron_model.one_process():
        model = megatron_model.build_model(args, settings.vocab_size)
        bridge.hf_to_model(hf_dir, model)
        state = model.state_dict()
        for key in PADDED_KEYS:
            if key in state:
                state[key] = pad_vocabulary(state[key], args.padded_vocab_size)
        padded = megatron_model.build_model(args)
        padded.load_state_dict(state)
        megatron_model.save_checkpoint(padded, output, args)


def tensors_through_bridge(
    checkpoint: MegatronCheckpoint, dtypes: dict[Item, torch.dtype]
) -> Callable[[Item], list[Tensor]]:
    """Return what gives an item's Hugging Face tensors, all of which are in memory.

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
    return lambda item: [named[name].to(dtypes[item]) for name in item.hf_names]
