"""Perplexity of a model on texts, per token, word and byte, and bits per byte.

Long texts are read in windows that overlap: each token is scored once, with at least
window - stride tokens before it. Two models are compared on the same documents by --compare.

python tools/evaluate.py perplexity --model smollm2/ --texts wiki.jsonl --per-document a.jsonl
python tools/evaluate.py perplexity --model smollm2/ --texts wiki.valid.tokens --mode stream
python tools/evaluate.py perplexity --compare a.jsonl b.jsonl
"""

from __future__ import annotations

import argparse
import time

from megatron_emo.evaluation.records import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--texts", metavar="FILE", help=".jsonl, .json, or one text a line")
    parser.add_argument(
        "--field", default="text", help="the text in a JSON object (default: %(default)s)"
    )
    parser.add_argument(
        "--count-field",
        metavar="FIELD",
        help="the text whose words and bytes are counted, where --field is a detokenised form",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N texts")
    parser.add_argument(
        "--mode",
        choices=["documents", "stream"],
        default="documents",
        help="score each text by itself, or all joined into one (default: %(default)s)",
    )
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help=r"between the texts of a stream, \n for a line's end (default: \n\n)",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help="some of cross_entropy, token_perplexity, word_perplexity, byte_perplexity, "
        "bits_per_byte, with commas (default: all)",
    )
    add_window_arguments(parser)
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)"
    )
    parser.add_argument(
        "--per-document", metavar="FILE", help="write each document's sums here, as JSON lines"
    )
    parser.add_argument("--resume", action="store_true", help="go on with --per-document")
    parser.add_argument("--overwrite", action="store_true", help="replace --per-document")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two --per-document files of the same texts: A's nats minus B's, paired",
    )
    add_seed_arguments(parser)
    add_model_arguments(parser)


def add_window_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how texts are cut and what stands before them."""
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="read at once (default: the model's context, at most 1024)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="new ones in each further window (default: half of the window)",
    )
    parser.add_argument(
        "--prefix",
        choices=["auto", "none"],
        default="auto",
        help="before a text: BOS, or EOS where there is none, so that its first token is scored "
        "too; or nothing (default: %(default)s)",
    )


def add_seed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides intervals."""
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="DRAWS",
        help="resamples for 95%% intervals (default: %(default)s)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how models are run."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        default="float32",
        help="of the weights; sums are fp64 (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="TOKENS",
        default=2048,
        help="read in one pass, padding counted: bounds the logits held (default: %(default)s)",
    )


def need(args: argparse.Namespace, *flags: str) -> None:
    """Check that flags are given.

    Raises:
        ValueError: one is not.
    """
    for flag in flags:
        if getattr(args, flag.strip("-").replace("-", "_")) is None:
            raise ValueError(f"{flag}: expected a value, got none")


def run(args: argparse.Namespace) -> list[Record]:
    """Return the records."""
    if args.compare:
        return _compare(args)
    need(args, "--model", "--texts")
    return _score(args)


def _compare(args: argparse.Namespace) -> list[Record]:
    from megatron_emo.evaluation.models import complete_records
    from megatron_emo.evaluation.perplexity import compare_documents

    if args.model or args.texts:
        raise ValueError("--compare: reads its two files alone, got --model or --texts too")
    records = compare_documents(*args.compare, draws=args.bootstrap, seed=args.seed)
    return complete_records(records, None, args.compare, labels=args.labels)


def _score(args: argparse.Namespace) -> list[Record]:
    from megatron_emo.evaluation.models import complete_records, load_model
    from megatron_emo.evaluation.perplexity import METRICS, Strides, perplexity_records
    from megatron_emo.evaluation.texts import read_texts

    begun = time.monotonic()
    metrics = list(METRICS) if args.metrics is None else args.metrics.split(",")
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"--metrics: expected some of {', '.join(METRICS)}, got {unknown[0]!r}")
    texts = read_texts(args.texts, args.field, args.limit)
    counted = read_texts(args.texts, args.count_field, args.limit) if args.count_field else texts
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    strides = Strides.choose(model.context_length, args.window, args.stride)
    prefix_id = model.prefix_id if args.prefix == "auto" else None
    settings = {
        "mode": args.mode,
        "window": strides.window,
        "stride": strides.stride,
        "prefix": None if prefix_id is None else model.tokenizer.convert_ids_to_tokens(prefix_id),
        "temperature": args.temperature,
        "dtype": args.dtype,
        "field": args.field,
        "count_field": args.count_field or args.field,
        "texts": len(texts),
    }
    score = _score_stream if args.mode == "stream" else _score_documents
    sums = score(args, model, texts, counted, strides, prefix_id, settings)
    settings["unscored_first_tokens"] = sums.unscored
    records = perplexity_records(
        sums, settings, metrics=metrics, draws=args.bootstrap, seed=args.seed
    )
    seconds = time.monotonic() - begun
    return complete_records(records, model, [args.texts], labels=args.labels, seconds=seconds)


def _score_stream(args, model, texts, counted, strides, prefix_id, settings):
    from megatron_emo.evaluation.perplexity import SEPARATOR, score_stream

    if args.per_document:
        raise ValueError("--per-document: expected --mode documents, got stream")
    separator = SEPARATOR if args.separator is None else args.separator.replace(r"\n", "\n")
    settings["separator"] = separator
    return score_stream(
        *(model, texts, strides),
        counted=counted,
        separator=separator,
        prefix_id=prefix_id,
        batch_tokens=args.batch_tokens,
        temperature=args.temperature,
    )


def _score_documents(args, model, texts, counted, strides, prefix_id, settings):
    from megatron_emo.evaluation.perplexity import open_documents, score_documents
    from megatron_emo.evaluation.records import hash_file

    if args.separator is not None:
        raise ValueError("--separator: expected --mode stream, got documents")
    if (args.resume or args.overwrite) and not args.per_document:
        raise ValueError("--resume, --overwrite: expected --per-document, got none")
    rows = None
    if args.per_document:
        recipe = {**settings, "model": model.sha256, "texts_sha256": hash_file(args.texts)}
        rows = open_documents(
            args.per_document, recipe, len(texts), resume=args.resume, overwrite=args.overwrite
        )
    sums = score_documents(
        *(model, texts, strides),
        counted=counted,
        prefix_id=prefix_id,
        batch_tokens=args.batch_tokens,
        temperature=args.temperature,
        rows=rows,
    )
    if rows:
        rows.finish()
    return sums
