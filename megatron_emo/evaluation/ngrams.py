"""Repetition and diversity of texts by counting n-grams, after each of the published definitions.

A text is a sequence of words (or of tokens): what splits it is the caller's choice.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Words = Sequence[Hashable]

ORDERS = (2, 3, 4)
"""Of rep-n, and of the diversity which is their product."""
LONGEST_PHRASE = 90
"""Words of the longest phrase that `is_looping` looks for."""


@dataclass(frozen=True)
class Convention:
    """How rep-n and diversity are counted."""

    leave_out_last: bool
    """Each text's last n-gram is not counted."""
    decimals: int | None
    """To which rep-n, in percent, is rounded before diversity is formed from it."""
    description: str


CONVENTIONS = {
    "every-ngram": Convention(False, None, "every n-gram counted, nothing rounded"),
    "simctg": Convention(
        True, 2, "each text's last n-gram left out, rep-n rounded to 2 decimals of a percent"
    ),
}
"""simctg is what tables with rep-n and diversity were made with since Su et al. (2022)."""


def iterate_ngrams(words: Words, order: int) -> Iterator[tuple]:
    """Yield the n-grams of a text in their order; none of a text of fewer than `order` words."""
    return zip(*(words[start:] for start in range(order)), strict=False)


def count_ngrams(
    texts: Sequence[Words], orders: Sequence[int] = ORDERS, leave_out_last: bool = False
) -> np.ndarray:
    """Return [texts, orders, 2] float64: distinct n-grams of each text, and all of them."""
    counts = np.zeros((len(texts), len(orders), 2))
    for row, words in enumerate(texts):
        for column, order in enumerate(orders):
            ngrams = list(iterate_ngrams(words, order))
            if leave_out_last:
                ngrams = ngrams[:-1]
            counts[row, column] = len(set(ngrams)), len(ngrams)
    return counts


def rep(counts: np.ndarray, convention: Convention) -> list[float]:
    """Return rep-n in percent for each order: 100 (1 - distinct / all), both summed over texts.

    An n-gram that two texts share is no repetition. NaN for an order of which no text has one.

    Args:
        counts: [texts, orders, 2] of `count_ngrams`.
    """
    results = []
    for distinct, total in counts.sum(axis=0).tolist():
        percent = (1 - distinct / total) * 100 if total else math.nan
        is_rounded = convention.decimals is not None and total
        results.append(round(percent, convention.decimals) if is_rounded else percent)
    return results


def diversity(counts: np.ndarray, convention: Convention) -> float:
    """Return the product of (1 - rep-n / 100) over the orders of `counts`; NaN where one is."""
    return math.prod(1 - percent / 100 for percent in rep(counts, convention))


def distinct(texts: Sequence[Words], order: int) -> tuple[int, int]:
    """Return (distinct, all) n-grams of all texts together.

    The share falls with the number of texts, so only equal numbers compare.
    """
    seen: set[tuple] = set()
    total = 0
    for words in texts:
        ngrams = list(iterate_ngrams(words, order))
        seen.update(ngrams)
        total += len(ngrams)
    return len(seen), total


def repetitiveness(text: str, order: int) -> float:
    """Return 1 - distinct / all n-grams of one text, 0 for a text that has none.

    Words are what single spaces part, so that a line break stays within one: as EMO's evaluation
    has it (language_modeling/test_utils.py).
    """
    ngrams = list(iterate_ngrams(text.split(" "), order))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def mixce_diversity(words: Words) -> float:
    """Return distinct / all n-grams of one text, orders 1 to 4 in one count; NaN without words.

    n-grams of 3 or 4 equal words are not counted, as in MixCE's metrics.py.
    """
    ngrams = [
        ngram
        for order in (1, 2, 3, 4)
        for ngram in iterate_ngrams(words, order)
        if order < 3 or len(set(ngram)) > 1
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def is_looping(words: Words, longest: int = LONGEST_PHRASE) -> bool:
    """Return whether a text ends in a phrase over and over.

    Of the phrase lengths up to `longest`, the one most often repeated at the end decides: it loops
    if it has 3 words and stands there twice, or is shorter and stands there more than 50 times
    (Holtzman et al. 2020, metrics/repetition.py).
    """
    backwards = list(words)[::-1]
    best_length, best_times = 0, 1
    for length in range(1, min(longest, len(backwards) // 2) + 1):
        phrase, times = backwards[:length], 1
        while backwards[length * times : length * (times + 1)] == phrase:
            times += 1
        if times > best_times:
            best_length, best_times = length, times
    return best_times > 1 and (best_length >= 3 or best_times > 50)
