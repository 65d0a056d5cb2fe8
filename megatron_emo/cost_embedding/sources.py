"""Where a cost embedding comes from: a Hugging Face folder, a Megatron checkpoint, a tensor file
of safetensors or NumPy.

Each reader returns (table [rows, dim], vocab_size) and reads that one tensor only. Beside them, the
figures that show what a table is like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_emo.cost_embedding import unit_rows
from megatron_emo.foreign_files import code_in_folder, read_weight_map, refuse_links_out
from megatron_emo.torch_dist import (
    read_arguments,
    read_tensor,
    resolve_checkpoint_dir,
    tensor_shapes,
)

_MEGATRON_PREFIXES = ("", "model.", "module.", "model.module.")
_MEGATRON_HEADS = ("output_layer.weight", "embedding.word_embeddings.weight")
"""In the order of preference: an untied head, else the embedding that is the head."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def table_from_hf(model_dir: str | Path) -> tuple[Tensor, int]:
    """Return the output head of a local Hugging Face model folder and the configured vocab_size.

    The head's name comes from the model, built without memory from config.json by transformers; no
    code from the folder runs. Needs transformers.

    Raises:
        FileNotFoundError: no folder or config.json, or weights in .bin files only.
        ValueError: not a causal language model, no head among the tensors, a quantised head.
    """
    folder = resolve_hf_dir(model_dir)
    files = _tensor_files(folder)
    names, vocab_size, _ = head_names(folder)
    name = next((name for name in names if name in files), None)
    if name is None:
        raise ValueError(f"--from-hf {folder}: expected one of {names}, found {sorted(files)}")
    table = _read_safetensor(files[name], name)
    return cut_vocabulary(table, vocab_size), vocab_size


def resolve_hf_dir(model_dir: str | Path) -> Path:
    """Return a model's folder; of a repository in the hub's cache, the snapshot that is its main.

    Raises:
        FileNotFoundError: no config.json there.
        ValueError: a model with code of its own.
    """
    folder = Path(model_dir)
    main = folder / "refs" / "main"
    if main.is_file():
        folder = folder / "snapshots" / Path(main.read_text().strip()).name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--from-hf {folder}: expected a folder with config.json")
    if code := code_in_folder(folder):
        raise ValueError(
            f"--from-hf {folder}: found {', '.join(code)}, which is not run; expected none"
        )
    return folder


def table_from_torch_dist(
    checkpoint_dir: str | Path, iteration: int | None = None, *, vocab_size: int | None = None
) -> tuple[Tensor, int]:
    """Return the output head of a torch_dist checkpoint without vocabulary padding, and vocab_size.

    Args:
        checkpoint_dir: the run's checkpoint folder, or one iteration's.
        iteration: by default the latest.
        vocab_size: the vocabulary without padding; by default the --vocab-size the run was given.

    Raises:
        FileNotFoundError, ValueError: as `resolve_checkpoint_dir`; no head in the checkpoint; a
            vocabulary size that is unknown or larger than the head.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir, iteration)
    key = megatron_head(folder)
    if vocab_size is None:
        vocab_size = getattr(read_arguments(folder), "vocab_size", None)
    if vocab_size is None:
        rows = tensor_shapes(folder)[key][0]
        raise ValueError(
            f"checkpoint {folder}: {key} has {rows} rows with padding, and the true "
            "vocabulary size is not stored; give --vocab-size or --tokenizer-model"
        )
    table = _checked(read_tensor(folder, key), f"{folder}: {key}")
    return cut_vocabulary(table, vocab_size), vocab_size


def table_from_safetensors(file_and_name: str) -> tuple[Tensor, int]:
    """Return a matrix out of a safetensors file, named as FILE or FILE:TENSOR, and its row count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, no such tensor, several and none named, not a matrix.
    """
    file, _, name = file_and_name, "", ""
    if not Path(file).is_file() and ":" in file_and_name:
        file, _, name = file_and_name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--from-safetensors {file_and_name}: no such file")
    names = _safetensor_names(Path(file))
    if not name and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(
            f"--from-safetensors {file_and_name}: expected FILE:TENSOR with one of {names}"
        )
    table = _read_safetensor(Path(file), name)
    return table, table.shape[0]


def table_from_npy(file: str | Path) -> tuple[Tensor, int]:
    """Return the matrix in a NumPy .npy file and its row count; nothing is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole .npy file, or no matrix of fp64, fp32 or fp16.
    """
    import numpy as np

    if not Path(file).is_file():
        raise FileNotFoundError(f"--from-npy {file}: no such file")
    try:
        mapped = np.lib.format.open_memmap(file, mode="r")
        # Byte order and strides torch does not know; a copy, since the map is read-only.
        array = np.array(mapped, dtype=mapped.dtype.newbyteorder("="), order="C")
        table = torch.from_numpy(array)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--from-npy {file}: expected a .npy file of numbers: {error}") from error
    return _checked(table, f"--from-npy {file}"), len(table)


def cut_vocabulary(table: Tensor, vocab_size: int) -> Tensor:
    """Return the first `vocab_size` rows.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= vocab_size <= table.shape[0]:
        raise ValueError(
            f"--vocab-size {vocab_size}: expected 1 to {table.shape[0]}, the rows of the table"
        )
    return table[:vocab_size]


