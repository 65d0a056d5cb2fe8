"""Text from a Megatron checkpoint, without exporting it, or from a Hugging Face folder.

python tools/generate.py --megatron runs/emo/checkpoints --prompt "Return the" --temperature 0
python tools/generate.py --hf smollm2/ --prompt-file prompts.txt --top-p 0.95 --output texts.jsonl
"""

from __future__ import annotations

import argparse

from megatron_emo.conversion.convert import DTYPES
from megatron_emo.conversion.generate_command import run_generate
from megatron_emo.evaluation.generation import DEFAULT_NEW_TOKENS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_output_arguments(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--megatron", metavar="DIR", help="torch_dist checkpoint")
    source.add_argument("--hf", metavar="DIR", help="with config.json, weights and a tokenizer")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="of the checkpoint; default the latest"
    )
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="folder or .model file; default the one that the checkpoint's arguments name",
    )
    parser.add_argument(
        "--hf-config",
        metavar="DIR",
        help="folder whose config.json and tokenizer to follow, as the one imported before",
    )
    parser.add_argument("--model-type", help="of the config class; default what fits")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of the checkpoint without padding"
    )
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as stored")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable; default the empty one"
    )
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="one a line, blank lines left out, or .jsonl"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"per text; default {DEFAULT_NEW_TOKENS}, or what the model's positions leave",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=1.0,
        help="divides logits; 0 takes the most probable token (default %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        default=0,
        help="draw from the K most probable tokens, 0 from all (default %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="draw from the most probable tokens of this probability (default %(default)s)",
    )
    parser.add_argument(
        "--typical-p",
        type=float,
        metavar="P",
        default=1.0,
        help="draw from the most typical tokens of this probability (default %(default)s)",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        default=1,
        help="texts for each prompt (default %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=8,
        help="texts at once (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=1234, help="of draws (default %(default)s)"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="a row a text: prompt, continuation, text, tokens, whether it ended; FILE.recipe.json "
        "says how they were made; default the texts on the console",
    )
    parser.add_argument("--resume", action="store_true", help="go on with --output")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        run_generate(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"generate: {error}") from error


if __name__ == "__main__":
    main()
