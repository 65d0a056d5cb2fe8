"""Differences of two models on the same questions and documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_emo.evaluation.icl import SCORINGS, Answer, read_answers
from megatron_emo.evaluation.intervals import paired_bootstrap
from megatron_emo.evaluation.perplexity import ratio_interval
from megatron_emo.evaluation.records import Record
from megatron_emo.evaluation.rows import read_rows

Pairs = Mapping[str, tuple[Path, Path]]
"""{seed: the files of A and of B}"""


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p that questions which one model alone has right fall so unevenly.

    References:
        McNemar (1947), by the binomial distribution; 1 where the models agree everywhere.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    # Of whole numbers: 2**n of a large test set is beyond a float.
    return min(1.0, 2 * tail / 2**n)


def compare_answers(
    pairs: Pairs, scoring: str, labels: Mapping[str, str], draws: int = 1000
) -> Record:
    """Return the accuracy of A minus that of B, mean over seeds.

    The interval is of resampled questions. `mcnemar_p` in the settings is by seed: answers of two
    seeds to one question are not independent.

    Raises:
        ValueError: other questions, or no pair.
    """
    differences, settings = [], {"values": {}, "mcnemar_p": {}, "only_a": {}, "only_b": {}}
    questions: list[int] | None = None
    for seed, (a, b) in _check(pairs).items():
        ours, theirs = read_answers(a), read_answers(b)
        asked = [[answer.question for answer in answers] for answers in (ours, theirs)]
        if asked[0] != asked[1] or (questions or asked[0]) != asked[0]:
            raise ValueError(f"{a}: expected the questions of {b}, in its order")
        questions = asked[0]
        left, right = _right(ours, scoring), _right(theirs, scoring)
        only_a, only_b = int((left & ~right).sum()), int((right & ~left).sum())
        differences.append(left.astype(float) - right)
        settings["values"][seed] = float(differences[-1].mean())
        settings["mcnemar_p"][seed] = mcnemar(only_a, only_b)
        settings["only_a"][seed], settings["only_b"][seed] = only_a, only_b
    mean = np.mean(differences, axis=0)
    return Record(
        *("accuracy_difference", float(mean.mean()), "1"),
        f"accuracy of A - accuracy of B on the same questions; answer: {SCORINGS[scoring]}",
        len(mean),
        n_unit="questions",
        interval=paired_bootstrap(mean, np.zeros_like(mean), draws) if len(mean) > 1 else None,
        settings={**settings, "resampled": "questions"},
        labels={**labels, "scoring": scoring},
    )


def _right(answers: Sequence[Answer], scoring: str) -> np.ndarray:
    return np.array([answer.predict(scoring) == answer.gold for answer in answers])


def compare_nats(pairs: Pairs, labels: Mapping[str, str], draws: int = 1000) -> Record:
    """Return the nats per token of A minus those of B, mean over seeds.

    The interval is of resampled documents.

    Raises:
        ValueError: other documents, other tokens, or no pair.
    """
    nats, values, tokens = [], {}, None
    for seed, (a, b) in _check(pairs).items():
        ours, theirs = read_rows(a), read_rows(b)
        same = [[(row["sha256"], row["tokens"]) for row in rows] for rows in (ours, theirs)]
        if same[0] != same[1]:
            raise ValueError(f"{a}: expected the documents of {b}, in as many tokens")
        tokens = np.array([row["tokens"] for row in ours], dtype=np.float64)
        nats.append([x["nats"] - y["nats"] for x, y in zip(ours, theirs, strict=True)])
        values[seed] = float(sum(nats[-1]) / tokens.sum())
    mean = np.mean(nats, axis=0)
    return Record(
        *("cross_entropy_difference", float(mean.sum() / tokens.sum()), "nats/token"),
        "(nats under A - nats under B) / tokens, paired by document",
        round(tokens.sum()),
        n_unit="tokens",
        interval=ratio_interval(mean, tokens, draws),
        settings={"values": values, "documents": len(tokens), "resampled": "documents"},
        labels=dict(labels),
    )


def _check(pairs: Pairs) -> Pairs:
    if not pairs:
        raise ValueError("pairs: expected at least one of two models, found none")
    return pairs
