"""A Megatron torch_dist checkpoint brought into a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_emo.conversion import engine
from megatron_emo.conversion.architectures import config_values, guess_model_type, rules_of
from megatron_emo.conversion.arguments import settings_of_arguments
from megatron_emo.conversion.compare import WeightComparison, compare_weights
from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.hf import INDEX, HFFolder
from megatron_emo.conversion.mapping import Item, items_of
from megatron_emo.conversion.megatron_weights import MegatronWeights
from megatron_emo.conversion.model_card import model_card
from megatron_emo.conversion.plan import (
    DEFAULT_SHARD_SIZE,
    Progress,
    parse_size,
    split_into_shards,
)
from megatron_emo.conversion.safetensors_io import num_bytes, write_header, write_tensors
from megatron_emo.conversion.settings import ModelSettings
from megatron_emo.conversion.staging import Staging
from megatron_emo.conversion.tokenizer_files import (
    find_tokenizer,
    set_special_ids,
    tokenizer_size,
    write_generation_config,
    write_tokenizer,
)
from megatron_emo.foreign_files import code_keys
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is to be written, and what the checkpoint's own arguments do not say."""

    iteration: int | None = None
    """By default the latest."""
    dtype: torch.dtype | None = None
    """To store tensors in; None leaves each as it is."""
    reference: str | None = None
    """A folder whose config.json and tokenizer the output follows, such as the one that was
    imported before the training."""
    model_type: str | None = None
    """By default the reference's, else what the arguments fit."""
    vocab_size: int | None = None
    """Rows without padding; by default the reference's, the arguments' or the tokenizer's."""
    tokenizer: str | None = None
    """A folder or a sentencepiece .model; by default the reference, else that of the arguments."""
    max_shard_size: str = DEFAULT_SHARD_SIZE
    engine: str = "auto"
    resume: bool = False
    overwrite: bool = False
    verify: bool = True


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One iteration's folder, its arguments, and what it is in Hugging Face's words."""

    folder: Path
    args: argparse.Namespace
    settings: ModelSettings
    tokenizer: Path | None
    config: Any
    has_ids: bool
    """Whether the ids of special tokens in `config` are known, not the class's defaults."""

    @property
    def items(self) -> list[Item]:
        return list(items_of(rules_of(self.settings), self.settings))


def open_checkpoint(megatron_dir: str | Path, options: ExportOptions) -> MegatronCheckpoint:
    """Read a checkpoint's arguments and find its settings, tokenizer and config.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or one in another format.
        ConversionError: arguments that cannot be read, or that no architecture fits.
    """
    folder = resolve_checkpoint_dir(megatron_dir, options.iteration)
    where = f"checkpoint {folder}"
    args = read_arguments(folder)
    if args is None:
        raise ConversionError(f"{where}: expected Megatron's arguments in its common state")
    reference = None if options.reference is None else HFFolder(options.reference).config
    tokenizer = find_tokenizer(options.tokenizer, options.reference, args)
    vocab_size = _vocab_size(options, reference, args, tokenizer, where)
    settings = settings_of_arguments(args, model_type="", vocab_size=vocab_size, where=where)
    model_type = options.model_type or getattr(reference, "model_type", None)
    model_type = model_type or getattr(args, "hf_model_type", None) or guess_model_type(settings)
    settings = settings_of_arguments(
        args, model_type=model_type, vocab_size=vocab_size, where=where
    )
    config, has_ids = _config(settings, reference, args, where)
    return MegatronCheckpoint(folder, args, settings, tokenizer, config, has_ids)


def export_hf(
    megatron_dir: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    check: Callable[[Path], str] | None = None,
    say: Callable[[str], None] = print,
) -> WeightComparison | None:
    """Write `output`, which transformers loads; return the verification.

    One tensor is in memory at a time. `output` appears at the end, by one rename.

    Args:
        check: called with the folder before that rename, returns what the model card says of it; an
            exception keeps the rename from happening.

    Raises:
        FileNotFoundError, FileExistsError, ConversionError: what was found, and where.
        OSError: writing failed; `output` is as it was, and --resume goes on.
    """
    options, output = options or ExportOptions(), Path(output)
    checkpoint = open_checkpoint(megatron_dir, options)
    settings, items = checkpoint.settings, checkpoint.items
    # Bridge copies what Megatron loads.
    has_masters = options.engine != "bridge"
    weights = MegatronWeights(
        checkpoint.folder, items, settings, options.dtype, masters=has_masters
    )
    check_tokenizer(checkpoint)
    kept_out = ("resume", "overwrite", "verify")
    recipe = {"task": "export", "settings": asdict(settings), "source": _identity(checkpoint)}
    recipe |= {n: str(v) for n, v in asdict(options).items() if n not in kept_out}
    staging = Staging(output, recipe, resume=options.resume, overwrite=options.overwrite)
    say(f"{checkpoint.folder} -> {output}: {settings.model_type}, {settings.num_layers} layers")

    dtypes = {item: options.dtype or weights.dtype(item) for item in items}
    tensors = plain_tensors(weights, dtypes)
    if options.engine == "bridge":
        tensors = engine.tensors_through_bridge(checkpoint, dtypes)
    _write_shards(staging, settings, items, tensors, dtypes, options, say)
    origin = weights.origin()
    if origin:
        say(origin)
    tokenizer_names = write_small_files(checkpoint, staging.folder, dtypes[items[0]])
    result = None
    if options.verify:
        result = compare_weights(weights, HFFolder(staging.folder), items)
        say(str(result))
        if result.differing:
            raise ConversionError(f"{staging.folder}: not published: {result}")
    checked = [] if result is None else [str(result)]
    if weights.is_quantised_run and has_masters:
        checked.append("logits not compared, since the run's own come from quantised weights")
    elif check is not None:
        checked.append(check(staging.folder))
    card = model_card(output.name, checkpoint, dtypes[items[0]], tokenizer_names, checked, origin)
    (staging.folder / "README.md").write_text(card)
    staging.publish()
    return result


