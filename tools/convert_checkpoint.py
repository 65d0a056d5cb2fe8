"""Hugging Face folders to and from Megatron checkpoints, on a CPU, a tensor at a time.

python tools/convert_checkpoint.py import --hf smollm2/ --output checkpoints/smollm2
python tools/convert_checkpoint.py export --megatron runs/emo/checkpoints --output smollm2-emo/
python tools/convert_checkpoint.py verify --megatron runs/emo/checkpoints --hf smollm2-emo/
"""

from __future__ import annotations

import argparse

from megatron_emo.conversion.convert import (
    DTYPES,
    VERIFICATIONS,
    run_export,
    run_import,
    run_verify,
)
from megatron_emo.conversion.engine import ENGINES
from megatron_emo.conversion.import_hf import TRANSFORMER_IMPLS, ImportOptions
from megatron_emo.conversion.plan import DEFAULT_SHARD_SIZE


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    importing = tasks.add_parser("import", help="a Hugging Face folder into a Megatron checkpoint")
    importing.add_argument(
        "--hf", "--hf-model", metavar="DIR", required=True, help="with config.json"
    )
    importing.add_argument(
        "--transformer-impl",
        choices=TRANSFORMER_IMPLS,
        default=ImportOptions.transformer_impl,
        help="whose key names a mixture of experts gets; of other models they are the same",
    )
    importing.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        default=ImportOptions.make_vocab_size_divisible_by,
        help="times --tensor-model-parallel-size, pads the vocabulary",
    )
    importing.add_argument("--tensor-model-parallel-size", type=int, metavar="N", default=1)
    importing.add_argument(
        "--max-position-embeddings", type=int, metavar="N", help="a smaller context than its own"
    )
    exporting = tasks.add_parser("export", help="a Megatron checkpoint into a Hugging Face folder")
    verifying = tasks.add_parser("verify", help="compare weights and logits of the two")
    verifying.add_argument(
        "--hf", "--hf-path", metavar="DIR", required=True, help="with config.json"
    )
    for task in (exporting, verifying):
        add_megatron_arguments(task)
    add_output_arguments(importing, "--megatron-path")
    add_output_arguments(exporting, "--hf-path")
    for task in (importing, exporting, verifying):
        task.add_argument(
            "--verify",
            choices=VERIFICATIONS,
            default="logits",
            help="logits: weights, then both models on the same tokens, whole in memory one after "
            "the other",
        )
        task.add_argument("--text", metavar="FILE", help="to compare logits on; default random ids")
    return parser


def add_megatron_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--megatron", "--megatron-path", metavar="DIR", required=True, help="torch_dist checkpoint"
    )
    parser.add_argument("--iteration", type=int, help="of the checkpoint; default the latest")
    parser.add_argument(
        "--hf-config",
        metavar="DIR",
        help="folder whose config.json and tokenizer to follow, as the one imported before",
    )
    parser.add_argument("--model-type", help="of the config class; default what fits")
    parser.add_argument("--vocab-size", type=int, help="rows to keep, without padding")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="folder or .model file to copy")


def add_output_arguments(parser: argparse.ArgumentParser, other_name: str) -> None:
    parser.add_argument("--output", other_name, dest="output", metavar="DIR", required=True)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: as they are stored; float32 exports the optimizer's master weights if saved",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", default=DEFAULT_SHARD_SIZE)
    parser.add_argument("--resume", action="store_true", help="go on where it was cut off")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="plain: a tensor at a time, without Megatron; bridge: megatron-bridge on the whole "
        "model in memory; auto: plain",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_const",
        const="none",
        default=argparse.SUPPRESS,
        help="--verify none",
    )


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run = {"import": run_import, "export": run_export, "verify": run_verify}[args.task]
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"convert_checkpoint: {error}") from error


if __name__ == "__main__":
    main()
