"""A Hugging Face folder brought into the checkpoint format that Megatron starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_emo.conversion import engine
from megatron_emo.conversion.architectures import rules_of, settings_of_config
from megatron_emo.conversion.arguments import arguments_of
from megatron_emo.conversion.compare import WeightComparison, check_coverage, compare_weights
from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.hf import HFFolder, copy_tokenizer
from megatron_emo.conversion.mapping import (
    LEADING_ROWS,
    PADDED_KEYS,
    Item,
    items_of,
    pad_vocabulary,
    with_norm_keys,
)
from megatron_emo.conversion.megatron_weights import MegatronWeights
from megatron_emo.conversion.plan import (
    DEFAULT_SHARD_SIZE,
    Progress,
    parse_size,
    split_into_shards,
)
from megatron_emo.conversion.settings import ModelSettings
from megatron_emo.conversion.staging import Staging
from megatron_emo.conversion.torch_dist_writer import (
    RELEASE,
    Piece,
    PieceWriter,
    common_state,
    extra_state_keys,
    write_index,
    write_tracker,
)

TRANSFORMER_IMPLS = ("local", "transformer_engine")


@dataclass(frozen=True)
class ImportOptions:
    """How a checkpoint is to be written."""

    dtype: torch.dtype | None = None
    """To store tensors in; None leaves each as it is."""
    transformer_impl: str = "local"
    """Whose key names a mixture of experts gets; other models have the same ones in both. The
    engine bridge writes those of local alone, and refuses another."""
    make_vocab_size_divisible_by: int = 128
    tensor_model_parallel_size: int = 1
    """The vocabulary is padded to a multiple of the product of the two."""
    max_position_embeddings: int | None = None
    """A smaller context than the model's; rotary positions only."""
    max_shard_size: str = DEFAULT_SHARD_SIZE
    engine: str = "auto"
    resume: bool = False
    overwrite: bool = False
    verify: bool = True


def import_hf(
    hf_dir: str | Path,
    output: str | Path,
    options: ImportOptions | None = None,
    *,
    check: Callable[[Path], str] | None = None,
    say: Callable[[str], None] = print,
) -> WeightComparison | None:
    """Write `output`, which --load and --pretrained-checkpoint accept; return the verification.

    One tensor is in memory at a time. `output` appears at the end, by one rename.

    Args:
        check: called with the folder before that rename; an exception keeps it from happening.

    Raises:
        FileNotFoundError, FileExistsError, ConversionError: what was found, and where.
        OSError: writing failed; `output` is as it was, and --resume goes on.
    """
    options = options or ImportOptions()
    folder, output = HFFolder(hf_dir), Path(output)
    settings = _settings(folder, options)
    rules = with_norm_keys(rules_of(settings), options.transformer_impl)
    items = list(items_of(rules, settings))
    check_coverage(folder, items, settings)
    recipe = {"task": "import", "settings": asdict(settings), "source": _identity(folder)}
    kept_out = ("resume", "overwrite", "verify")
    recipe |= {n: str(v) for n, v in asdict(options).items() if n not in kept_out}
    staging = Staging(output, recipe, resume=options.resume, overwrite=options.overwrite)
    say(f"{folder.path} -> {output}: {settings.model_type}, {settings.num_layers} layers")

    args = _arguments(staging, folder, settings, options)
    if options.engine == "bridge":
        engine.import_through_bridge(folder, staging.folder, args, settings, items)
    else:
        pieces = _write_tensors(staging, folder, items, settings, options, say)
        pieces += _write_objects(staging, args, settings)
        write_index(staging.folder / RELEASE, pieces)
        write_tracker(staging.folder)
    result = None
    if options.verify:
        weights = MegatronWeights(staging.folder / RELEASE, items, settings)
        result = compare_weights(weights, folder, items)
        say(str(result))
        if result.differing:
            raise ConversionError(f"{staging.folder}: not published: {result}")
    if check is not None:
        check(staging.folder)
    staging.publish()
    return result


def padded_vocab_size(vocab_size: int, options: ImportOptions) -> int:
    """Return the rows that Megatron gives the embedding."""
    multiple = options.make_vocab_size_divisible_by * options.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def _settings(folder: HFFolder, options: ImportOptions) -> ModelSettings:
    config = folder.config
    limit = options.max_position_embeddings
    if limit is not None:
        if config.model_type in ("gpt2", "opt") or limit > config.max_position_embeddings:
            raise ConversionError(
                f"--max-position-embeddings {limit}: expected at most "
                f"{config.max_position_embeddings}, of a model with rotary positions"
            )
        config.max_position_embeddings = limit
    settings = settings_of_config(config, f"--hf {folder.path}")
    if options.transformer_impl not in TRANSFORMER_IMPLS:
        raise ConversionError(
            f"--transformer-impl {options.transformer_impl}: expected one of {TRANSFORMER_IMPLS}"
        )
    if options.engine == "bridge" and options.transformer_impl != "local":
        raise ConversionError(
            f"--transformer-impl {options.transformer_impl}: expected local with --engine bridge, "
            "which fills a model of Megatron's local layers; --engine plain writes the other keys"
        )
    return settings


