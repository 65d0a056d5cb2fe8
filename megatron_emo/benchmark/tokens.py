"""Target ids: how often a token repeats decides what an expected cost costs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ZIPF_SHIFT = 2.7

IDS = ("real", "distinct")
"""real: as a text has them; distinct: no id twice, the most an expected cost can cost."""


class Target(NamedTuple):
    """Token ids of a batch."""

    ids: Tensor
    """[num_tokens], int64"""
    source: str
    """Where they are from, for a reader of the result."""


def load_target(
    num_tokens: int,
    vocab_size: int,
    seed: int,
    *,
    ids: str = "real",
    tokens: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
) -> Target:
    """Return the first `num_tokens` ids of the given file, or ids drawn from a law.

    Args:
        ids: one of `IDS`; with distinct ones no file is read.
        tokens: a .npy file, or the prefix of a .bin/.idx pair (needs megatron-core).
        text, tokenizer: a UTF-8 text and a tokenizer.json.

    Raises:
        FileNotFoundError, ValueError: naming the flag; too few ids, or one outside the vocabulary.
    """
    _check_source(ids, tokens, text, tokenizer)
    if ids == "distinct":
        return Target(distinct_token_ids(num_tokens, vocab_size, seed), "--ids distinct")
    if tokens:
        target = Target(_read_ids(tokens, num_tokens), f"--tokens {Path(tokens).name}")
    elif text:
        target_ids = _tokenize(text, tokenizer, num_tokens)
        target = Target(target_ids, f"--text {Path(text).name}, --tokenizer {Path(tokenizer).name}")
    else:
        target_ids = zipf_token_ids(num_tokens, vocab_size, seed)
        target = Target(target_ids, f"drawn from a Zipf-Mandelbrot law, --seed {seed}")
    if len(target.ids) < num_tokens:
        raise ValueError(f"{target.source}: expected {num_tokens} ids, got {len(target.ids)}")
    outside = target.ids[(target.ids < 0) | (target.ids >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"{target.source}: expected ids below --vocab-size {vocab_size}, got {int(outside[0])}"
        )
    return target


def _check_source(ids: str, tokens: str | None, text: str | None, tokenizer: str | None) -> None:
    if tokens and text:
        raise ValueError("--tokens and --text: expected one of them, got both")
    if (text is None) != (tokenizer is None):
        raise ValueError("--text and --tokenizer: expected both or neither")
    if ids not in IDS:
        raise ValueError(f"--ids: expected one of {', '.join(IDS)}, got {ids!r}")
    if ids == "distinct" and (tokens or text):
        raise ValueError("--ids distinct: draws its own, expected no --tokens and no --text")


def zipf_token_ids(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return ids [num_tokens] drawn with probability proportional to 1 / (rank + 2.7)."""
    generator = torch.Generator().manual_seed(seed)
    law = 1.0 / (torch.arange(1, vocab_size + 1, dtype=torch.float64) + ZIPF_SHIFT)
    return torch.multinomial(law, num_tokens, replacement=True, generator=generator)


def distinct_token_ids(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return ids [num_tokens] drawn without replacement.

    Raises:
        ValueError: more tokens than the vocabulary has.
    """
    if num_tokens > vocab_size:
        raise ValueError(
            f"--ids distinct: expected --num-tokens of at most --vocab-size {vocab_size}, "
            f"got {num_tokens}"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(vocab_size, generator=generator)[:num_tokens]


def _read_ids(path: str, num_tokens: int) -> Tensor:
    if path.endswith(".npy"):
        ids = np.load(path, mmap_mode="r").reshape(-1)[:num_tokens]
        if ids.dtype.kind not in "iu":
            raise ValueError(f"--tokens {path}: expected integers, got {ids.dtype}")
        return torch.from_numpy(ids.astype(np.int64))
    for suffix in (".bin", ".idx"):
        if not Path(path + suffix).is_file():
            raise FileNotFoundError(
                f"--tokens: expected a .npy file or the prefix of a .bin/.idx pair, "
                f"found no {path}{suffix}"
            )
    return torch.from_numpy(_read_indexed_dataset(path, num_tokens))


def _read_indexed_dataset(prefix: str, num_tokens: int) -> np.ndarray:
    # Late: it imports Megatron.
    from megatron_emo.data.upstream import import_indexed_dataset

    with warnings.catch_warnings():
        # Outside torchrun Megatron warns that it takes itself for rank 0, as it is here.
        warnings.filterwarnings("ignore", "Could not determine rank")
        dataset = import_indexed_dataset().IndexedDataset(prefix)
    documents, count = [np.empty(0, np.int64)], 0
    for i in range(len(dataset)):
        if count >= num_tokens:
            break
        documents.append(dataset[i].astype(np.int64))
        count += len(documents[-1])
    return np.concatenate(documents)[:num_tokens]


def _tokenize(text_path: str, tokenizer_path: str, num_tokens: int) -> Tensor:
    from tokenizers import Tokenizer

    if not Path(tokenizer_path).is_file():
        raise FileNotFoundError(f"--tokenizer: no such file: {tokenizer_path}")
    if not Path(text_path).is_file():
        raise FileNotFoundError(f"--text: no such file: {text_path}")
    with open(text_path, encoding="utf-8") as file:
        text = file.read(32 * num_tokens)  # A token is some 4 characters long.
    return torch.tensor(Tokenizer.from_file(tokenizer_path).encode(text).ids[:num_tokens])
