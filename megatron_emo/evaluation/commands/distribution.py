"""Distances of a model's next-token distributions from a reference model's, along texts.

Forward and reverse cross-entropy, total variation, KL both ways and Jensen-Shannon, summed over
the whole vocabulary at each position; entropies and top-1 mass with them. Both models need the
same tokenizer.

python tools/evaluate.py distribution --model emo/ --reference gpt2-xl/ --texts test.jsonl
"""

from __future__ import annotations

import argparse
import time

from megatron_emo.evaluation.commands.perplexity import add_model_arguments, add_seed_arguments
from megatron_emo.evaluation.records import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", required=True, help="Hugging Face folder, q")
    parser.add_argument("--reference", metavar="DIR", required=True, help="the same, p")
    parser.add_argument(
        "--texts", metavar="FILE", required=True, help=".jsonl, .json, or one text a line"
    )
    parser.add_argument(
        "--field", default="text", help="the text in a JSON object (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N texts")
    parser.add_argument(
        "--convention",
        choices=["tokens", "emo"],
        default="tokens",
        help="mean over all predicted tokens; or as the released distribution_measures, mean over "
        "texts of the means over positions 2 to the last (default: %(default)s)",
    )
    parser.add_argument(
        "--min-words",
        type=int,
        default=20,
        metavar="WORDS",
        help="shorter texts are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=500,
        metavar="TOKENS",
        help="longer texts are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="divides the model's logits, not the reference's (default: %(default)s)",
    )
    add_seed_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> list[Record]:
    """Return the records."""
    from megatron_emo.evaluation.distribution import (
        distribution_records,
        measure_distributions,
        select_texts,
    )
    from megatron_emo.evaluation.models import check_same_tokenizer, complete_records, load_model
    from megatron_emo.evaluation.texts import read_texts

    begun = time.monotonic()
    texts = read_texts(args.texts, args.field, args.limit)
    how = {"dtype": args.dtype, "device": args.device}
    model = load_model(args.model, **how)
    reference = load_model(args.reference, flag="--reference", **how)
    check_same_tokenizer(model, reference, "--reference")
    selected = select_texts(
        *(model, reference, texts),
        convention=args.convention,
        min_words=args.min_words,
        max_tokens=args.max_tokens,
    )
    measured = measure_distributions(
        *(model, reference, selected.windows),
        temperature=args.temperature,
        convention=args.convention,
        batch_tokens=args.batch_tokens,
    )
    settings = {
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "min_words": args.min_words,
        "max_tokens": args.max_tokens,
        "left_out_short": selected.num_short,
        "left_out_long": selected.num_long,
        "vocabulary": min(model.vocab_size, reference.vocab_size),
        "temperature": args.temperature,
        "dtype": args.dtype,
        "field": args.field,
        "resampled": "texts",
    }
    records = distribution_records(
        measured, settings, convention=args.convention, draws=args.bootstrap, seed=args.seed
    )
    seconds = time.monotonic() - begun
    return complete_records(records, model, [args.texts], labels=args.labels, seconds=seconds)
