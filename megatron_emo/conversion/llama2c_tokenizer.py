"""llama2.c's tokenizer file as transformers' tokenizer, which cuts text as llama2.c's `run` does.

Little-endian: an int32, the bytes of the longest piece, then for each id an fp32 score, an int32
and as many bytes of UTF-8.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_emo.conversion.errors import ConversionError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
"""Ids 0 to 2; the tokenizer file has the last two with line breaks around, for printing."""
BOS_ID, EOS_ID = 1, 2
FIRST_BYTE_ID = 3
FIRST_PIECE_ID = FIRST_BYTE_ID + 256
SPACE = "\u2581"
"""SentencePiece's mark, in the place of the file's spaces."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file: pieces and their scores by id."""

    pieces: list[str]
    scores: list[float]
    """The higher the earlier a piece is made."""

    def merges(self) -> list[tuple[str, str]]:
        """Return the pairs that make a piece, in the order in which llama2.c prefers them.

        Raises:
            ConversionError: two pieces with one score, between which their places in a text decide.
        """
        known = set(self.pieces[FIRST_PIECE_ID:])
        pairs, last = [], None
        ids = range(FIRST_PIECE_ID, len(self.pieces))
        for index in sorted(ids, key=lambda index: -self.scores[index]):
            piece = self.pieces[index]
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            halves = [(left, right) for left, right in halves if {left, right} <= known]
            if halves and last is not None and self.scores[last] == self.scores[index]:
                raise ConversionError(
                    f"--tokenizer: found ids {last} and {index} with the score "
                    f"{self.scores[index]:g}, expected another for each"
                )
            last = index if halves else last
            pairs += halves
        return pairs

    def tokenizer(self, max_length: int) -> Any:
        """Return transformers' tokenizer, which begins a text with <s>, as `run` does.

        Text is never read as special tokens. A text's own U+2581 is read as a space, as by
        SentencePiece, where llama2.c spells it in bytes.

        Args:
            max_length: of a text in tokens, for information.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, processors
        from transformers import PreTrainedTokenizerFast

        unk, bos, eos = SPECIAL_TOKENS
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        backend = Tokenizer(
            models.BPE(ids, self.merges(), unk_token=unk, fuse_unk=True, byte_fallback=True)
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, BOS_ID)]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token=unk,
            bos_token=bos,
            eos_token=eos,
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            model_max_length=max_length,
        )


def read_vocabulary(path: str | Path, vocab_size: int) -> Vocabulary:
    """Read a tokenizer file.

    Args:
        vocab_size: of the model; the file itself does not say how many pieces it holds.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: truncated, not such a file, or other pieces than the model has.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--tokenizer {path}: no such file")
    data = path.read_bytes()
    longest = struct.unpack_from("<i", data)[0] if len(data) >= 4 else 0
    pieces, scores, place = [], [], 4
    while place < len(data):
        piece, score, place = _read_piece(path, data, place, longest, len(pieces))
        pieces.append(piece)
        scores.append(score)
    if len(pieces) != vocab_size:
        raise ConversionError(
            f"--tokenizer {path}: found {len(pieces)} pieces, expected {vocab_size}, the "
            "vocab_size of --checkpoint"
        )
    _check_pieces(path, pieces)
    marked = [piece.replace(" ", SPACE) for piece in pieces[FIRST_PIECE_ID:]]
    return Vocabulary([*SPECIAL_TOKENS, *pieces[3:FIRST_PIECE_ID], *marked], scores)


def _read_piece(
    path: Path, data: bytes, place: int, longest: int, index: int
) -> tuple[str, float, int]:
    """Return (piece, score, where the next one begins)."""
    what = f"--tokenizer {path}: piece {index} at byte {place}"
    if len(data) < place + 8:
        raise ConversionError(f"{what}: the file ends in it after {len(data)} bytes")
    score, length = struct.unpack_from("<fi", data, place)
    start, end = place + 8, place + 8 + length
    if not 0 <= length <= longest or not math.isfinite(score):
        raise ConversionError(
            f"{what}: found the score {score:g} and {length} bytes, expected a finite score and 0 "
            f"to {longest} bytes: not a tokenizer of llama2.c, or damaged"
        )
    if end > len(data):
        raise ConversionError(f"{what}: the file ends in it after {len(data)} bytes")
    try:
        return data[start:end].decode(), score, end
    except UnicodeDecodeError as error:
        raise ConversionError(f"{what}: expected UTF-8, found {data[start:end]!r}") from error


def _check_pieces(path: Path, pieces: list[str]) -> None:
    """Raise unless bytes have their places, every piece is there once and none is empty."""
    for byte in range(256):
        found = pieces[FIRST_BYTE_ID + byte : FIRST_BYTE_ID + byte + 1]
        if found != [f"<0x{byte:02X}>"]:
            raise ConversionError(
                f"--tokenizer {path}: found {found} as id {FIRST_BYTE_ID + byte}, expected "
                f"'<0x{byte:02X}>'"
            )
    places: dict[str, int] = {"": -1}
    for index, piece in enumerate(pieces):
        other = places.setdefault(piece, index)
        if other != index:
            raise ConversionError(
                f"--tokenizer {path}: found {piece!r} as id {index}"
                + (f" and {other}, expected it once" if other >= 0 else ", expected no empty piece")
            )
