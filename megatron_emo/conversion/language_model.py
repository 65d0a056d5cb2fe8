"""The evaluation package's language model from a Megatron checkpoint, without a folder of it.

A checkpoint is exported in memory, by the rules, config and tokenizer that its folder would have.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import (
    ExportOptions,
    MegatronCheckpoint,
    check_tokenizer,
    open_checkpoint,
    plain_tensors,
    write_small_files,
)
from megatron_emo.conversion.megatron_weights import MegatronWeights, shorten
from megatron_emo.evaluation.models import LanguageModel, context_length_of, resolve_device
from megatron_emo.evaluation.records import hash_model

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_megatron(
    megatron_dir: str | Path,
    options: ExportOptions | None = None,
    device: torch.device | str = "auto",
) -> LanguageModel:
    """Return the model that `export_hf` with these options would write.

    Its name is that of the checkpoint and the iteration; its sha256 covers weights, config and
    tokenizer, though not as that of a folder does. The weights are twice in host memory for a
    moment. Nothing is written but the small files, into a temporary folder, since transformers
    reads a tokenizer from files alone.

    Args:
        device: as `resolve_device`.

    Raises:
        FileNotFoundError, ConversionError: as `open_checkpoint`, and without a tokenizer.
        ValueError: this machine has no such device.
    """
    import transformers

    options, place = options or ExportOptions(), resolve_device(device)
    checkpoint = open_checkpoint(megatron_dir, options)
    _need_tokenizer(checkpoint)
    items = checkpoint.items
    weights = MegatronWeights(checkpoint.folder, items, checkpoint.settings, options.dtype)
    dtypes = {item: options.dtype or weights.dtype(item) for item in items}
    dtype = dtypes[items[0]]
    with tempfile.TemporaryDirectory() as folder:
        write_small_files(checkpoint, Path(folder), dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
        defaults = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        small = hash_model(folder)
    tensors = plain_tensors(weights, dtypes)
    state = {
        name: tensor
        for item in items
        for name, tensor in zip(item.hf_names, tensors(item), strict=True)
    }
    sha256 = _hash_state(small, state)
    model = _build(checkpoint, state, dtype)
    model.generation_config = defaults
    source = checkpoint.folder.resolve()
    name, length = f"{source.parent.name}/{source.name}", context_length_of(model.config)
    return LanguageModel(model.eval().to(place), tokenizer, name, sha256, length, place)


def _need_tokenizer(checkpoint: MegatronCheckpoint) -> None:
    if checkpoint.tokenizer is None:
        named = getattr(checkpoint.args, "tokenizer_model", None)
        raise ConversionError(
            f"checkpoint {checkpoint.folder}: no tokenizer found, its arguments name {named!r}; "
            "give --tokenizer-model or --hf-config"
        )
    check_tokenizer(checkpoint)


def _build(
    checkpoint: MegatronCheckpoint, state: Mapping[str, Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    import transformers

    model_class = getattr(transformers, checkpoint.config.architectures[0])
    model, info = model_class.from_pretrained(
        None, config=checkpoint.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ConversionError(
            f"{checkpoint.folder}: {len(wrong)} tensors are missing or have no place: "
            f"{shorten(wrong)}"
        )
    return model


def _hash_state(small_files: str, state: Mapping[str, Tensor]) -> str:
    """sha256 over the hash of the small files, and names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(small_files.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
