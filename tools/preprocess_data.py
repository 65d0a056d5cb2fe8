"""Tokenize JSON lines or text into .bin/.idx files for --data-path; flags as in Megatron.

    python tools/preprocess_data.py --input runs/demo/corpus.jsonl --output-prefix runs/demo/data \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/demo/tokenizer.model \\
        --append-eod
"""

from __future__ import annotations

import argparse
import logging

from megatron_emo.data.documents import add_input_arguments, take_input_format
from megatron_emo.data.megatron_tokenizer import add_tokenizer_arguments, take_tokenizer_options
from megatron_emo.data.preprocess import ON_ERROR, PreprocessConfig, preprocess


def build_parser() -> argparse.ArgumentParser:
    default = PreprocessConfig
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser)
    add_tokenizer_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin and .idx for every key of --json-keys",
    )
    add("--append-eod", action="store_true", help="end every document with the eod token")
    add(
        "--workers",
        type=int,
        default=default.workers,
        metavar="N",
        help="tokenizing processes (default: %(default)s, this process alone)",
    )
    add(
        "--log-interval",
        type=int,
        default=default.log_interval,
        metavar="N",
        help="documents between progress lines (default: %(default)s)",
    )
    add(
        "--on-error",
        choices=ON_ERROR,
        default=default.on_error,
        help="at an unusable document: stop without output, or count and go on "
        "(default: %(default)s)",
    )
    add("--max-documents", type=int, metavar="N", help="read at most N documents (default: all)")
    add("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = vars(build_parser().parse_args(argv))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_emo").setLevel(logging.INFO)
    try:
        tokenizer, input_format = take_tokenizer_options(args), take_input_format(args)
        config = PreprocessConfig(tokenizer=tokenizer, input_format=input_format, **args)
        summary = preprocess(config)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"preprocess_data: {error}") from error
    for prefix, num_tokens in zip(summary.prefixes, summary.num_tokens, strict=True):
        print(f"{prefix}.bin: {summary.num_documents} documents, {num_tokens} tokens")
    print(
        f"read {summary.num_bytes / 1e6:.2f} MB in {summary.seconds:.1f} s; left out: "
        f"{summary.num_empty} empty documents, {summary.num_skipped} unusable ones, "
        f"{summary.num_empty_files} empty files"
    )


if __name__ == "__main__":
    main()
