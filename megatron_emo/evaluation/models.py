"""Causal language models from local folders, and their logits in blocks of bounded size."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_emo.evaluation.records import Json, Record, hash_file, hash_model
from megatron_emo.foreign_files import code_in_folder

DTYPES = ("float32", "bfloat16", "float16", "float64")
BATCH_TOKENS = 2048
"""Tokens of a forward pass, padding counted: its logits take that many rows of the vocabulary."""

_BLOCK_ROWS = 256
_UNCOUNTED = -1


@dataclass(frozen=True)
class LanguageModel:
    """A model ready for scoring, with what names it."""

    model: Any
    tokenizer: Any
    name: str
    sha256: str
    context_length: int | None
    """Tokens that it can read at once; None where its config does not say."""
    device: torch.device

    @property
    def prefix_id(self) -> int | None:
        """What stands before a text's first token: BOS, else EOS, else nothing."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return eos if bos is None else bos

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding counted."""
        return self.model.config.get_text_config().vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, no special tokens added.

        Raises:
            ValueError: a text that UTF-8 cannot hold, by a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {text[:40]!r}: expected UTF-8: {error}") from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Window:
    """Tokens read at once; the predictions from position `first` on count."""

    tokens: Sequence[int]
    targets: Sequence[int]
    """What came after each position from `first` on; -1 where nothing did."""
    first: int = 0
    document: int = 0


@dataclass(frozen=True)
class Block:
    """Predictions that count, of one or several windows."""

    window: torch.Tensor
    """[n] int64: the index of the window."""
    target: torch.Tensor
    """[n] int64, -1 for none."""
    logits: torch.Tensor
    """[n, vocabulary], fp32 (fp64 of an fp64 model)."""


class Progress:
    """Lines on stderr, one in `every` seconds at most and none in the first ones."""

    def __init__(self, what: str, total: int, unit: str = "tokens", every: float = 5.0) -> None:
        self._what, self._total, self._unit, self._every = what, total, unit, every
        self._done, self._begun = 0, time.monotonic()
        self._said = self._begun

    def add(self, amount: int) -> None:
        """Count what is done; say so when it is time."""
        self._done += amount
        now = time.monotonic()
        if now - self._said < self._every:
            return
        self._said = now
        seconds = now - self._begun
        left = seconds * (self._total - self._done) / max(self._done, 1)
        print(
            f"{self._what}: {self._done:,}/{self._total:,} {self._unit}, "
            f"{seconds:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def load_model(
    folder: str | os.PathLike,
    *,
    flag: str = "--model",
    dtype: str = "float32",
    device: str = "auto",
) -> LanguageModel:
    """Return the causal language model and tokenizer of a local folder; none of its code is run.

    Args:
        dtype: one of DTYPES, or auto for what the folder says.
        device: as `resolve_device`.

    Raises:
        FileNotFoundError: no such folder, or one without config.json.
        ValueError: what transformers cannot load, code in the folder, weights that are missing, an
            unknown dtype or device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{flag} {folder}: expected a folder with config.json")
    if code := code_in_folder(folder):
        raise ValueError(
            f"{flag} {folder}: found {', '.join(code)}, which is not run; expected none"
        )
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, auto, got {dtype!r}")
    place = resolve_device(device)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype, dtype), output_loading_info=True, **local
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{flag} {folder}: transformers cannot load it: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{flag} {folder}: weights are missing: {missing}")
    return LanguageModel(
        model.eval().to(place),
        tokenizer,
        folder.resolve().name,
        hash_model(folder),
        context_length_of(model.config),
        place,
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; auto is cuda where there is one, else cpu.

    Raises:
        ValueError: this machine has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: expected a device of this machine, got {device}: {reason}"
        ) from error
    return place


