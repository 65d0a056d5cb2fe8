"""Features of texts: what a language model's last layer holds at a text's last token."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_emo.evaluation.records import hash_model

MAX_TOKENS = 256
"""Tokens of a text that are read, by default; a model of fewer positions reads those."""
BLOCK = 64
"""Texts whose features a cache keeps at a time, so that a run which was cut off goes on."""

_SECONDS_BETWEEN_LINES = 5.0
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def compute_features(
    texts: Sequence[str],
    model_dir: str | os.PathLike,
    max_tokens: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    cache_dir: str | os.PathLike | None = None,
    say: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Return [texts, hidden] float32, in the order of `texts`.

    The tokenizer adds the special tokens it adds to any text. A text without a token is read as its
    beginning-of-text token (or end-of-text, where it has no other). Texts are read in the order of
    their lengths, padded on the right and masked, so that what stands beside a text changes its
    features by rounding alone.

    Args:
        model_dir: folder of any model and tokenizer that AutoModel and AutoTokenizer read.
        max_tokens: texts are cut to so many tokens; MAX_TOKENS, or the model's positions if fewer.
        cache_dir: keeps features by model, texts and `max_tokens`.
        say: takes lines of progress.

    Raises:
        ValueError: no texts, a number below 1, more tokens than the model has positions, or a text
            without a token where the tokenizer has no such special token.
        OSError: a folder without a model or a tokenizer.
    """
    if not texts:
        raise ValueError("features: expected at least 1 text, found none")
    for flag, number in (("--max-tokens", max_tokens), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{flag}: expected at least 1, got {number}")
    max_tokens = resolve_max_tokens(model_dir, max_tokens)
    cache = _Cache(cache_dir, _key(texts, model_dir, max_tokens))
    if (found := cache.load("all")) is not None:
        return found
    batches = _Batches(texts, model_dir, max_tokens, batch_size, device)
    say = say or (lambda line: None)
    started = last = time.monotonic()
    parts = []
    for start in range(0, len(texts), BLOCK):
        rows = batches.order[start : start + BLOCK]
        part = cache.load(f"rows-{start}")
        if part is None:
            blocks = []
            for block in batches.compute(rows):
                blocks.append(block)
                if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                    last = time.monotonic()
                    done = start + sum(map(len, blocks))
                    say(f"features: {done} of {len(texts)} texts, {last - started:.0f} s")
            part = np.concatenate(blocks)
            cache.save(f"rows-{start}", part)
        parts.append(part)
    features = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
    features[batches.order] = np.concatenate(parts)
    cache.save("all", features)
    cache.remove("rows-*")
    return features


def load_features(path: str | os.PathLike) -> np.ndarray:
    """Return the matrix of a .npy file, [texts, width].

    Raises:
        ValueError: a file that is no array of numbers, or not of two dimensions.
    """
    try:
        features = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected a .npy array of numbers: {error}") from error
    if getattr(features, "ndim", None) != 2 or not np.issubdtype(features.dtype, np.floating):
        found = f"{getattr(features, 'dtype', None)} {getattr(features, 'shape', None)}"
        raise ValueError(f"{path}: expected floats of shape [texts, width], got {found}")
    return features


def resolve_max_tokens(model_dir: str | os.PathLike, max_tokens: int | None) -> int:
    """Return the tokens read of a text: as given, else MAX_TOKENS or the model's positions.

    Raises:
        ValueError: more than the model has positions.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir, **_LOCAL)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_tokens is None:
        return min(MAX_TOKENS, positions or MAX_TOKENS)
    if positions and max_tokens > positions:
        raise ValueError(
            f"--max-tokens: expected at most {positions}, the positions of {model_dir}, "
            f"got {max_tokens}"
        )
    return max_tokens


class _Batches:
    """Texts as tokens, and the model that reads them."""

    def __init__(self, texts, model_dir, max_tokens: int, batch_size: int, device: str):
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir, **_LOCAL)
        encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
        instead = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        instead = next((token for token in instead if token is not None), None)
        for index, ids in enumerate(encoded):
            if not ids and instead is None:
                raise ValueError(
                    f"features: text {index}: expected a token, found none, and the tokenizer of "
                    f"{model_dir} has no token of a text's beginning or end"
                )
        self.ids = [ids or [instead] for ids in encoded]
        # Stable, so that the blocks of a cache are those of the run that was cut off.
        self.order = np.argsort([len(ids) for ids in self.ids], kind="stable")
        self.batch_size = batch_size
        self.device = device
        model = AutoModel.from_pretrained(model_dir, dtype=torch.float32, **_LOCAL)
        self.model = model.to(device).eval()

    def compute(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield [at most batch_size, hidden] for these rows, a batch at a time."""
        import torch

        for start in range(0, len(rows), self.batch_size):
            ids = [self.ids[row] for row in rows[start : start + self.batch_size]]
            lengths = torch.tensor([len(each) for each in ids])
            tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
            for row, each in enumerate(ids):
                tokens[row, : len(each)] = torch.tensor(each)
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            with torch.inference_mode():
                hidden = self.model(
                    input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)
                ).last_hidden_state
            yield hidden[torch.arange(len(ids)), lengths - 1].float().cpu().numpy()


class _Cache:
    """.npy files of one key in a folder; nothing without a folder."""

    def __init__(self, folder: str | os.PathLike | None, key: str):
        self.folder = None if folder is None else Path(folder)
        self.key = key

    def load(self, name: str) -> np.ndarray | None:
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        return load_features(path)

    def save(self, name: str, features: np.ndarray) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, features)
        os.replace(part, path)

    def remove(self, pattern: str) -> None:
        if self.folder is not None:
            for path in self.folder.glob(self._path(pattern).name):
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"features-{self.key}-{name}.npy"


def _key(texts: Sequence[str], model_dir: str | os.PathLike, max_tokens: int) -> str:
    content = json.dumps([hash_model(model_dir), max_tokens, list(texts)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
