"""How surprising texts are to a model, per token, word and byte, each token scored once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_emo.evaluation.intervals import bootstrap
from megatron_emo.evaluation.models import (
    BATCH_TOKENS,
    LanguageModel,
    Progress,
    Window,
    logit_blocks,
)
from megatron_emo.evaluation.records import Interval, Json, Record
from megatron_emo.evaluation.rows import RowFile, read_rows

WINDOW = 1024
"""Tokens read at once by default, where the model's context has as many."""
SEPARATOR = "\n\n"
"""Between texts in one stream."""
_GROUP = 128


@dataclass(frozen=True)
class Sums:
    """What was scored, in parts that a bootstrap draws from: documents, or windows of a stream.

    All arrays are [parts].
    """

    nats: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    """Runs of non-blank characters; in a stream the windows' shares of all, by their tokens."""
    bytes: np.ndarray
    """Of the text in UTF-8; in a stream as the words."""
    part: str
    unscored: int = 0
    """First tokens with nothing before them: their words and bytes are counted all the same."""


@dataclass(frozen=True)
class Strides:
    """How long texts are cut."""

    window: int
    stride: int

    @classmethod
    def choose(
        cls, context_length: int | None, window: int | None = None, stride: int | None = None
    ) -> Strides:
        """Return the lengths asked for; by default 1,024 tokens or the context, and half of it.

        Raises:
            ValueError: a window beyond the model's context or below 1, a stride outside
                1 to window.
        """
        context = context_length or (window or WINDOW)
        window = min(context, WINDOW) if window is None else window
        if not 1 <= window <= context:
            raise ValueError(f"--window: expected 1 to {context} (the context), got {window}")
        stride = max(1, window // 2) if stride is None else stride
        if not 1 <= stride <= window:
            raise ValueError(f"--stride: expected 1 to {window} (the window), got {stride}")
        return cls(window, stride)


def cut_windows(
    ids: Sequence[int], prefix_id: int | None, strides: Strides, document: int = 0
) -> Iterator[Window]:
    """Yield windows that score each token of a text once.

    The first scores as many tokens as fit; each further one `stride` new ones, with all of the
    window before them, at least window - stride tokens, as context. Without a prefix the first
    token has no prediction.
    """
    sequence = list(ids) if prefix_id is None else [prefix_id, *ids]
    last = len(sequence) - 1
    done = 0
    while done < last:
        end = min(strides.window if not done else done + strides.stride, last)
        begin = max(0, end - strides.window)
        yield Window(
            sequence[begin:end], sequence[done + 1 : end + 1], first=done - begin, document=document
        )
        done = end


def sum_nats(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    batch_tokens: int = BATCH_TOKENS,
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return -sum log q of each window's targets in nats, [windows] float64."""
    sums = torch.zeros(len(windows), dtype=torch.float64)
    for block in logit_blocks(
        model, windows, batch_tokens=batch_tokens, temperature=temperature, progress=progress
    ):
        target = block.target.to(block.logits.device)
        nats = torch.nn.functional.cross_entropy(block.logits, target, reduction="none")
        sums.index_add_(0, block.window, nats.double().cpu())
    return sums.numpy()


def score_documents(
    model: LanguageModel,
    texts: Sequence[str],
    strides: Strides,
    *,
    counted: Sequence[str] | None = None,
    prefix_id: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    temperature: float = 1.0,
    rows: RowFile | None = None,
    seconds: float = 5.0,
) -> Sums:
    """Return the sums of texts scored one by one.

    Args:
        counted: texts whose words and bytes are counted, where `texts` are a form of them.
        rows: of `open_documents`; gets the sums as they come, and holds those of an earlier run.
        seconds: between lines of progress.
    """
    counted = texts if counted is None else counted
    found = [dict(row) for row in rows.found] if rows else []
    progress = Progress("perplexity", len(texts), "texts", seconds)
    progress.add(len(found))
    for begin in range(len(found), len(texts), _GROUP):
        group = range(begin, min(begin + _GROUP, len(texts)))
        windows = [
            window
            for index in group
            for window in cut_windows(model.encode(texts[index]), prefix_id, strides, index - begin)
        ]
        nats = sum_nats(model, windows, batch_tokens=batch_tokens, temperature=temperature)
        new = [_row(index, texts[index], counted[index]) for index in group]
        for window, value in zip(windows, nats, strict=True):
            new[window.document]["nats"] += float(value)
            new[window.document]["tokens"] += len(window.targets)
        if rows:
            rows.append(new)
        found += new
        progress.add(len(new))
    unscored = 0 if prefix_id is not None else sum(bool(model.encode(text)) for text in texts)
    return _sums_of_rows(found, unscored)


def open_documents(
    path: str | os.PathLike,
    recipe: Mapping[str, Json],
    total: int,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RowFile:
    """Return the file that `score_documents` keeps its sums in."""
    return RowFile(
        *(path, recipe),
        total=total,
        group=_GROUP,
        resume=resume,
        overwrite=overwrite,
        flag="--per-document",
    )


def _row(index: int, text: str, counted: str) -> dict[str, Json]:
    return {
        "id": index,
        "nats": 0.0,
        "tokens": 0,
        "words": len(counted.split()),
        "bytes": len(counted.encode()),
        "sha256": hashlib.sha256(f"{text}\0{counted}".encode()).hexdigest(),
    }


def _sums_of_rows(rows: Sequence[Mapping], unscored: int = 0) -> Sums:
    values = {
        key: np.array([row[key] for row in rows], dtype=np.float64)
        for key in ("nats", "tokens", "words", "bytes")
    }
    return Sums(**values, part="documents", unscored=unscored)


def score_stream(
    model: LanguageModel,
    texts: Sequence[str],
    strides: Strides,
    *,
    counted: Sequence[str] | None = None,
    separator: str = SEPARATOR,
    prefix_id: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    temperature: float = 1.0,
) -> Sums:
    """Return the sums of texts joined into one; the parts are windows."""
    whole = separator.join(texts if counted is None else counted)
    ids = model.encode(separator.join(texts))
    windows = list(cut_windows(ids, prefix_id, strides))
    tokens = np.array([len(window.targets) for window in windows], dtype=np.float64)
    progress = Progress("perplexity", int(tokens.sum()))
    nats = sum_nats(
        model, windows, batch_tokens=batch_tokens, temperature=temperature, progress=progress
    )
    shares = tokens / max(tokens.sum(), 1.0)
    return Sums(
        nats,
        tokens,
        shares * len(whole.split()),
        shares * len(whole.encode()),
        "windows",
        int(prefix_id is None and bool(ids)),
    )


# name: (divide nats by, unit, from nats per that, definition)
METRICS: dict[str, tuple[str, str, Callable[[float], float], str]] = {
    "cross_entropy": ("tokens", "nats/token", float, "-sum log q / tokens, pooled over texts"),
    "token_perplexity": ("tokens", "1", math.exp, "exp(nats/tokens), pooled over texts"),
    "word_perplexity": (
        "words",
        "1",
        math.exp,
        "exp(nats/words) of the undetokenised text; words are runs of non-blanks: as lm-eval's, "
        "which counts a blank at either end as one more",
    ),
    "byte_perplexity": (
        "bytes",
        "1",
        math.exp,
        "exp(nats/bytes) as lm-eval's; UTF-8 bytes of the undetokenised text",
    ),
    "bits_per_byte": (
        "bytes",
        "bits/byte",
        lambda nats: nats / math.log(2),
        "nats/bytes/ln 2 as lm-eval's; UTF-8 bytes of the undetokenised text",
    ),
}


def perplexity_records(
    sums: Sums,
    settings: Mapping[str, Json],
    *,
    metrics: Sequence[str] = tuple(METRICS),
    draws: int = 1000,
    seed: int = 0,
) -> list[Record]:
    """Return a record for each metric; intervals are of resampled parts, none of a single one.

    Raises:
        ValueError: an unknown metric, nothing to divide by, or a perplexity beyond a float.
    """
    settings = {**settings, "resampled": sums.part, sums.part: len(sums.nats)}
    records = []
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"--metrics: expected some of {', '.join(METRICS)}, got {metric!r}")
        per, unit, convert, definition = METRICS[metric]
        weights = getattr(sums, per)
        total = weights.sum()
        if not total:
            raise ValueError(f"{metric}: expected at least 1 of {per}, found 0")
        interval = ratio_interval(sums.nats, weights, draws, seed)
        try:
            value = convert(float(sums.nats.sum() / total))
            interval = interval and Interval(convert(interval.low), convert(interval.high))
        except OverflowError:
            raise ValueError(
                f"{metric}: {sums.nats.sum():.6g} nats over {total:.0f} {per} are beyond a float; "
                "leave it out of --metrics"
            ) from None
        records.append(
            Record(
                *(metric, value, unit, definition, round(total)),
                n_unit=per,
                seed=seed,
                interval=interval,
                settings=settings,
            )
        )
    return records


def ratio_interval(
    values: np.ndarray, weights: np.ndarray, draws: int = 1000, seed: int = 0
) -> Interval | None:
    """Return the bootstrap interval of sum(values) / sum(weights), None of fewer than two rows."""
    if len(values) < 2:
        return None

    def ratio(rows: np.ndarray) -> float:
        total = rows[:, 1].sum()
        return rows[:, 0].sum() / total if total else math.nan

    return bootstrap(np.stack([values, weights], axis=1), ratio, draws, seed=seed)


def compare_documents(
    a: str | os.PathLike, b: str | os.PathLike, *, draws: int = 1000, seed: int = 0
) -> list[Record]:
    """Return A's nats minus B's on the same texts, with intervals of resampled documents.

    Per byte always; per token where both split every text into as many tokens; and the share of
    documents that are more probable under B.

    Args:
        a, b: files that --per-document wrote.

    Raises:
        ValueError: files of other texts, or of none.
    """
    left, right = read_rows(a), read_rows(b)
    keys = [[(row.get("id"), row.get("sha256")) for row in rows] for rows in (left, right)]
    if keys[0] != keys[1]:
        same = sum(x == y for x, y in zip(*keys, strict=False))
        raise ValueError(
            f"--compare: expected the same texts in the same order, got {len(left)} in {a}, "
            f"{len(right)} in {b}, {same} alike"
        )
    ours, theirs = _sums_of_rows(left), _sums_of_rows(right)
    nats = ours.nats - theirs.nats
    units = {"bits_per_byte_difference": (nats / math.log(2), ours.bytes, "bits/byte", "bytes")}
    if np.array_equal(ours.tokens, theirs.tokens):
        units["cross_entropy_difference"] = (nats, ours.tokens, "nats/token", "tokens")
    units["share_better_under_b"] = ((nats > 0) * 1.0, np.ones(len(nats)), "1", "documents")
    settings = {"a": os.path.basename(a), "b": os.path.basename(b), "documents": len(nats)}
    return [
        _difference_record(metric, *parts, settings, draws, seed) for metric, parts in units.items()
    ]


def _difference_record(
    metric: str,
    values: np.ndarray,
    weights: np.ndarray,
    unit: str,
    per: str,
    settings: Mapping[str, Json],
    draws: int,
    seed: int,
) -> Record:
    total = weights.sum()
    if not total:
        raise ValueError(f"{metric}: expected at least 1 of {per}, found 0")
    is_share = metric.startswith("share")
    definition = (
        "share of documents with fewer nats under B than under A"
        if is_share
        else f"(nats under A - nats under B) / {per}, paired by document"
    )
    return Record(
        *(metric, float(values.sum() / total), unit, definition, round(total)),
        n_unit=per,
        seed=seed,
        interval=ratio_interval(values, weights, draws, seed),
        settings=settings,
    )
