"""Make, check or describe a cost embedding file for --emo-cost-embedding.

python tools/prepare_cost_embedding.py --from-hf gpt2-large/ --output cost_embedding.safetensors

The rows come from the output head of a Hugging Face model (in one file or in shards, tied to the
embedding or not), from that of a Megatron checkpoint, or from a matrix in a safetensors or .npy
file. The file's header keeps the source, its revision, whether its head is tied, the tokenizer's
fingerprint, the size of the vocabulary, the dtype, and the sha256 of the rows.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_emo.cost_embedding import CostEmbeddingInfo, verify_cost_embedding
from megatron_emo.cost_embedding.map_tokenizer import Coverage
from megatron_emo.cost_embedding.prepare import prepare_cost_embedding

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--from-hf", metavar="DIR", help="head of a local model folder or snapshot")
    task.add_argument("--from-checkpoint", metavar="DIR", help="head of a torch_dist checkpoint")
    task.add_argument("--from-safetensors", metavar="FILE[:TENSOR]", help="a matrix in a file")
    task.add_argument("--from-npy", metavar="FILE", help="a matrix in NumPy's format")
    task.add_argument("--verify", metavar="FILE", help="compare the rows with the stored sha256")
    task.add_argument("--info", metavar="FILE", help="print the header")
    parser.add_argument("--output", metavar="FILE", help="where to write the table")
    parser.add_argument("--iteration", type=int, help="of the checkpoint; default the latest")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="to store rows in")
    parser.add_argument("--no-normalize", action="store_true", help="store the rows as they are")
    parser.add_argument("--tokenizer-type", help="HuggingFaceTokenizer or SentencePieceTokenizer")
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="folder or .model file, for the fingerprint and the vocabulary size; by default the "
        "tokenizer in the folder of --from-hf, if it has one",
    )
    parser.add_argument("--vocab-size", type=int, help="rows to keep, without vocabulary padding")
    parser.add_argument(
        "--cost-dim", metavar="K", type=int, help="keep K principal components of the unit rows"
    )
    parser.add_argument(
        "--map-from-tokenizer",
        metavar="PATH",
        help="tokenizer of the source's rows, where it is not --tokenizer-model: rows go by the "
        "tokens' strings, tokens without a counterpart cost 1",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="plain text to weigh by what --map-from-tokenizer covers"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.verify:
            print_info(args.verify, verify_cost_embedding(args.verify))
            print("the rows have the stored sha256")
        elif args.info:
            print_info(args.info, CostEmbeddingInfo.from_file(args.info))
        elif args.output is None:
            raise ValueError("--output: expected a path for the table, got none")
        else:
            make(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_cost_embedding: {error}") from error


def make(args: argparse.Namespace) -> None:
    info, summary, coverage = prepare_cost_embedding(
        args.output,
        from_hf=args.from_hf,
        from_checkpoint=args.from_checkpoint,
        from_safetensors=args.from_safetensors,
        from_npy=args.from_npy,
        iteration=args.iteration,
        dtype=_DTYPES[args.dtype],
        normalize=not args.no_normalize,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        cost_dim=args.cost_dim,
        map_from_tokenizer=args.map_from_tokenizer,
        text=args.text,
        overwrite=args.overwrite,
    )
    print_info(args.output, info)
    if coverage is not None:
        print_coverage(coverage)
    print(f"{'mean cosine':>22}  {summary.mean_cosine:.4f} over {summary.num_pairs} random pairs")
    for word, nearest in summary.neighbours.items():
        print(f"{word:>22}  " + "  ".join(f"{token} {cosine:.2f}" for token, cosine in nearest))


def print_coverage(coverage: Coverage) -> None:
    print(
        f"{'tokens covered':>22}  {coverage.num_covered:,} of {coverage.num_tokens:,} "
        f"({coverage.share:.1%})"
    )
    if coverage.text_share is not None:
        print(
            f"{'of the text':>22}  {coverage.num_text_covered:,} of "
            f"{coverage.num_text_tokens:,} ({coverage.text_share:.1%})"
        )


def print_info(path: str, info: CostEmbeddingInfo) -> None:
    print(f"{path}: {Path(path).stat().st_size:,} bytes")
    for name, value in asdict(info).items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        shown = "unknown" if value in ("", None) else shown
        print(f"{name.replace('_', ' '):>22}  {shown}")


if __name__ == "__main__":
    main()
