"""Measure diversity, repetition and rank statistics of texts, without any model.

python tools/evaluate.py text --texts samples.jsonl --metrics diversity,rep --json text.json

Words are what white space parts, or the tokens of --tokenizer. Fractions of distinct n-grams fall
with the number and the length of texts: compare sets of equal size, cut to equal length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_emo.evaluation.ngrams import CONVENTIONS, LONGEST_PHRASE, ORDERS
from megatron_emo.evaluation.records import Interval, Record, hash_file, hash_model
from megatron_emo.evaluation.self_bleu import REFERENCES, SAMPLE
from megatron_emo.evaluation.texts import read_texts

if TYPE_CHECKING:
    import numpy as np

BOOTSTRAP_DRAWS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--texts", required=True, metavar="FILE", help=".jsonl, .json, or one text a line")
    add("--field", default="text", help="which value of an object is the text (default: text)")
    add("--limit", type=int, metavar="N", help="take the first N texts (default: all)")
    add(
        "--metrics",
        type=_parse_metrics,
        default=",".join(METRICS),
        metavar="NAME,...",
        help=f"any of {', '.join(METRICS)} (default: all)",
    )
    add(
        "--convention",
        choices=CONVENTIONS,
        default="every-ngram",
        help="of rep-n and diversity: "
        + "; ".join(f"{name}: {c.description}" for name, c in CONVENTIONS.items())
        + " (default: %(default)s)",
    )
    add("--tokenizer", metavar="HF_DIR", help="count this tokenizer's tokens instead of words")
    add(
        "--bootstrap",
        type=int,
        default=BOOTSTRAP_DRAWS,
        metavar="N",
        help="resamples of texts for 95%% intervals, 0 for none (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of resamples and of self-BLEU's (default: 0)")
    add(
        "--self-bleu-sample",
        type=int,
        default=SAMPLE,
        metavar="N",
        help="texts that are scored (default: %(default)s, or all of fewer)",
    )
    add(
        "--self-bleu-references",
        type=int,
        default=REFERENCES,
        metavar="N",
        help="other texts each is compared with (default: %(default)s, or all of fewer)",
    )


def run(args: argparse.Namespace) -> list[Record]:
    """Return the records.

    Raises:
        ValueError: a metric that these texts do not define, or a flag out of its range.
    """
    if args.bootstrap < 0:
        raise ValueError(f"--bootstrap: expected at least 0, got {args.bootstrap}")
    for flag in ("self_bleu_sample", "self_bleu_references"):
        if getattr(args, flag) < 1:
            name = "--" + flag.replace("_", "-")
            raise ValueError(f"{name}: expected at least 1, got {getattr(args, flag)}")
    texts = read_texts(args.texts, args.field, args.limit)
    inputs = _Inputs(texts, _split(texts, args.tokenizer), args)
    settings = {"field": args.field, "limit": args.limit, "tokens": "whitespace words"}
    if args.tokenizer:
        settings["tokens"] = f"tokens of {Path(args.tokenizer).name}"
        settings["tokenizer_sha256"] = hash_model(args.tokenizer)
    data = {Path(args.texts).name: hash_file(args.texts)}
    records = []
    for name in args.metrics:
        started = time.monotonic()
        found = list(METRICS[name](inputs))
        seconds = time.monotonic() - started
        records += [
            replace(
                record,
                seed=args.seed,
                settings={**settings, **record.settings},
                labels=args.labels,
                data=data,
                seconds=seconds,
            )
            for record in found
        ]
    return records


@dataclass(frozen=True)
class _Inputs:
    texts: list[str]
    words: list[list[str]]
    args: argparse.Namespace

    def interval(
        self, values: np.ndarray, statistic: Callable[[np.ndarray], float] | None = None
    ) -> Interval | None:
        """Resample texts; None if that was not asked for, or where one text leaves no choice."""
        import numpy as np

        from megatron_emo.evaluation.intervals import bootstrap

        if not self.args.bootstrap or len(values) < 2:
            return None
        draws, seed = self.args.bootstrap, self.args.seed
        return bootstrap(np.asarray(values), statistic or np.mean, draws, seed=seed)


def _measure_diversity(inputs: _Inputs) -> Iterator[Record]:
    import numpy as np

    from megatron_emo.evaluation.ngrams import diversity, mixce_diversity

    counts, convention = _count(inputs)
    yield Record(
        "diversity",
        diversity(counts, convention),
        "1",
        f"{inputs.args.convention}: product of 1 - rep-n/100, n = 2, 3, 4",
        len(counts),
        interval=inputs.interval(counts, lambda rows: diversity(rows, convention)),
        settings={"convention": inputs.args.convention},
    )
    per_text = np.array([mixce_diversity(words) for words in inputs.words])
    per_text = per_text[~np.isnan(per_text)]
    yield Record(
        "diversity-mixce",
        float(per_text.mean()),
        "1",
        "mixce: distinct/all of orders 1 to 4 in one count, mean of the texts that have a word",
        len(per_text),
        interval=inputs.interval(per_text),
    )


def _measure_rep(inputs: _Inputs) -> Iterator[Record]:
    from megatron_emo.evaluation.ngrams import rep, repetitiveness

    counts, convention = _count(inputs)
    for column, order in enumerate(ORDERS):
        own = counts[:, column : column + 1]
        yield Record(
            f"rep-{order}",
            rep(own, convention)[0],
            "%",
            f"{inputs.args.convention}: 1 - distinct/all {order}-grams of each text, summed over "
            "texts",
            len(counts),
            interval=inputs.interval(own, lambda rows: rep(rows, convention)[0]),
            settings={"convention": inputs.args.convention},
        )
    for order in ORDERS:
        per_text = [repetitiveness(text, order) for text in inputs.texts]
        yield Record(
            f"repetitiveness-{order}",
            sum(per_text) / len(per_text),
            "1",
            f"emo: mean over texts of 1 - distinct/all {order}-grams, 0 for a text without any",
            len(per_text),
            interval=inputs.interval(per_text),
            settings={"tokens": "words parted by single spaces"},
        )


def _measure_loops(inputs: _Inputs) -> Iterator[Record]:
    from megatron_emo.evaluation.intervals import wilson
    from megatron_emo.evaluation.ngrams import is_looping

    looping, total = sum(map(is_looping, inputs.words)), len(inputs.words)
    yield Record(
        "repetition-loops",
        looping / total,
        "1",
        "degen: share of texts that end in a phrase repeated (3 words or more twice, fewer over "
        "50 times)",
        total,
        interval=wilson(looping, total),
        settings={"longest_phrase": LONGEST_PHRASE},
    )


def _measure_distinct(inputs: _Inputs) -> Iterator[Record]:
    from megatron_emo.evaluation.ngrams import distinct

    for order in (1, 2, 3, 4):
        found, total = distinct(inputs.words, order)
        _check_some(f"distinct-{order}", order, total, len(inputs.texts))
        yield Record(
            f"distinct-{order}",
            found / total,
            "1",
            f"distinct/all {order}-grams of all texts together",
            len(inputs.texts),
            settings={"ngrams": total},
        )


def _measure_zipf(inputs: _Inputs) -> Iterator[Record]:
    from megatron_emo.evaluation.zipf import STEPS, TOP, fit_zipf_slope

    slope, types = fit_zipf_slope(inputs.words)
    yield Record(
        "zipf",
        slope,
        "1",
        "mauve-experiments: slope of log frequency on thinned log rank",
        len(inputs.texts),
        settings={"top": TOP, "steps": STEPS, "types": types},
    )


def _measure_self_bleu(inputs: _Inputs) -> Iterator[Record]:
    from megatron_emo.evaluation.self_bleu import self_bleu

    args = inputs.args
    result = self_bleu(
        inputs.words,
        ORDERS,
        args.self_bleu_sample,
        args.self_bleu_references,
        args.seed,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    others = len(inputs.words) - 1
    for column, order in enumerate(ORDERS):
        scores = result.scores[:, column]
        yield Record(
            f"self-bleu-{order}",
            float(scores.mean()),
            "1",
            f"mean BLEU-{order} of sampled texts against other ones, smoothing method 1",
            len(scores),
            interval=inputs.interval(scores),
            settings={
                "references": result.num_references,
                "references_capped": result.num_references < others,
                "interval_over": "scored texts, references held",
            },
        )


METRICS: dict[str, Callable[[_Inputs], Iterator[Record]]] = {
    "diversity": _measure_diversity,
    "rep": _measure_rep,
    "distinct": _measure_distinct,
    "zipf": _measure_zipf,
    "self-bleu": _measure_self_bleu,
    "loops": _measure_loops,
}


def _parse_metrics(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(METRICS)}, got {name!r}")
    return list(dict.fromkeys(chosen))


def _split(texts: list[str], tokenizer_dir: str | None) -> list[list[str]]:
    if tokenizer_dir is None:
        return [text.split() for text in texts]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_dir, local_files_only=True, trust_remote_code=False
    )
    return [tokenizer.tokenize(text) for text in texts]


def _count(inputs: _Inputs):
    """Return the counts of ORDERS and the convention; raise where an order has no n-gram."""
    from megatron_emo.evaluation.ngrams import count_ngrams

    convention = CONVENTIONS[inputs.args.convention]
    counts = count_ngrams(inputs.words, ORDERS, convention.leave_out_last)
    for order, total in zip(ORDERS, counts[..., 1].sum(axis=0), strict=True):
        _check_some(f"rep-{order}", order, int(total), len(inputs.texts))
    return counts, convention


def _check_some(metric: str, order: int, total: int, num_texts: int) -> None:
    if not total:
        raise ValueError(
            f"{metric}: found no {order}-gram in {num_texts} texts, expected at least 1"
        )