def write_small_files(
    checkpoint: MegatronCheckpoint, folder: Path, dtype: torch.dtype
) -> list[str]:
    """Write all but the weights: tokenizer, config.json with `dtype`, generation settings.

    Gives `checkpoint.config` that dtype and, where it has none, the tokenizer's special ids.
    Returns the names of the tokenizer's files.
    """
    names = write_tokenizer(checkpoint.tokenizer, folder, checkpoint.args)
    if names and not checkpoint.has_ids:
        set_special_ids(checkpoint.config, folder)
    checkpoint.config.dtype = dtype
    checkpoint.config.save_pretrained(folder)
    _add_names_of_transformers_4(folder / "config.json")
    write_generation_config(checkpoint, folder)
    return names


def _add_names_of_transformers_4(path: Path) -> None:
    """Write what transformers 5 renamed under the former names too.

    transformers 4, and vLLM on top of it, would take rope_theta for 10000 without a word.
    """
    config = json.loads(path.read_text())
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_shards(
    staging: Staging,
    settings: ModelSettings,
    items: Sequence[Item],
    tensors: Callable[[Item], list[Tensor]],
    dtypes: dict[Item, torch.dtype],
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    def size(item: Item) -> int:
        return sum(num_bytes(dtypes[item], shape) for shape in item.hf_shapes(settings))

    def write_shard(shard: list[Item], stream: BinaryIO) -> None:
        entries = {
            name: (dtypes[item], shape)
            for item in shard
            for name, shape in zip(item.hf_names, item.hf_shapes(settings), strict=True)
        }
        write_header(stream, entries, {"format": "pt"})
        for item in shard:
            write_tensors(stream, tensors(item))
            progress.add(item.layer, size(item))

    progress = Progress([item.layer for item in items], say)
    shards = split_into_shards(items, size, parse_size(options.max_shard_size))
    names = _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        if staging.is_finished(name):
            progress.skip(name)
        else:
            staging.write(name, partial(write_shard, shard))
    progress.end()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(size, items))},
            "weight_map": {
                hf_name: name
                for name, shard in zip(names, shards, strict=True)
                for item in shard
                for hf_name in item.hf_names
            },
        }
        (staging.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def plain_tensors(
    weights: MegatronWeights, dtypes: dict[Item, torch.dtype]
) -> Callable[[Item], list[Tensor]]:
    """Return what gives an item's tensors under `Item.hf_names`: read, transformed and cast."""

    def tensors(item: Item) -> list[Tensor]:
        found = item.rule.transform.to_hf(weights.read(item), weights.settings)
        return [tensor.to(dtypes[item]) for tensor in found]

    return tensors


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _identity(checkpoint: MegatronCheckpoint) -> list[list[Any]]:
    files = sorted(checkpoint.folder.glob("*.distcp"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _vocab_size(
    options: ExportOptions,
    reference: Any,
    args: argparse.Namespace,
    tokenizer: Path | None,
    where: str,
) -> int:
    sizes = (options.vocab_size, getattr(reference, "vocab_size", None))
    size = next((size for size in sizes if size is not None), None)
    size = size if size is not None else getattr(args, "vocab_size", None)
    if size is None and tokenizer is not None:
        size = tokenizer_size(tokenizer)
    if size is None:
        raise ConversionError(
            f"{where}: its vocabulary is padded, and the true size is not stored; give "
            "--vocab-size, --tokenizer-model or --hf-config"
        )
    return size


def _config(
    settings: ModelSettings, reference: Any, args: argparse.Namespace, where: str
) -> tuple[Any, bool]:
    """The config class's own, with what it has no setting for from the reference, if it has one."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = getattr(args, "hf_config", {}) if reference is None else reference.to_diff_dict()
    known = dict(known) if known.get("model_type") == settings.model_type else {}
    if code := code_keys(known):
        raise ConversionError(f"{where}: its hf_config names {', '.join(code)}; expected no code")
    has_reference = bool(known)
    known.pop("model_type", None)
    # Derived by the class from what it is given.
    for name in ("layer_types", "transformers_version", "rope_scaling", "rope_theta"):
        known.pop(name, None)
    known |= config_values(settings, where)
    config = AutoConfig.for_model(settings.model_type, **known)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[settings.model_type]]
    return config, has_reference


def check_tokenizer(checkpoint: MegatronCheckpoint) -> None:
    """Raise ConversionError where the tokenizer has more ids than the model has rows."""
    if checkpoint.tokenizer is None:
        return
    size, vocab_size = tokenizer_size(checkpoint.tokenizer), checkpoint.settings.vocab_size
    if size is not None and size > vocab_size:
        raise ConversionError(
            f"--tokenizer-model {checkpoint.tokenizer}: it has {size} tokens, expected at most "
            f"{vocab_size}, the vocabulary of {checkpoint.folder}"
        )
