"""Self-BLEU: how well each text is matched by n-grams of the other ones."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_emo.evaluation.ngrams import Words, iterate_ngrams

SAMPLE = 1000
"""Texts that are scored, by default."""
REFERENCES = 5000
"""Other texts that each is compared with, by default."""

_SMOOTHING = 0.1
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class SelfBleu:
    """Scores of a sample of texts."""

    scores: np.ndarray
    """[sample, orders] float64, between 0 and 1."""
    orders: tuple[int, ...]
    num_references: int
    """Texts that each of the sample was compared with."""


def self_bleu(
    texts: Sequence[Words],
    orders: Sequence[int] = (2, 3, 4),
    sample: int = SAMPLE,
    references: int = REFERENCES,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> SelfBleu:
    """Return BLEU-n of sampled texts against other ones, for each n of `orders`.

    BLEU-n weighs orders 1 to n alike and puts 0.1 for a count of 0 (Chen and Cherry's method 1).
    References are one random set, less the scored text itself, the same number for all. A table
    of the two largest counts of each n-gram serves them all, so the time grows with the length of
    the texts and not with their pairs.

    Raises:
        ValueError: fewer than 2 texts, or a number below 1.

    References:
        Zhu et al. (2018); sampling as in mauve-experiments, where all others are references.
    """
    if len(texts) < 2:
        raise ValueError(f"self-bleu: expected at least 2 texts, found {len(texts)}")
    if sample < 1 or references < 1:
        raise ValueError(
            f"self-bleu: sample and references: expected at least 1, got {sample} and {references}"
        )
    rng = np.random.default_rng(seed)
    num_references = min(references, len(texts) - 1)
    pool = rng.permutation(len(texts))[: num_references + 1].tolist()
    scored = rng.permutation(len(texts))[:sample].tolist()
    within = set(pool)
    left_out = [index if index in within else pool[-1] for index in scored]

    vocabulary: dict = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words] for words in texts]
    matched = np.zeros((len(scored), max(orders)))
    total = np.zeros_like(matched)
    for order in range(1, max(orders) + 1):
        matched[:, order - 1], total[:, order - 1] = _match(
            ids, order, pool, scored, left_out, say or (lambda line: None)
        )
    penalties = _brevity_penalties([len(words) for words in texts], pool, scored, left_out)
    scores = [
        [penalty * _bleu(found, every, order) for order in orders]
        for penalty, found, every in zip(penalties, matched, total, strict=True)
    ]
    return SelfBleu(np.array(scores), tuple(orders), num_references)


def _match(ids, order, pool, scored, left_out, say) -> tuple[list[int], list[int]]:
    """Return, for each scored text, its n-grams found in the references, clipped, and all."""
    own = [Counter(iterate_ngrams(ids[index], order)) for index in scored]
    # [largest count, whose, largest of the others]
    table = {ngram: [0, -1, 0] for counts in own for ngram in counts}
    started = last = time.monotonic()
    for done, index in enumerate(pool):
        for ngram, count in Counter(iterate_ngrams(ids[index], order)).items():
            entry = table.get(ngram)
            if entry is None:
                continue
            if count > entry[0]:
                entry[:] = count, index, entry[0]
            elif count > entry[2]:
                entry[2] = count
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            share = (done + 1) / len(pool)
            say(f"self-bleu: {order}-grams: {share:.0%} of references, {last - started:.0f} s")
    matched = []
    for counts, absent in zip(own, left_out, strict=True):
        found = 0
        for ngram, count in counts.items():
            first, owner, second = table[ngram]
            found += min(count, second if owner == absent else first)
        matched.append(found)
    return matched, [sum(counts.values()) for counts in own]


def _bleu(matched: np.ndarray, total: np.ndarray, order: int) -> float:
    """Return the geometric mean of precisions of orders 1 to `order`; 0 if no word is matched."""
    if matched[0] == 0:
        return 0.0
    logs = [
        math.log((found or _SMOOTHING) / max(1.0, every))
        for found, every in zip(matched[:order], total[:order], strict=True)
    ]
    return math.exp(math.fsum(logs) / order)


def _brevity_penalties(lengths, pool, scored, left_out) -> np.ndarray:
    """Return exp(1 - r/c) for texts of c words shorter than r, the reference nearest in length."""
    penalties = np.ones(len(scored))
    occurrences = Counter(lengths[index] for index in pool)
    for row, (index, absent) in enumerate(zip(scored, left_out, strict=True)):
        own = lengths[index]
        others = occurrences - Counter([lengths[absent]])
        nearest = min(others, key=lambda length: (abs(length - own), length))
        if own <= nearest:
            penalties[row] = math.exp(1 - nearest / own) if own else 0.0
    return penalties
