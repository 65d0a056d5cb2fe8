"""A corpus cut in two, what is trained on and what is held out, as JSON lines.

python -m megatron_emo.study.scaling.corpora --name wikitext --root ../shared/data \\
    --output runs/scaling/wikitext/data
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_emo.study.language_modeling.corpora import (
    Groups,
    read_files,
    read_tinystories,
    read_wikitext,
)
from megatron_emo.whole_files import write_json_lines

HELD_OUT_BYTES = 120_000
"""Of UTF-8 text: some 60,000 tokens of 2 bytes, a few seconds of scoring a small model."""
DEMO = "demo"
"""The quickstart's corpus, which every Python carries: written by tools/make_demo_corpus.py."""
CORPORA = {
    "tinystories": (read_tinystories, ("text/tinystories_944k.txt",)),
    "wikitext": (
        read_wikitext,
        ("text/wikitext103/wiki.valid.tokens", "text/wikitext103/wiki.test.tokens"),
    ),
}
"""Name: (reader, files below the data folder)."""


def split_groups(
    groups: Groups, seed: int, held_out_bytes: int = HELD_OUT_BYTES
) -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts), whole groups on either side, by seed.

    Each text is there once; one that is in groups of both sides is held out.

    Raises:
        ValueError: nothing to hold out, or no more text than that.
    """
    if held_out_bytes < 1:
        raise ValueError(f"--held-out-bytes: expected at least 1, got {held_out_bytes}")
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen: list[str] = []
    while order and sum(len(text.encode()) for text in chosen) < held_out_bytes:
        chosen += order.pop()
    seen: set[str] = set()
    held_out = _take_new(chosen, seen)
    train = _take_new((text for group in order for text in group), seen)
    if not held_out:
        raise ValueError(
            f"--held-out-bytes {held_out_bytes:,}: expected text to hold out, got blank documents"
        )
    if not train:
        raise ValueError(
            f"--held-out-bytes: expected less than the text there is, got {held_out_bytes:,}"
        )
    return train, held_out


def _take_new(texts: Iterable[str], seen: set[str]) -> list[str]:
    kept = []
    for text in texts:
        key = " ".join(text.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(text)
    return kept


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write a JSON object a line, whole or not at all."""
    write_json_lines(path, ({"text": text} for text in texts))


def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help=f"one of {', '.join(CORPORA)}, or any with --files")
    add("--root", type=Path, metavar="DIR", help="the data folder of a corpus known by name")
    add("--files", type=Path, nargs="+", metavar="FILE", help="own texts, in place of those")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--seed", type=int, default=1, help="of the cut (default: %(default)s)")
    add(
        "--held-out-bytes",
        type=int,
        default=HELD_OUT_BYTES,
        metavar="N",
        help="of text, whole articles or stories until there are so many (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        if args.files:
            groups = read_files(args.files)
        elif args.root and args.name in CORPORA:
            read, files = CORPORA[args.name]
            groups = read_files([args.root / file for file in files], read)
        else:
            raise ValueError(f"--name {args.name}: expected --files, or --root and a known name")
        train, held_out = split_groups(groups, args.seed, args.held_out_bytes)
    except (ValueError, OSError) as error:
        raise SystemExit(f"corpora: {error}") from error
    for name, texts in (("train", train), ("held_out", held_out)):
        write_texts(args.output / f"{name}.jsonl", texts)
        num_bytes = sum(len(text.encode()) for text in texts)
        print(f"{args.name} {name}: {len(texts):,} documents, {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