@dataclass(frozen=True)
class TableSummary:
    """Figures of a table that show whether it can tell words apart."""

    num_pairs: int
    mean_cosine: float
    """Over random pairs of distinct non-zero rows; near 1 means that all costs are near 0."""
    neighbours: dict[str, list[tuple[str, float]]]
    """Of some words, the nearest tokens with their cosines."""


def summarize_table(
    table: Tensor,
    tokens: Mapping[int, str | bytes] | None = None,
    *,
    num_pairs: int = 10_000,
    num_words: int = 5,
    num_neighbours: int = 5,
    seed: int = 0,
) -> TableSummary:
    """Return the figures of a table [vocab_size, dim]; pairs and words are drawn by `seed`."""
    rows = unit_rows(table)
    live = rows.any(dim=1).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    mean_cosine = float("nan")
    if len(live) > 1:
        first = torch.randint(len(live), (num_pairs,), generator=generator)
        shift = torch.randint(1, len(live), (num_pairs,), generator=generator)
        second = (first + shift) % len(live)
        chunks = zip(live[first].split(1024), live[second].split(1024), strict=True)
        mean_cosine = sum(float((rows[a] * rows[b]).sum()) for a, b in chunks) / num_pairs
    words = [index for index in live.tolist() if _is_word((tokens or {}).get(index))]
    chosen = torch.randperm(len(words), generator=generator)[:num_words].tolist()
    neighbours = {}
    for index in (words[i] for i in chosen):
        cosines = (rows @ rows[index]).index_fill_(0, torch.tensor(index), -torch.inf)
        best = cosines.topk(min(num_neighbours, len(rows) - 1))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        neighbours[str(tokens[index])] = [(str(tokens.get(j, j)), value) for j, value in pairs]
    return TableSummary(num_pairs, mean_cosine, neighbours)


def _is_word(token: str | bytes | None) -> bool:
    word = token.lstrip("\u2581\u0120") if isinstance(token, str) else ""
    return len(word) > 2 and word.isalpha()


def megatron_head(folder: Path) -> str:
    """Return the key of the output head in one iteration's folder; a tied one is the embedding's.

    Raises:
        ValueError: no head there.
    """
    shapes = tensor_shapes(folder)
    candidates = [prefix + head for head in _MEGATRON_HEADS for prefix in _MEGATRON_PREFIXES]
    key = next((name for name in candidates if name in shapes), None)
    if key is None:
        raise ValueError(
            f"checkpoint {folder}: expected one of {candidates}, found {len(shapes)} "
            f"tensors such as {sorted(shapes)[:5]}"
        )
    return key


def head_names(folder: Path) -> tuple[list[str], int, bool]:
    """Return the names under which the output head may be stored, likeliest first, vocab_size, and
    whether the head is the input embedding.

    Raises:
        ValueError: a model without a head.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"--from-hf {folder}: {type(model).__name__} has no output embedding")
    parameters = model.named_parameters(remove_duplicate=False)
    # Several when it is tied: the input embedding goes by its own name.
    names = [name for name, parameter in parameters if parameter is head.weight]
    # A folder saved from the model without its head omits the prefix of the body.
    bare = [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    is_tied = model.get_input_embeddings().weight is head.weight
    return list(dict.fromkeys(names + bare)), config.get_text_config().vocab_size, is_tied


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a Hugging Face folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_weight_map(index).items()}
    single = folder / "model.safetensors"
    if single.is_file():
        refuse_links_out(folder, (single.name,))
        return dict.fromkeys(_safetensor_names(single), single)
    binaries = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    hint = (
        f"found {binaries}, which are pickles and not read here; convert them once with "
        "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        if binaries
        else "found no weights"
    )
    raise FileNotFoundError(f"--from-hf {folder}: expected model.safetensors or its index; {hint}")


def _safetensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return sorted(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file: {error}") from error


def _read_safetensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            return _checked(opened.get_tensor(name), f"{file}: {name}")
    except SafetensorError as error:
        raise ValueError(f"{file}: reading {name}: {error}") from error


def _checked(table: Tensor, where: str) -> Tensor:
    if table.dim() != 2 or table.dtype not in _FLOATS:
        raise ValueError(
            f"{where}: expected a matrix of fp64, fp32, fp16 or bf16, got {table.dtype} with shape "
            f"{list(table.shape)}"
        )
    return table
