"""Train a SentencePiece model on JSON lines or text, for --tokenizer-type SentencePieceTokenizer.

    python tools/train_tokenizer.py --input runs/demo/corpus.jsonl --vocab-size 2048 \\
        --output runs/demo/tokenizer.model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_emo.data.documents import add_input_arguments, take_input_format
from megatron_emo.data.tokenizer import MODEL_TYPES, TokenizerTraining, train_sentencepiece


def build_parser() -> argparse.ArgumentParser:
    default = TokenizerTraining
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_input_arguments(parser)
    add("--output", required=True, type=Path, metavar="FILE", help="the .model file to write")
    add(
        "--vocab-size",
        required=True,
        type=int,
        metavar="N",
        help="pieces in the model, special ones and the 256 bytes included",
    )
    add(
        "--model-type", choices=MODEL_TYPES, default=default.model_type, help="default: %(default)s"
    )
    add(
        "--character-coverage",
        type=float,
        default=default.character_coverage,
        metavar="SHARE",
        help="share of the corpus's characters that get their own piece (default: %(default)s)",
    )
    add(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=default.byte_fallback,
        help="spell rarer characters in bytes instead of <unk> (default: %(default)s)",
    )
    add(
        "--max-lines",
        type=int,
        default=default.max_lines,
        metavar="N",
        help="train on a random sample of N lines of a larger corpus (default: %(default)s)",
    )
    add(
        "--num-threads",
        type=int,
        default=default.num_threads,
        metavar="N",
        help="CPU threads; the model depends on it (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace --output if it exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = vars(build_parser().parse_args(argv))
    try:
        input_format = take_input_format(args)
        trained = train_sentencepiece(TokenizerTraining(input_format=input_format, **args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_tokenizer: {error}") from error
    print(f"{trained.path}: {trained.vocab_size} pieces from {trained.num_lines} lines of text")


if __name__ == "__main__":
    main()