def _identity(folder: HFFolder) -> list[list[Any]]:
    files = sorted({stored.file for stored in folder.tensors.values()})
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _write_tensors(
    staging: Staging,
    folder: HFFolder,
    items: list[Item],
    settings: ModelSettings,
    options: ImportOptions,
    say: Callable[[str], None],
) -> list[Piece]:
    def num_bytes(item: Item) -> int:
        stored = [folder.tensors[name] for name in item.hf_names]
        width = (options.dtype or torch.float32).itemsize
        return sum(width * torch.Size(tensor.shape).numel() for tensor in stored)

    def write_shard(shard: list[Item], name: str, stream: BinaryIO) -> list[dict[str, Any]]:
        writer = PieceWriter(stream, Path(name).name)
        for item in shard:
            tensors = [folder.read(hf_name) for hf_name in item.hf_names]
            _write_item(writer, item, tensors, settings, options)
            progress.add(item.layer, sum(tensor.nbytes for tensor in tensors))
        return [asdict(piece) for piece in writer.pieces]

    progress = Progress([item.layer for item in items], say)
    pieces = []
    shards = split_into_shards(items, num_bytes, parse_size(options.max_shard_size))
    for number, shard in enumerate(shards):
        name = f"{RELEASE}/__{number}_0.distcp"
        if staging.is_finished(name):
            progress.skip(name)
        else:
            staging.write(name, partial(write_shard, shard, name))
        pieces += [_piece(note) for note in staging.notes(name)]
    progress.end()
    return pieces


def _write_item(
    writer: PieceWriter,
    item: Item,
    tensors: list[Tensor],
    settings: ModelSettings,
    options: ImportOptions,
) -> None:
    key = item.rule.megatron
    if len({tensor.dtype for tensor in tensors}) > 1 and options.dtype is None:
        raise ConversionError(
            f"{key}: {item.hf_names} have the dtypes {[str(t.dtype) for t in tensors]}, expected "
            "one; give --dtype"
        )
    if options.dtype is not None:
        tensors = [tensor.to(options.dtype) for tensor in tensors]
    tensor = item.rule.transform.to_megatron(tensors, settings)
    if item.rule.leading_rows:
        writer.write(key + LEADING_ROWS, tensor[: item.rule.leading_rows], (), ())
        tensor = tensor[item.rule.leading_rows :]
    if key in PADDED_KEYS:
        tensor = pad_vocabulary(tensor, padded_vocab_size(settings.vocab_size, options))
    writer.write(key, tensor, item.index, item.stack(settings))


def _arguments(
    staging: Staging, folder: HFFolder, settings: ModelSettings, options: ImportOptions
) -> Any:
    first = next(iter(folder.tensors.values())).torch_dtype
    args = arguments_of(
        settings,
        padded_vocab_size=padded_vocab_size(settings.vocab_size, options),
        dtype=options.dtype or first,
    )
    args.make_vocab_size_divisible_by = options.make_vocab_size_divisible_by
    args.hf_model_type = settings.model_type
    args.hf_config = json.loads(json.dumps(folder.config.to_diff_dict()))
    tokenizer = staging.folder / "tokenizer"
    if copy_tokenizer(folder.path, tokenizer):
        args.tokenizer_type = "HuggingFaceTokenizer"
        args.tokenizer_model = str(staging.target / "tokenizer")
    if (folder.path / "generation_config.json").is_file():
        tokenizer.mkdir(exist_ok=True)
        shutil.copyfile(
            folder.path / "generation_config.json", tokenizer / "generation_config.json"
        )
    return args


def _write_objects(staging: Staging, args: Any, settings: ModelSettings) -> list[Piece]:
    def write(stream: BinaryIO) -> list[dict[str, Any]]:
        writer = PieceWriter(stream, name.removeprefix(f"{RELEASE}/"))
        writer.write_object(*common_state(args))
        for key in extra_state_keys(
            settings.num_layers, settings.num_experts, qk_layernorm=settings.qk_layernorm
        ):
            writer.write_object(key, None)
        return [asdict(piece) for piece in writer.pieces]

    name = f"{RELEASE}/__0_1.distcp"
    return [_piece(note) for note in staging.write(name, write)]


def _piece(note: dict[str, Any]) -> Piece:
    piece = Piece(**note)
    shape = None if piece.shape is None else tuple(piece.shape)
    return replace(piece, shape=shape, offsets=tuple(piece.offsets), sizes=tuple(piece.sizes))
