"""A table made for one tokenizer brought to another, over the tokens whose strings they share.

Tokenizers write the same text differently: GPT-2's kind has printable stand-ins for bytes
("\\u0120the"), SentencePiece a mark for a space ("\\u2581the") and "<0x0A>" for a byte, WordPiece
marks what continues a word ("##ing") instead of what starts one. Tokens are compared as the bytes
they stand for. Special tokens are compared with special tokens alone, as they are written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_emo.vocabulary import tokens_by_id

_MARKS = {"byte-level": "\u0120", "sentencepiece": "\u2581", "wordpiece": "##"}
"""What the tokens of each kind begin with by the thousand."""
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
"""Words of one character to WordPiece, without spaces around them."""
_LINES_AT_ONCE = 1024


class TokenKey(NamedTuple):
    """What a token is known by in any tokenizer."""

    is_special: bool
    data: bytes
    """The bytes it stands for; a special token's own string."""


@dataclass(frozen=True)
class Coverage:
    """How much of a tokenizer's vocabulary has a row in a mapped table."""

    num_tokens: int
    num_covered: int
    num_text_tokens: int = 0
    """Tokens of the text that was counted; 0 without one."""
    num_text_covered: int = 0

    @property
    def share(self) -> float:
        """Of the vocabulary's tokens."""
        return self.num_covered / self.num_tokens

    @property
    def text_share(self) -> float | None:
        """Of the text's tokens; None without a text."""
        return self.num_text_covered / self.num_text_tokens if self.num_text_tokens else None


def map_table(
    table: Tensor,
    from_tokenizer: object,
    to_tokenizer: object,
    *,
    num_rows: int,
    text: str | Path | None = None,
) -> tuple[Tensor, Coverage]:
    """Return (a table [num_rows, dim] for `to_tokenizer`, what it covers).

    Rows of tokens that `from_tokenizer` lacks are zero, so that these tokens cost 1 against all.

    Args:
        table: [rows, dim] for `from_tokenizer`, a row for each token at least.
        num_rows: the vocabulary of `to_tokenizer` without padding.
        text: a file whose tokens weigh the coverage, UTF-8.

    Raises:
        ValueError: no vocabulary to read, no row to write, a table with too few rows, no token in
            common.
    """
    if num_rows < 1:
        raise ValueError(f"--vocab-size: expected at least 1 row to write, got {num_rows}")
    pairs = pair_tokens(from_tokenizer, to_tokenizer)
    size = max(tokens_by_id(from_tokenizer)) + 1
    if size > len(table):
        raise ValueError(
            f"--map-from-tokenizer: it has {size} tokens, the table {len(table)} rows; expected "
            "the tokenizer the table was made for"
        )
    pairs = {target: source for target, source in pairs.items() if target < num_rows}
    if not pairs:
        raise ValueError(
            "--map-from-tokenizer: expected tokens in common with --tokenizer-model, found none"
        )
    result = table.new_zeros(num_rows, table.shape[1])
    result[torch.tensor(list(pairs))] = table[torch.tensor(list(pairs.values()))]
    counts = Counter() if text is None else count_tokens(to_tokenizer, text)
    covered = sum(counts[index] for index in pairs)
    num_tokens = sum(index < num_rows for index in tokens_by_id(to_tokenizer))
    return result, Coverage(num_tokens, len(pairs), counts.total(), covered)


def pair_tokens(from_tokenizer: object, to_tokenizer: object) -> dict[int, int]:
    """Return {id in to_tokenizer: id in from_tokenizer} of the tokens that both have."""
    source = {key: index for index, key in token_keys(from_tokenizer).items()}
    return {i: source[key] for i, key in token_keys(to_tokenizer).items() if key in source}


def token_keys(tokenizer: object) -> dict[int, TokenKey]:
    """Return what each token of a vocabulary is known by, one token a key.

    The kind of the vocabulary is the one whose mark most ordinary tokens begin with. Of two tokens
    for the same bytes, SentencePiece's spare piece for a byte gives way.

    Raises:
        ValueError: a tokenizer that shows no vocabulary.
    """
    tokens = tokens_by_id(tokenizer)
    if not tokens:
        raise ValueError(f"tokenizer {type(tokenizer).__name__}: expected one with a vocabulary")
    special, literal = _special_and_literal_ids(tokenizer, tokens)
    ordinary = {i: t for i, t in tokens.items() if i not in special and i not in literal}
    kind = _kind(ordinary.values())
    found: dict[TokenKey, int] = {}
    for index in sorted(tokens, key=lambda i: (_is_byte_piece(tokens[i], kind), i)):
        token = tokens[index]
        if index in ordinary:
            key = TokenKey(False, _bytes_of(token, kind))
        else:
            key = TokenKey(index in special, _utf8(token))
        found.setdefault(key, index)
    return {index: key for key, index in found.items()}


def count_tokens(tokenizer: object, text: str | Path) -> Counter[int]:
    """Return how often each token occurs in a UTF-8 file, encoded line by line."""
    counts: Counter[int] = Counter()
    with open(text, encoding="utf-8") as lines:
        while batch := list(islice(lines, _LINES_AT_ONCE)):
            for ids in _encode(tokenizer, batch):
                counts.update(ids)
    return counts


def _encode(tokenizer: object, lines: list[str]) -> Iterator[list[int]]:
    if hasattr(tokenizer, "get_piece_size"):
        yield from tokenizer.encode(lines)
    else:
        yield from tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]


def _special_and_literal_ids(
    tokenizer: object, tokens: Mapping[int, str | bytes]
) -> tuple[set[int], set[int]]:
    """Return ids of special tokens, and of added ones that are written as the text they match."""
    if hasattr(tokenizer, "get_piece_size"):
        tests = tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused
        return {i for i in tokens if any(test(i) for test in tests)}, set()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    special |= set(getattr(tokenizer, "all_special_ids", ()))
    return special, set(added) - special


def _kind(tokens: Iterable[str | bytes]) -> str:
    counts = Counter(
        name
        for token in tokens
        if isinstance(token, str)
        for name, mark in _MARKS.items()
        if token.startswith(mark)
    )
    return counts.most_common(1)[0][0] if counts else "plain"


def _is_byte_piece(token: str | bytes, kind: str) -> bool:
    return (
        kind == "sentencepiece"
        and isinstance(token, str)
        and _BYTE_PIECE.fullmatch(token) is not None
    )


def _bytes_of(token: str | bytes, kind: str) -> bytes:
    """The text that an ordinary token stands for, in UTF-8, or a part of it."""
    if isinstance(token, bytes):
        return token
    if kind == "byte-level":
        if all(letter in _BYTE_OF for letter in token):
            return bytes(_BYTE_OF[letter] for letter in token)
        return _utf8(token)
    if kind == "sentencepiece":
        if _is_byte_piece(token, kind):
            return bytes([int(token[3:5], 16)])
        return _utf8(token.replace("\u2581", " "))
    if kind == "wordpiece":
        if token.startswith("##") and len(token) > 2:
            return _utf8(token[2:])
        starts_word = token[:1].isalnum() and not _CJK.match(token)
        return _utf8(" " + token if starts_word else token)
    return _utf8(token)


def _utf8(token: str | bytes) -> bytes:
    return token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")


def _byte_stand_ins() -> dict[str, int]:
    """GPT-2's printable characters for bytes: Latin-1's visible ones stand for themselves, the
    others take code points from 256 on, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_stand_ins()
