"""Measure how near two sets of texts lie: MAUVE, from the features of a model.

python tools/evaluate.py mauve --p human.jsonl --q samples.jsonl --featurizer smollm2/

Values depend on the featurizer, the length of the texts and their number: compare only those that
were made alike. Each seed is a clustering of its own; the value is their mean, the interval their
range. Under a few hundred texts a side, chance decides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_emo.evaluation.records import Interval, Json, Record, hash_file, hash_model
from megatron_emo.evaluation.texts import read_texts

if TYPE_CHECKING:
    import numpy as np

    from megatron_emo.evaluation.mauve import MauveResult

FEW_TEXTS = 500
"""Below so many texts a side a caution is printed and kept."""

_DEFINITIONS = {
    "mauve": "area under the divergence frontier, scale 5, 25 mixtures, k-means clusters",
    "mauve-star": "mauve of histograms with 0.5 added to every count (Krichevsky-Trofimov)",
    "frontier-integral": "integral of the divergence frontier, 0 for equal histograms",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    kinds = ".jsonl, .json, one text a line, or features [texts, width] as .npy"
    add("--p", required=True, metavar="FILE", help=f"the texts aimed at: {kinds}")
    add("--q", required=True, metavar="FILE", help="the texts measured, likewise")
    add("--field-p", default="text", help="which value of an object is the text (default: text)")
    add("--field-q", default="text", help="the same for --q (default: text)")
    add("--limit", type=int, metavar="N", help="take the first N of each file (default: all)")
    add(
        "--featurizer",
        metavar="HF_DIR",
        help="folder of a model; not needed where both files are .npy",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="tokens read of each text (default: 256, or the model's positions if fewer)",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="texts (default: 16)")
    add("--device", default="cpu", help="of the featurizer: cpu, cuda (default: cpu)")
    add("--cache", metavar="DIR", help="keep features here, and go on from them")
    add("--seeds", type=int, default=5, metavar="N", help="clusterings (default: 5)")
    add("--seed", type=int, default=0, help="of the first clustering (default: 0)")
    add(
        "--num-clusters",
        type=int,
        metavar="K",
        help="default: a tenth of the smaller set's texts, at least 2",
    )


def run(args: argparse.Namespace) -> list[Record]:
    """Return the records of mauve, mauve-star and frontier-integral.

    Raises:
        ValueError: sets too small, features of different widths, or a flag out of its range.
    """
    from megatron_emo.evaluation.mauve import (
        cluster,
        default_num_clusters,
        mauve_from_clusters,
        reduce_features,
    )

    if args.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {args.seeds}")
    started = time.monotonic()
    paths = [Path(args.p), Path(args.q)]
    has_texts = any(path.suffix != ".npy" for path in paths)
    if has_texts and args.featurizer is None:
        raise ValueError("--featurizer: expected a folder for files of texts, got none")
    # Texts of both are read before either is worked on: a wrong field shows at once.
    inputs = [
        _read(path, field, args)
        for path, field in zip(paths, (args.field_p, args.field_q), strict=True)
    ]
    p, q = (_features(name, each, args) for name, each in zip("pq", inputs, strict=True))
    cautions = _find_cautions(len(p), len(q))
    for caution in cautions:
        _say(f"caution: {caution}")
    features = reduce_features(p, q)
    num_clusters = args.num_clusters
    if num_clusters is None:
        num_clusters = default_num_clusters(len(p), len(q))
    results = []
    for seed in range(args.seed, args.seed + args.seeds):
        labels = cluster(features, num_clusters, seed)
        results.append(mauve_from_clusters(features, labels, num_clusters, seed))
        _say(f"mauve: seed {seed}: {results[-1].mauve:.4f}, {time.monotonic() - started:.0f} s")
    settings: dict[str, Json] = {
        **_describe_featurizer(args, has_texts),
        "num_p": len(p),
        "num_q": len(q),
        "limit": args.limit,
        "num_clusters": num_clusters,
        "num_components": results[0].num_components,
        "seeds": [result.seed for result in results],
        "cautions": cautions,
    }
    return _to_records(args, results, settings, has_texts, time.monotonic() - started)


def _to_records(
    args: argparse.Namespace,
    results: list[MauveResult],
    settings: dict[str, Json],
    has_texts: bool,
    seconds: float,
) -> list[Record]:
    values = {
        "mauve": [result.mauve for result in results],
        "mauve-star": [result.mauve_star for result in results],
        "frontier-integral": [result.frontier_integral for result in results],
    }
    data = _name_files([Path(args.p), Path(args.q)])
    sha256 = hash_model(args.featurizer) if has_texts else None
    return [
        Record(
            metric,
            statistics.fmean(singles),
            "1",
            f"{_DEFINITIONS[metric]}, mean of {len(singles)} clusterings",
            min(settings["num_p"], settings["num_q"]),
            n_unit="texts a side",
            seed=args.seed,
            interval=Interval(min(singles), max(singles), 1.0, "range") if singles[1:] else None,
            settings={**settings, "values": singles},
            labels=args.labels,
            model=Path(args.featurizer).name if has_texts else None,
            model_sha256=sha256,
            data=data,
            seconds=seconds,
        )
        for metric, singles in values.items()
    ]


def _read(path: Path, field: str, args: argparse.Namespace) -> np.ndarray | list[str]:
    from megatron_emo.evaluation.features import load_features

    if path.suffix != ".npy":
        return read_texts(path, field, args.limit)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {args.limit}")
    return load_features(path)[: args.limit]


def _features(name: str, content: np.ndarray | list[str], args: argparse.Namespace) -> np.ndarray:
    from megatron_emo.evaluation.features import compute_features

    if not isinstance(content, list):
        return content
    if len(content) < 2:
        raise ValueError(f"mauve: --{name}: expected at least 2 texts, found {len(content)}")
    return compute_features(
        content,
        args.featurizer,
        args.max_tokens,
        args.batch_size,
        args.device,
        args.cache,
        lambda line: _say(f"{name}: {line}"),
    )


def _describe_featurizer(args: argparse.Namespace, has_texts: bool) -> dict[str, Json]:
    from megatron_emo.evaluation.features import resolve_max_tokens

    if not has_texts:
        return {"features": "given"}
    return {
        "features": "last layer at the last token, float32",
        "max_tokens": resolve_max_tokens(args.featurizer, args.max_tokens),
        "field_p": args.field_p,
        "field_q": args.field_q,
    }


def _find_cautions(num_p: int, num_q: int) -> list[str]:
    cautions = []
    if min(num_p, num_q) < FEW_TEXTS:
        cautions.append(
            f"{num_p} and {num_q} texts: under {FEW_TEXTS} a side the clustering's chance weighs "
            "much; published values have thousands"
        )
    if num_p != num_q:
        cautions.append(f"sets of unequal size, {num_p} and {num_q}: MAUVE is meant for equal ones")
    return cautions


def _name_files(paths: list[Path]) -> dict[str, str]:
    """Return {name: sha256}; the folder's name goes before equal names of different files."""
    same_name = paths[0].name == paths[1].name and paths[0].resolve() != paths[1].resolve()
    names = [str(Path(*path.parts[-2:])) if same_name else path.name for path in paths]
    if same_name and names[0] == names[1]:
        names = ["p " + names[0], "q " + names[1]]
    return {name: hash_file(path) for name, path in zip(names, paths, strict=True)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
