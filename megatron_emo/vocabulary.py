"""What identifies a tokenizer: its tokens and their ids, whichever library holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def fingerprint_vocabulary(tokens: Iterable[str | bytes] | Mapping[Any, int]) -> str:
    """Return the sha256 of a vocabulary in hex, "" for an empty one.

    Takes tokens in the order of their ids, or a mapping from token to id. Hashed is, for each token
    by ascending id: the id and the token's length in bytes, both as 8 bytes little-endian, then the
    token's bytes (strings in UTF-8, lone surrogates kept).
    """
    return _fingerprint(_ids_to_tokens(tokens))


def fingerprint_tokenizer(tokenizer: object) -> str:
    """Return what identifies a tokenizer's vocabulary, "" when it has none to show (None, too).

    Understands Hugging Face and `tokenizers` objects, sentencepiece processors, and the tokenizers
    of megatron.core. The same vocabulary has the same fingerprint through any of them if the token
    strings are the same: so for Megatron's wrappers of Hugging Face (GPT2BPE included) and
    sentencepiece, and for the sentencepiece model inside a Hugging Face folder, unless the folder
    or --special-tokens adds tokens. Megatron's TikTokenizer has bytes where Hugging Face has
    printable stand-ins, so these two differ. Merges, scores and normalisation do not enter.
    """
    return _fingerprint(tokens_by_id(tokenizer))


def tokens_by_id(tokenizer: object) -> dict[int, str | bytes]:
    """Return a tokenizer's vocabulary, empty when it has none to show."""
    if hasattr(tokenizer, "id_to_piece") and hasattr(tokenizer, "get_piece_size"):
        size = tokenizer.get_piece_size()
        return {index: tokenizer.id_to_piece(index) for index in range(size)}
    for attribute in ("get_vocab", "vocab", "inv_vocab"):
        try:
            value = getattr(tokenizer, attribute)
            value = value() if callable(value) else value
        except (AttributeError, NotImplementedError, KeyError):
            # Megatron's null and SFT tokenizers have none; its list breaks on ids without a token.
            continue
        if value:
            return _ids_to_tokens(value)
    return {}


def load_tokenizer(tokenizer_model: str | Path, tokenizer_type: str | None = None) -> object:
    """Return the tokenizer in a Hugging Face folder or in a sentencepiece .model file.

    Args:
        tokenizer_type: Megatron's name; by default a folder is a HuggingFaceTokenizer and a file a
            SentencePieceTokenizer.

    Raises:
        FileNotFoundError: no such path.
        ValueError: a type that has no vocabulary in one place.
    """
    path = Path(tokenizer_model)
    if not path.exists():
        raise FileNotFoundError(f"--tokenizer-model {path}: no such file or folder")
    kind = tokenizer_type or ("HuggingFaceTokenizer" if path.is_dir() else "SentencePieceTokenizer")
    if kind == "HuggingFaceTokenizer":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(path))
    raise ValueError(
        f"--tokenizer-type {kind}: expected HuggingFaceTokenizer (a folder) or "
        "SentencePieceTokenizer (a .model file)"
    )


def _ids_to_tokens(tokens: Any) -> dict[int, str | bytes]:
    """From a list, {token: id} or {id: token}."""
    if not isinstance(tokens, Mapping):
        return dict(enumerate(tokens))
    if all(isinstance(key, int) for key in tokens):
        return dict(tokens)
    # Of two strings with one id the greater stays, whatever the order of the mapping.
    return {index: token for token, index in sorted(tokens.items(), key=_bytes_of_key)}


def _bytes_of_key(item: tuple[str | bytes, int]) -> bytes:
    return _as_bytes(item[0])


def _as_bytes(token: str | bytes) -> bytes:
    return token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")


def _fingerprint(tokens: Mapping[int, str | bytes]) -> str:
    if not tokens:
        return ""
    digest = hashlib.sha256()
    for index in sorted(tokens):
        data = _as_bytes(tokens[index])
        digest.update(index.to_bytes(8, "little") + len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
