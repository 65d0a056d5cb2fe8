"""The temperature at which a model's mean entropy on texts equals another's, or a given one.

A sharper model wins some comparisons by its sharpness alone: compare at matched entropy, the
temperature fitted on validation texts. Each step is a pass over the texts; four to six do.

python tools/evaluate.py temperature --model emo/ --texts valid.jsonl --match-entropy-of mle/
"""

from __future__ import annotations

import argparse
import math
import time

from megatron_emo.evaluation.commands.perplexity import add_model_arguments, add_window_arguments
from megatron_emo.evaluation.records import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", required=True, help="Hugging Face folder")
    parser.add_argument(
        "--texts", metavar="FILE", required=True, help=".jsonl, .json, or one text a line"
    )
    parser.add_argument(
        "--field", default="text", help="the text in a JSON object (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N texts")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--match-entropy-of", metavar="DIR", help="a model with the same tokenizer, at T = 1"
    )
    target.add_argument("--entropy", type=float, metavar="NATS", help="per token")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="NATS",
        help="of the entropy, per token (default: %(default)s)",
    )
    add_window_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> list[Record]:
    """Return the records."""
    from megatron_emo.evaluation.entropy import (
        match_temperature,
        measure_sharpness,
        temperature_records,
    )
    from megatron_emo.evaluation.models import Progress, complete_records, load_model
    from megatron_emo.evaluation.perplexity import Strides, cut_windows
    from megatron_emo.evaluation.texts import read_texts

    begun = time.monotonic()
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance: expected above 0, got {args.tolerance}")
    texts = read_texts(args.texts, args.field, args.limit)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    other = _load_other(args, model, texts)
    contexts = [m.context_length for m in (model, other) if m and m.context_length]
    strides = Strides.choose(min(contexts, default=None), args.window, args.stride)
    prefix_id = model.prefix_id if args.prefix == "auto" else None
    windows = [
        window for text in texts for window in cut_windows(model.encode(text), prefix_id, strides)
    ]
    tokens = sum(len(window.targets) for window in windows)

    def measure(of, temperature: float) -> tuple[float, float]:
        progress = Progress("entropy", tokens)
        found = measure_sharpness(
            *(of, windows),
            temperature=temperature,
            batch_tokens=args.batch_tokens,
            progress=progress,
        )
        return found.mean_entropy, found.mean_slope

    target = measure(other, 1.0)[0] if other else args.entropy
    most = math.log(model.vocab_size)
    if not 0 < target < most:
        raise ValueError(f"--entropy: expected above 0 and below {most:.4g}, got {target:.6g}")
    match = match_temperature(lambda t: measure(model, t), target, args.tolerance)
    settings = {
        "window": strides.window,
        "stride": strides.stride,
        "tolerance": args.tolerance,
        "dtype": args.dtype,
        "field": args.field,
        "texts": len(texts),
        "match_entropy_of": other.name if other else None,
        "match_entropy_of_sha256": other.sha256 if other else None,
    }
    records = temperature_records(match, target, tokens, settings)
    seconds = time.monotonic() - begun
    return complete_records(records, model, [args.texts], labels=args.labels, seconds=seconds)


def _load_other(args, model, texts):
    from megatron_emo.evaluation.models import check_same_ids, check_same_tokenizer, load_model

    if args.match_entropy_of is None:
        return None
    flag = "--match-entropy-of"
    other = load_model(args.match_entropy_of, flag=flag, dtype=args.dtype, device=args.device)
    check_same_tokenizer(model, other, flag)
    for text in texts:
        check_same_ids(model, other, text, flag)
    return other
