"""A cost embedding file from one source: read, brought to another tokenizer, reduced, written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_emo.cost_embedding import CostEmbeddingInfo, unit_rows, write_cost_embedding
from megatron_emo.cost_embedding.map_tokenizer import Coverage, map_table
from megatron_emo.cost_embedding.provenance import (
    Provenance,
    provenance_of_hf,
    provenance_of_torch_dist,
)
from megatron_emo.cost_embedding.reduce import reduce_rows
from megatron_emo.cost_embedding.sources import (
    TableSummary,
    cut_vocabulary,
    resolve_hf_dir,
    summarize_table,
    table_from_hf,
    table_from_npy,
    table_from_safetensors,
    table_from_torch_dist,
)
from megatron_emo.torch_dist import resolve_checkpoint_dir
from megatron_emo.vocabulary import fingerprint_tokenizer, load_tokenizer, tokens_by_id


class Prepared(NamedTuple):
    """What was written, and what it is like."""

    info: CostEmbeddingInfo
    summary: TableSummary
    coverage: Coverage | None
    """Of a table brought from one tokenizer to another."""


def prepare_cost_embedding(
    output: str | Path,
    *,
    from_hf: str | None = None,
    from_checkpoint: str | None = None,
    from_safetensors: str | None = None,
    from_npy: str | None = None,
    iteration: int | None = None,
    dtype: torch.dtype = torch.float32,
    normalize: bool = True,
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    cost_dim: int | None = None,
    map_from_tokenizer: str | None = None,
    text: str | Path | None = None,
    overwrite: bool = False,
) -> Prepared:
    """Write a cost embedding file from exactly one source and return what is in it.

    The vocabulary is `vocab_size` rows; without it as many as the tokenizer has tokens, and without
    a tokenizer what the source says. Of a Hugging Face folder the tokenizer is used, if it has one.
    With `cost_dim` the rows are reduced to that many principal components (see `reduce`); a table
    that has as many columns already is left as it is. `map_from_tokenizer` is the tokenizer that
    the source's rows are for, where it is not `tokenizer_model`; `text` is a file to weigh by what
    the mapping covers (see `map_table`).

    Raises:
        FileExistsError: `output` is there and may not be overwritten; said before anything is read.
        FileNotFoundError, ValueError: as the readers, `map_table`, `reduce_rows` and
            `write_cost_embedding`.
    """
    if cost_dim is not None and not normalize:
        raise ValueError(
            f"--cost-dim {cost_dim}: does not go with --no-normalize; reduced rows have unit length"
        )
    _check_mapping(map_from_tokenizer, tokenizer_model, text)
    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"--output {output}: it exists; give --overwrite to replace it")
    if tokenizer_model is None and from_hf is not None:
        folder = resolve_hf_dir(from_hf)
        tokenizer_model = str(folder) if _has_tokenizer(folder) else None
    tokenizer = None
    if tokenizer_model is not None:
        tokenizer = load_tokenizer(tokenizer_model, tokenizer_type)
    tokens = tokens_by_id(tokenizer)
    origin = _the_one(
        hf=from_hf, checkpoint=from_checkpoint, safetensors=from_safetensors, npy=from_npy
    )
    coverage = None
    if map_from_tokenizer is None:
        wanted = (len(tokens) or None) if vocab_size is None else vocab_size
        table, found, source = _read(*origin, iteration, wanted)
        table = cut_vocabulary(table, found if wanted is None else wanted)
    else:
        num_rows = len(tokens) if vocab_size is None else vocab_size
        table, coverage, source = _read_and_map(
            origin, iteration, map_from_tokenizer, tokenizer, num_rows, text
        )
        source += f" to {tokenizer_model}"
    table, reduction = _reduced(table, cost_dim)
    info = write_cost_embedding(
        output,
        table,
        source=source,
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        normalize=normalize,
        dtype=dtype,
        **asdict(_provenance(*origin, iteration)),
        **reduction,
    )
    return Prepared(info, summarize_table(table, tokens), coverage)


def _the_one(**origins: str | None) -> tuple[str, str]:
    given = [(kind, where) for kind, where in origins.items() if where is not None]
    if len(given) != 1:
        names = ", ".join(f"from_{kind}" for kind in origins)
        raise ValueError(f"expected one of {names}, got {len(given)}")
    return given[0]


def _read(
    kind: str, where: str, iteration: int | None, num_rows: int | None
) -> tuple[Tensor, int, str]:
    """Return (table, vocab_size, source in words)."""
    if kind == "checkpoint":
        table, found = table_from_torch_dist(where, iteration, vocab_size=num_rows)
        return table, found, f"checkpoint:{resolve_checkpoint_dir(where, iteration)}"
    readers = {"hf": table_from_hf, "safetensors": table_from_safetensors, "npy": table_from_npy}
    return *readers[kind](where), f"{kind}:{where}"


def _provenance(kind: str, where: str, iteration: int | None) -> Provenance:
    """Of a file, as little as it says."""
    if kind == "hf":
        return provenance_of_hf(where)
    if kind == "checkpoint":
        return provenance_of_torch_dist(where, iteration)
    return Provenance()


def _read_and_map(
    origin: tuple[str, str],
    iteration: int | None,
    map_from_tokenizer: str,
    tokenizer: object,
    num_rows: int,
    text: str | Path | None,
) -> tuple[Tensor, Coverage, str]:
    source_tokenizer = load_tokenizer(map_from_tokenizer)
    kind, where = origin
    if kind == "safetensors":
        _check_made_for(where, source_tokenizer, map_from_tokenizer)
    size = max(tokens_by_id(source_tokenizer), default=0) + 1
    table, _, source = _read(kind, where, iteration, size)
    table, coverage = map_table(table, source_tokenizer, tokenizer, num_rows=num_rows, text=text)
    source += (
        f", {coverage.num_covered} of {coverage.num_tokens} tokens mapped from tokenizer "
        f"{map_from_tokenizer}"
    )
    return table, coverage, source


def _reduced(table: Tensor, cost_dim: int | None) -> tuple[Tensor, Mapping[str, Any]]:
    """Return (the table, of `cost_dim` columns, what the file says about the reduction)."""
    if cost_dim is None or cost_dim == table.shape[1]:
        return table, {}
    rows, error = reduce_rows(unit_rows(table), cost_dim, flag="--cost-dim")
    return rows, {
        "source_dim": table.shape[1],
        "cosine_error_rms": error.rms,
        "cosine_error_max": error.max,
    }


def _check_mapping(
    map_from_tokenizer: str | None, tokenizer_model: str | None, text: str | Path | None
) -> None:
    if map_from_tokenizer is None:
        if text is not None:
            raise ValueError(f"--text {text}: expected --map-from-tokenizer beside it, got none")
        return
    if tokenizer_model is None:
        raise ValueError(
            f"--map-from-tokenizer {map_from_tokenizer}: expected --tokenizer-model, the tokenizer "
            "to map to, got none"
        )
    if not Path(map_from_tokenizer).exists():
        raise FileNotFoundError(
            f"--map-from-tokenizer {map_from_tokenizer}: no such file or folder"
        )
    if text is not None and not Path(text).is_file():
        raise FileNotFoundError(f"--text {text}: no such file")


def _check_made_for(file: str, tokenizer: object, name: str) -> None:
    """Raise ValueError where a cost embedding file was made for another tokenizer."""
    try:
        info = CostEmbeddingInfo.from_file(file)
    except (ValueError, FileNotFoundError):
        return  # another safetensors file, which does not say
    fingerprint = fingerprint_tokenizer(tokenizer)
    if info.tokenizer_fingerprint not in ("", fingerprint):
        raise ValueError(
            f"--map-from-tokenizer {name}: it has the fingerprint {fingerprint}, {file} was made "
            f"for {info.tokenizer_fingerprint}"
        )


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((folder / name).is_file() for name in names)
