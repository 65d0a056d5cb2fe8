"""Megatron's own tokenizers under Megatron's flags, so that ids are those of training."""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_emo.data.upstream import import_build_tokenizer

# The SentencePiece names are one class in megatron-core; command lines in use have all three.
TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
)
_GPT2_HINT = (
    "megatron-core 0.19 asks the Hugging Face hub, its cache or a folder ./gpt2 for 'gpt2' even "
    "with both files given; without network, use --tokenizer-type HuggingFaceTokenizer with a "
    "folder that holds tokenizer.json and tokenizer_config.json (same ids)"
)


@dataclass(frozen=True)
class TokenizerOptions:
    """What megatron.core's `build_tokenizer` reads, under its names and with its defaults."""

    tokenizer_type: str
    """One of TOKENIZER_TYPES."""
    tokenizer_model: str | None = None
    """SentencePiece .model, Hugging Face folder or hub name, or TikToken's JSON vocabulary."""
    vocab_file: str | None = None
    """vocab.json of GPT2BPETokenizer (or of HuggingFaceTokenizer)."""
    merge_file: str | None = None
    """merges.txt of GPT2BPETokenizer (or of HuggingFaceTokenizer)."""
    vocab_size: int | None = None
    """Token count: TikTokenizer cuts its vocabulary to it; for all types, ids must be below it."""
    metadata_path: str | None = None
    """Megatron's tokenizer metadata (JSON); flag --tokenizer-metadata."""
    special_tokens: list[str] | None = None
    """Tokens to add; flag --tokenizer-special-tokens."""
    tiktoken_pattern: str | None = None
    """v1 or v2; None is Megatron's default, v2."""
    tiktoken_num_special_tokens: int = 1000
    """Ids that TikTokenizer keeps in front of its vocabulary."""
    tokenizer_sentencepiece_legacy: bool = False
    """Let --tokenizer-special-tokens add to a SentencePiece model."""
    tokenizer_sentencepiece_ignore_extra_whitespaces: bool = True
    """Do not restore the spaces that a SentencePiece model drops."""
    tokenizer_hf_no_use_fast: bool = False
    """Use the slow Hugging Face tokenizer."""
    tokenizer_hf_no_include_special_tokens: bool = False
    """Leave out the tokens that a Hugging Face tokenizer puts around a text."""
    trust_remote_code: bool = False
    """Run code that a Hugging Face folder brings along."""


_NAMED_OTHERWISE = {
    "metadata_path": "--tokenizer-metadata",
    "special_tokens": "--tokenizer-special-tokens",
    "tokenizer_sentencepiece_ignore_extra_whitespaces": (
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces"
    ),
}


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's tokenizer flags, those that matter for turning text into ids."""
    group = parser.add_argument_group("tokenizer (flags and defaults as in Megatron)")
    flags: dict[str, dict[str, Any]] = {
        "tokenizer_type": {"required": True, "choices": TOKENIZER_TYPES},
        "tokenizer_model": {"help": "SentencePiece .model; Hugging Face folder; TikToken JSON"},
        "vocab_file": {"help": "vocab.json (GPT2BPETokenizer)"},
        "merge_file": {"help": "merges.txt (GPT2BPETokenizer)"},
        "vocab_size": {"type": int, "help": "vocabulary size in tokens; ids must be below it"},
        "metadata_path": {"help": "Megatron's tokenizer metadata (JSON)"},
        "special_tokens": {"nargs": "+", "help": "tokens to add"},
        "tiktoken_pattern": {"choices": ("v1", "v2"), "help": "default: v2"},
        "tiktoken_num_special_tokens": {
            "type": int,
            "help": "ids in front of the vocabulary (default: %(default)s)",
        },
        "tokenizer_sentencepiece_legacy": {"help": "allow --tokenizer-special-tokens"},
        "tokenizer_sentencepiece_ignore_extra_whitespaces": {
            "help": "restore the spaces that the model drops"
        },
        "tokenizer_hf_no_use_fast": {"help": "take the slow tokenizer"},
        "tokenizer_hf_no_include_special_tokens": {"help": "add no tokens around a text"},
        "trust_remote_code": {"help": "run code that the tokenizer's folder brings along"},
    }
    for field in fields(TokenizerOptions):
        settings = flags[field.name]
        if isinstance(field.default, bool):
            settings["action"] = "store_false" if field.default else "store_true"
        elif not settings.get("required"):
            settings["default"] = field.default
        flag = _NAMED_OTHERWISE.get(field.name, "--" + field.name.replace("_", "-"))
        group.add_argument(flag, dest=field.name, **settings)


def take_tokenizer_options(args: dict) -> TokenizerOptions:
    """Return the TokenizerOptions of parsed flags, and take its fields out of `args`."""
    return TokenizerOptions(
        **{field.name: args.pop(field.name) for field in fields(TokenizerOptions)}
    )


def build_megatron_tokenizer(options: TokenizerOptions) -> Any:
    """Return the tokenizer that Megatron builds in training from the same flags.

    Raises:
        FileNotFoundError: if a file that a flag names does not exist.
        ValueError: if a flag is missing, or Megatron cannot build the tokenizer (with its reason).
    """
    _check_options(options)
    build_tokenizer = import_build_tokenizer()
    # Padding to a multiple of TP is the model's concern: no id in the data depends on it.
    namespace = argparse.Namespace(**asdict(options), chat_template=None, pad_vocab_size=False)
    try:
        with warnings.catch_warnings():
            # Some of them log on rank 0, and warn that nothing told them their rank.
            warnings.filterwarnings("ignore", message="Could not determine rank")
            return build_tokenizer(namespace)
    except Exception as error:  # asserts, NameErrors and library errors alike, by tokenizer
        given = options.tokenizer_model or f"{options.vocab_file}, {options.merge_file}"
        hint = f"; {_GPT2_HINT}" if options.tokenizer_type == "GPT2BPETokenizer" else ""
        raise ValueError(
            f"--tokenizer-type {options.tokenizer_type} ({given}) cannot be built: "
            f"{type(error).__name__}: {error}{hint}"
        ) from error


def end_of_document_id(tokenizer: Any) -> int:
    """Return the id that --append-eod appends; ValueError if the tokenizer has none."""
    eod = getattr(tokenizer, "eod", None)
    if eod is None or eod < 0:
        raise ValueError(
            "--append-eod: this tokenizer has no end-of-document token "
            "(SentencePiece: eos_id; Hugging Face: eos_token in tokenizer_config.json)"
        )
    return eod


def _check_options(options: TokenizerOptions) -> None:
    is_gpt2 = options.tokenizer_type == "GPT2BPETokenizer"
    needed = ("vocab_file", "merge_file") if is_gpt2 else ("tokenizer_model",)
    for name in needed:
        if getattr(options, name) is None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--tokenizer-type {options.tokenizer_type} needs {flag}")
    for name in ("vocab_file", "merge_file", "metadata_path", "tokenizer_model"):
        path = getattr(options, name)
        # A Hugging Face model may be a name on the hub.
        may_be_name = name == "tokenizer_model" and options.tokenizer_type == "HuggingFaceTokenizer"
        if path is not None and not may_be_name and not Path(path).exists():
            flag = _NAMED_OTHERWISE.get(name, "--" + name.replace("_", "-"))
            raise FileNotFoundError(f"{flag} {path}: no such file")
    if options.tokenizer_type == "TikTokenizer" and importlib.util.find_spec("tiktoken") is None:
        raise ValueError("--tokenizer-type TikTokenizer needs the package tiktoken")
