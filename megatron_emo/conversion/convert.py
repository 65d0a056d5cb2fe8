"""What the command line does: import, export and verify, with the engine and the checks chosen."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_emo.conversion.compare import compare_weights
from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import ExportOptions, export_hf, open_checkpoint
from megatron_emo.conversion.hf import HFFolder
from megatron_emo.conversion.import_hf import ImportOptions, import_hf
from megatron_emo.conversion.megatron_weights import MegatronWeights

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
VERIFICATIONS = ("logits", "weights", "none")
"""What is checked before an output is published; logits are computed after weights."""

_TEXT_BYTES = 1 << 16


def run_import(args: argparse.Namespace) -> None:
    """`convert_checkpoint.py import`."""
    options = ImportOptions(
        transformer_impl=args.transformer_impl,
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        max_position_embeddings=args.max_position_embeddings,
        **_output_options(args),
    )
    texts = _read_texts(args.text)
    check = _logits_check(args, lambda staged: (staged, Path(args.hf)), texts)
    import_hf(args.hf, args.output, options, check=check)
    print(f"{args.output}: --pretrained-checkpoint {args.output} --use-checkpoint-args")


def run_export(args: argparse.Namespace) -> None:
    """`convert_checkpoint.py export`."""
    options = ExportOptions(**_output_options(args), **_checkpoint_options(args))
    texts = _read_texts(args.text)
    check = _logits_check(args, lambda staged: (Path(args.megatron), staged), texts)
    export_hf(args.megatron, args.output, options, check=check)
    print(f"{args.output}: transformers.AutoModelForCausalLM.from_pretrained({args.output!r})")


def run_verify(args: argparse.Namespace) -> None:
    """`convert_checkpoint.py verify`.

    Raises:
        ConversionError: weights or logits that differ.
    """
    folder = HFFolder(args.hf)
    options = ExportOptions(**{**_checkpoint_options(args), "reference": args.hf})
    checkpoint = open_checkpoint(args.megatron, options)
    weights = MegatronWeights(checkpoint.folder, checkpoint.items, checkpoint.settings)
    result = compare_weights(weights, folder, checkpoint.items)
    print(result, flush=True)
    if result.differing:
        raise ConversionError(f"{args.megatron} and {args.hf}: {result}")
    if args.verify == "logits" and weights.is_quantised_run:
        print("logits not compared: the run's own come from quantised weights")
    elif args.verify == "logits":
        verify_logits(Path(args.megatron), folder.path, _read_texts(args.text), args.iteration)


def verify_logits(
    megatron_dir: Path, hf_dir: Path, texts: Sequence[str] | None, iteration: int | None = None
) -> str:
    """Print and return how far the logits of two models are apart.

    Raises:
        ConversionError: further than rounding explains.
    """
    # Only now: it builds Megatron's model, and that takes seconds to import.
    from megatron_emo.conversion.verify import verify

    result = verify(megatron_dir, hf_dir, texts, iteration=iteration)
    if not result.is_equal:
        raise ConversionError(f"{megatron_dir} and {hf_dir}: {result}")
    return str(result)


def _logits_check(
    args: argparse.Namespace,
    pair: Callable[[Path], tuple[Path, Path]],
    texts: Sequence[str] | None,
) -> Callable[[Path], str] | None:
    if args.verify != "logits":
        return None
    return lambda staged: verify_logits(*pair(staged), texts, getattr(args, "iteration", None))


def _output_options(args: argparse.Namespace) -> dict:
    return {
        "dtype": DTYPES[args.dtype],
        "max_shard_size": args.max_shard_size,
        "resume": args.resume,
        "overwrite": args.overwrite,
        "engine": args.engine,
        "verify": args.verify != "none",
    }


def _checkpoint_options(args: argparse.Namespace) -> dict:
    return {
        "iteration": args.iteration,
        "reference": args.hf_config,
        "model_type": args.model_type,
        "vocab_size": args.vocab_size,
        "tokenizer": args.tokenizer_model,
    }


def _read_texts(path: str | None) -> list[str] | None:
    """The paragraphs of a text file, as much as a verification reads."""
    if path is None:
        return None
    with open(path, encoding="utf-8", errors="replace") as stream:
        paragraphs = [part.strip() for part in stream.read(_TEXT_BYTES).split("\n\n")]
    texts = [part for part in paragraphs if part]
    if not texts:
        raise ValueError(f"--text {path}: expected text, found none")
    return texts