def context_length_of(config: Any) -> int | None:
    """Return how many tokens a model of this config reads at once, None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_same_tokenizer(model: LanguageModel, other: LanguageModel, flag: str) -> None:
    """Check that both split texts into the same ids of the same tokens.

    Raises:
        ValueError: a token with another id, named.
    """
    ours, theirs = model.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
    if differing:
        token = differing[0]
        raise ValueError(
            f"{flag} {other.name}: expected the tokenizer of {model.name} ({len(ours)} tokens), "
            f"got {len(theirs)} tokens, {len(differing)} of either with another id or missing: "
            f"{token!r} is {theirs.get(token)}, expected {ours.get(token)}"
        )


def check_same_ids(model: LanguageModel, other: LanguageModel, text: str, flag: str) -> None:
    """Check that a text has the same ids: equal vocabularies may have other merges.

    Raises:
        ValueError: it has not.
    """
    if model.encode(text) != other.encode(text):
        raise ValueError(
            f"{flag} {other.name}: expected the tokenizer of {model.name}, but it splits "
            f"{text[:40]!r} in another way"
        )


def logit_blocks(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    batch_tokens: int = BATCH_TOKENS,
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> Iterator[Block]:
    """Yield the logits, over the temperature, of all predictions that count, longest windows first.

    Held at once: the model's own logits of `batch_tokens` tokens, padding counted, and a block of
    256 rows of them. A window longer than `batch_tokens` is read in pieces, with a key-value cache.

    Raises:
        ValueError: batch_tokens below 1, or a temperature that is not above 0.
    """
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens: expected at least 1, got {batch_tokens}")
    if not temperature > 0:
        raise ValueError(f"--temperature: expected above 0, got {temperature}")
    for batch in _batches(windows, batch_tokens):
        for block in _forward(model, windows, batch, batch_tokens):
            if temperature != 1.0:
                block = replace(block, logits=block.logits / temperature)
            yield block
            if progress:
                progress.add(len(block.window))


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of windows of like length; padded to the longest they fit `batch_tokens`."""
    order = [index for index, window in enumerate(windows) if window.targets]
    order.sort(key=lambda index: -len(windows[index].tokens))
    begin = 0
    while begin < len(order):
        rows = max(1, batch_tokens // len(windows[order[begin]].tokens))
        yield order[begin : begin + rows]
        begin += rows


@torch.inference_mode()
def _forward(
    model: LanguageModel, windows: Sequence[Window], batch: list[int], batch_tokens: int
) -> Iterator[Block]:
    """Padding stands on the right, where causal attention does not look."""
    width = len(windows[batch[0]].tokens)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), _UNCOUNTED)
    counted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, index in enumerate(batch):
        window = windows[index]
        size = len(window.tokens)
        tokens[row, :size] = torch.tensor(window.tokens)
        targets[row, window.first : size] = torch.tensor(window.targets)
        counted[row, window.first : size] = True
    first = min(windows[index].first for index in batch)
    names = torch.tensor(batch)
    for begin, logits in _logits(model, tokens.to(model.device), first, batch_tokens):
        rows, columns = counted[:, begin : begin + logits.shape[1]].nonzero(as_tuple=True)
        for row, column in zip(rows.split(_BLOCK_ROWS), columns.split(_BLOCK_ROWS), strict=True):
            if not len(row):
                continue
            block = logits[row.to(model.device), column.to(model.device)]
            block = block if block.dtype == torch.float64 else block.float()
            yield Block(names[row], targets[row, begin + column], block)


def _logits(
    model: LanguageModel, tokens: torch.Tensor, first: int, batch_tokens: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(position, logits [b, n, vocabulary] from there on), nothing before `first` where avoidable.

    tokens is [b, width].
    """
    width = tokens.shape[1]
    size = max(1, batch_tokens // len(tokens))
    can_keep = "logits_to_keep" in inspect.signature(model.model.forward).parameters
    cache = None
    for begin in range(0, width, size):
        end = min(begin + size, width)
        kept = max(1, end - max(begin, first)) if can_keep else end - begin
        limit = {"logits_to_keep": kept} if can_keep else {}
        out = model.model(
            input_ids=tokens[:, begin:end], past_key_values=cache, use_cache=size < width, **limit
        )
        cache = out.past_key_values if size < width else None
        yield end - kept, out.logits


def complete_records(
    records: Sequence[Record],
    model: LanguageModel | None,
    files: Sequence[str | os.PathLike],
    **common: Any,
) -> list[Record]:
    """Return records with the model, the hashes of input files, and `common` fields filled in."""
    data = hash_files(files)
    if model:
        common |= {"model": model.name, "model_sha256": model.sha256}
    return [replace(record, data=data, **common) for record in records]


def hash_files(files: Sequence[str | os.PathLike]) -> Mapping[str, Json]:
    """Return {name: sha256}; files of one name have their folder's name before it."""
    paths = [Path(file).resolve() for file in files]
    names = [path.name for path in paths]
    return {
        path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}": hash_file(
            path
        )
        for path in paths
    }
