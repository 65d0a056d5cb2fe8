"""Training a SentencePiece model whose special ids Megatron's SentencePieceTokenizer finds."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_emo.data.documents import (
    DocumentReader,
    InputFormat,
    decode_document,
    expand_inputs,
)
from megatron_emo.data.files import atomic_file, refuse_existing

# Megatron takes the end of a document (eod) from eos, and padding from pad.
SPECIAL_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
MODEL_TYPES = ("bpe", "unigram")
# The library drops training lines over 4192 bytes, and a character has four at most.
_MAX_LINE_CHARACTERS = 1000


@dataclass(frozen=True)
class TokenizerTraining:
    """What `train_sentencepiece` is to do; every field is a flag of tools/train_tokenizer.py."""

    input: Sequence[str]
    """JSON lines or text files, or glob patterns; .gz is read as well."""
    output: Path
    """The .model file to write."""
    vocab_size: int
    """Pieces in the model, special ones and 256 bytes (`byte_fallback`) included."""
    model_type: str = "bpe"
    """bpe or unigram."""
    character_coverage: float = 0.9995
    """Share of the corpus's characters that get a piece of their own, in (0, 1]."""
    byte_fallback: bool = True
    """Spell other characters in bytes (256 pieces) instead of mapping them to <unk>."""
    json_keys: Sequence[str] = ("text",)
    input_format: InputFormat = field(default_factory=InputFormat)
    max_lines: int = 1_000_000
    """Train on a random sample of this many lines, if the corpus has more."""
    num_threads: int = 1
    """CPU threads; the model's bytes depend on it, so keep it to reproduce a model."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"--model-type {self.model_type}: expected one of {MODEL_TYPES}")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(
                f"--character-coverage {self.character_coverage}: expected a share in (0, 1]"
            )
        for flag, value in (("max-lines", self.max_lines), ("num-threads", self.num_threads)):
            if value < 1:
                raise ValueError(f"--{flag} {value}: expected at least 1")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What `train_sentencepiece` wrote."""

    path: Path
    vocab_size: int
    num_lines: int
    """Lines of text the corpus had."""


def train_sentencepiece(training: TokenizerTraining) -> TrainedTokenizer:
    """Train a SentencePiece model, write it atomically, and return its counts.

    Text is kept as it is: no Unicode normalisation and no dropped spaces, and with
    `byte_fallback` every text comes back unchanged from its ids. The same corpus and settings
    give the same bytes.

    Raises:
        ValueError: if the vocabulary does not fit the corpus (the message says the bound), if the
            corpus has no text, or for a damaged document (`FILE:LINE: ...`).
        OSError: if an input cannot be read or the model cannot be written.
    """
    refuse_existing([training.output], training.overwrite)
    lines = _CountedLines(training)
    model = _train(training, lines)
    with atomic_file(training.output) as handle:
        handle.write(model)
    return TrainedTokenizer(training.output, training.vocab_size, lines.num_lines)


def _train(training: TokenizerTraining, lines: _CountedLines) -> bytes:
    import sentencepiece

    sentencepiece.set_random_generator_seed(0)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=training.vocab_size,
            model_type=training.model_type,
            character_coverage=training.character_coverage,
            byte_fallback=training.byte_fallback,
            # Without bytes to fall back on, a line break would be unknown.
            user_defined_symbols=[] if training.byte_fallback else ["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=training.max_lines,
            shuffle_input_sentence=True,
            num_threads=training.num_threads,
            minloglevel=2,  # errors only; what stops the training is raised
            **SPECIAL_IDS,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise _explained(error, training, lines.num_lines) from error
    return model.getvalue()


class _CountedLines:
    """The corpus as lines for the trainer, which hides what an iterator raises: kept in `error`."""

    def __init__(self, training: TokenizerTraining) -> None:
        self._keys = training.json_keys
        self._reader = DocumentReader(expand_inputs(training.input), training.input_format)
        self.num_lines = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._reader:
                for text in decode_document(document, self._keys):
                    for line in text.split("\n"):
                        self.num_lines += bool(line)
                        for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                            yield line[start : start + _MAX_LINE_CHARACTERS]
        except (ValueError, OSError) as error:
            self.error = error
            raise


def _explained(error: RuntimeError, training: TokenizerTraining, num_lines: int) -> Exception:
    """Return what the library's message means to the user, or the message if it is a new one."""
    message = str(error)
    if num_lines == 0:
        return ValueError(f"--input {' '.join(training.input)}: no text in it")
    if found := re.search(r"size too high.*<= (\d+)", message):
        return ValueError(
            f"--vocab-size {training.vocab_size} is too large for this corpus: "
            f"at most {found[1]} with --model-type {training.model_type}"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ValueError(
            f"--vocab-size {training.vocab_size} is too small: this corpus needs at least "
            f"{found[1]} with --character-coverage {training.character_coverage}"
            + (" and --byte-fallback" if training.byte_fallback else "")
        )
    return ValueError(f"sentencepiece: {message}")
