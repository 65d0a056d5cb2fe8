"""The tokenizer and the generation settings that go with exported weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.hf import TOKENIZER_FILES, copy_tokenizer
from megatron_emo.vocabulary import load_tokenizer, tokens_by_id

if TYPE_CHECKING:
    from megatron_emo.conversion.export_hf import MegatronCheckpoint

_GENERATION = "generation_config.json"


def find_tokenizer(
    given: str | None, reference: str | None, args: argparse.Namespace
) -> Path | None:
    """Return where the tokenizer is: what was given, else the reference's, else the run's.

    A folder, a sentencepiece .model, or the vocabulary of GPT2BPETokenizer, whose merges lie in
    args.merge_file.

    Raises:
        ConversionError: one that was given and is not there.
    """
    if given is not None:
        if not Path(given).exists():
            raise ConversionError(f"--tokenizer-model {given}: no such file or folder")
        return Path(given)
    if reference is not None and _has_tokenizer(Path(reference)):
        return Path(reference)
    of_run = getattr(args, "tokenizer_model", None)
    if isinstance(of_run, str) and Path(of_run).exists():
        return Path(of_run)
    pair = [getattr(args, name, None) for name in ("vocab_file", "merge_file")]
    if all(isinstance(file, str) and Path(file).is_file() for file in pair):
        return Path(pair[0])
    return None


def tokenizer_size(path: Path) -> int | None:
    """Return how many ids a tokenizer uses, None for a folder without one."""
    if path.is_dir() and not _has_tokenizer(path):
        return None
    if path.suffix == ".json":
        return max(json.loads(path.read_text(encoding="utf-8")).values()) + 1
    tokens = tokens_by_id(load_tokenizer(path))
    return max(tokens) + 1 if tokens else None


def write_tokenizer(source: Path | None, folder: Path, args: argparse.Namespace) -> list[str]:
    """Write the tokenizer into `folder` and return the names of its files.

    A folder's files are copied. A sentencepiece model is copied and, as transformers' Llama
    tokenizer, written in Hugging Face's own format beside it; so are GPT-2's two files, as its
    GPT-2 tokenizer.
    """
    if source is None:
        return []
    if source.is_dir():
        return copy_tokenizer(source, folder)
    from transformers import GPT2Tokenizer, LlamaTokenizer

    if source.suffix == ".json":
        shutil.copyfile(source, folder / "vocab.json")
        shutil.copyfile(args.merge_file, folder / "merges.txt")
        GPT2Tokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    else:
        shutil.copyfile(source, folder / "tokenizer.model")
        LlamaTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def set_special_ids(config: Any, folder: Path) -> None:
    """Give a config the begin, end and padding ids of the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def write_generation_config(checkpoint: MegatronCheckpoint, folder: Path) -> None:
    """Write generation_config.json: the one beside the tokenizer, else the config's ids."""
    from transformers import GenerationConfig

    source = checkpoint.tokenizer
    if source is not None and source.is_dir() and (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)
    else:
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
