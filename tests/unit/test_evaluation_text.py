"""Text metrics: by hand, against independent counting, and self-BLEU against nltk."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_emo.evaluation.intervals import (
    bootstrap,
    bootstrap_mean,
    paired_bootstrap,
    wilson,
)
from megatron_emo.evaluation.ngrams import (
    CONVENTIONS,
    count_ngrams,
    distinct,
    diversity,
    is_looping,
    mixce_diversity,
    rep,
    repetitiveness,
)
from megatron_emo.evaluation.self_bleu import self_bleu
from megatron_emo.evaluation.texts import read_texts
from megatron_emo.evaluation.zipf import fit_zipf_slope

STORIES = (
    Path(__file__).resolve().parents[3]
    / "shared/data/text/writingprompts/writing_gpt2-xl.raw_data.json"
)
ODD = [[], ["a"], ["a", "b"], ["ü", "ü", "ü", "ü", "ü", "ü"], ["日", "本", "語", "日", "本"]]


def make_texts(num_texts: int, seed: int = 0) -> list[list[str]]:
    """Texts of 0 to 60 words, a few words in most of the places."""
    rng = random.Random(seed)
    words = [f"w{int(rng.paretovariate(0.8))}" for _ in range(4000)]
    return ODD + [rng.choices(words, k=rng.randrange(61)) for _ in range(num_texts)]


def count_by_positions(text: str, order: int, end_offset: int) -> tuple[int, int]:
    """(distinct, all) by walking over end positions, n-grams as joined strings."""
    words, seen, total, end = text.strip().split(), {}, 0, order
    while end + end_offset <= len(words):
        seen[" ".join(words[end - order : end])] = True
        total, end = total + 1, end + 1
    return len(seen), total


def measure_independently(texts: list[str], convention: str) -> tuple[list[float], float]:
    is_simctg = convention == "simctg"
    percents = []
    for order in (2, 3, 4):
        pairs = [count_by_positions(text, order, int(is_simctg)) for text in texts]
        percent = (1 - sum(p[0] for p in pairs) / sum(p[1] for p in pairs)) * 100
        percents.append(round(percent, 2) if is_simctg else percent)
    a, b, c = (1 - percent / 100 for percent in percents)
    return percents, a * b * c


@pytest.mark.parametrize(
    ("convention", "percents", "expected"),
    # every: ab bc ca ab bc cd | abc bca cab abc bcd | abca bcab cabc abcd; simctg drops the last.
    [("every-ngram", [100 / 3, 20.0, 0.0], 8 / 15), ("simctg", [40.0, 25.0, 0.0], 0.45)],
)
def test_rep_and_diversity_by_hand(convention, percents, expected):
    convention = CONVENTIONS[convention]
    counts = count_ngrams(["a b c a b c d".split()], leave_out_last=convention.leave_out_last)
    assert rep(counts, convention) == pytest.approx(percents, abs=1e-12)
    assert diversity(counts, convention) == pytest.approx(expected, abs=1e-15)


def test_ngrams_that_two_texts_share_are_no_repetition():
    counts = count_ngrams(["a b c d e".split()] * 3)
    assert rep(counts, CONVENTIONS["every-ngram"]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("source", ["made", "original", "sampled"])
def test_rep_and_diversity_equal_an_independent_count(name, source):
    if source == "made":
        texts = [" ".join(words) for words in make_texts(80)]
    elif STORIES.exists():
        texts = read_texts(STORIES, source)
    else:
        pytest.skip(f"{STORIES.name} is not there")
    convention = CONVENTIONS[name]
    words = [text.split() for text in texts]
    counts = count_ngrams(words, leave_out_last=convention.leave_out_last)
    percents, expected = measure_independently(texts, name)
    assert rep(counts, convention) == percents
    assert diversity(counts, convention) == expected


def test_an_order_without_ngrams_is_nan_and_not_zero():
    every = CONVENTIONS["every-ngram"]
    counts = count_ngrams([["a", "b", "c"], []])
    assert rep(counts, every)[:2] == [0.0, 0.0]
    assert math.isnan(rep(counts, every)[2])
    assert math.isnan(diversity(counts, CONVENTIONS["simctg"]))


def test_distinct_counts_over_all_texts():
    texts = make_texts(50)
    for order in (1, 2, 3, 4):
        every = [tuple(w[i : i + order]) for w in texts for i in range(len(w) - order + 1)]
        assert distinct(texts, order) == (len(Counter(every)), len(every))


def test_repetitiveness_of_one_text_by_hand():
    assert repetitiveness("a b a b", 2) == pytest.approx(1 / 3)
    assert repetitiveness("a b\nc d", 2) == 0.0  # "b\nc" is one word where single spaces part
    assert repetitiveness("a", 2) == repetitiveness("", 2) == 0.0


def test_mixce_diversity_by_hand():
    # a b ab: 3 distinct of 3.  a a a: a, aa distinct of 3 + 2; aaa is not counted.
    assert mixce_diversity(["a", "b"]) == 1.0
    assert mixce_diversity(["a", "a", "a"]) == pytest.approx(2 / 5)
    # orders 1 to 4 of "a b a b": 2/4, 2/3, 2/2, 1/1
    assert mixce_diversity("a b a b".split()) == pytest.approx(7 / 10)
    assert math.isnan(mixce_diversity([]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so it goes on and on and", False),  # two words, twice
        ("x we are here we are here", True),  # three words, twice
        ("we are here we are here x", False),  # not at the end
        ("a " * 51, True),
        ("a " * 50, False),
        ("", False),
        ("a", False),
    ],
)
def test_loops_at_the_end(text, expected):
    assert is_looping(text.split()) is expected


def test_zipf_slope_equals_scipy_on_points_thinned_by_hand():
    texts = make_texts(400, seed=3)
    slope, types = fit_zipf_slope(texts)
    frequencies = sorted(Counter(w for words in texts for w in words).values(), reverse=True)
    points: dict[float, float] = {}
    for rank in range(1, len(frequencies)):
        points.setdefault(round(15 * math.log(rank)) / 15, math.log(frequencies[rank - 1]))
    assert types == len(frequencies)
    assert slope == pytest.approx(stats.linregress(list(points), list(points.values())).slope)


def test_zipf_leaves_out_the_last_rank():
    texts = [["a"] * 8, ["b"] * 4, ["c"]]
    assert fit_zipf_slope(texts)[0] == pytest.approx(-math.log(2) / (round(15 * math.log(2)) / 15))


def test_zipf_slope_of_a_power_law_and_of_too_few_words():
    texts = [[f"w{rank}"] * round(1e5 / rank**1.3) for rank in range(1, 200)]
    # Ranks are rounded by up to 1/30 on an axis of length 5.3: below 0.02 of a slope.
    assert fit_zipf_slope(texts)[0] == pytest.approx(-1.3, abs=0.02)
    with pytest.raises(ValueError, match="at least 3 distinct words, found 2"):
        fit_zipf_slope([["a", "b", "a"], []])


@pytest.mark.parametrize("references", [1, 9, 5000])
def test_self_bleu_equals_nltk(references):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    texts, seed, orders = make_texts(25), 5, (1, 2, 3, 4)
    result = self_bleu(texts, orders, references=references, seed=seed)
    assert result.num_references == min(references, len(texts) - 1)
    rng = np.random.default_rng(seed)
    pool = rng.permutation(len(texts))[: result.num_references + 1].tolist()
    scored = rng.permutation(len(texts)).tolist()
    smooth = bleu.SmoothingFunction().method1
    for row, index in enumerate(scored):
        absent = index if index in pool else pool[-1]
        others = [texts[other] for other in pool if other != absent]
        for column, order in enumerate(orders):
            weights = [1 / order] * order
            expected = bleu.sentence_bleu(others, texts[index], weights, smooth)
            assert result.scores[row, column] == pytest.approx(expected, abs=1e-12)


def test_self_bleu_of_copies_and_of_strangers():
    assert self_bleu(["a b c d e".split()] * 4).scores == pytest.approx(np.ones((4, 3)))
    strangers = [[f"{word}{text}" for word in "abcde"] for text in range(4)]
    assert not self_bleu(strangers).scores.any()
    with pytest.raises(ValueError, match="self-bleu: expected at least 2 texts, found 1"):
        self_bleu([["a"]])


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 7), (431, 872), (1, 1)])
def test_wilson_equals_scipy(successes, n):
    interval = wilson(successes, n, 0.9)
    expected = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert interval.low <= successes / n <= interval.high


def test_bootstrap_equals_scipys_up_to_the_draws():
    values = np.random.default_rng(0).exponential(size=300)
    ours = bootstrap(values, np.median, draws=4000, level=0.9, seed=1)
    theirs = stats.bootstrap(
        (values,),
        np.median,
        n_resamples=4000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = theirs.high - theirs.low
    # The spread of a 5% quantile of 4000 draws is below 3% of the interval; three times that.
    assert abs(ours.low - theirs.low) < 0.09 * width
    assert abs(ours.high - theirs.high) < 0.09 * width
    assert ours == bootstrap(values, np.median, draws=4000, level=0.9, seed=1)
    assert ours != bootstrap(values, np.median, draws=4000, level=0.9, seed=2)


def test_paired_bootstrap_sees_a_difference_that_the_spread_hides():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 10, 200)
    b = a - 0.5 + rng.normal(0, 0.1, 200)
    paired = paired_bootstrap(a, b)
    assert paired.low > 0.4 and paired.high < 0.6
    assert bootstrap_mean(a).low < b.mean() < bootstrap_mean(a).high


def test_bootstrap_leaves_out_resamples_without_a_value():
    rows = np.array([[1.0, 2.0], [0.0, 0.0]])  # (distinct, all): both rows the second gives 0/0
    interval = bootstrap(rows, lambda r: r[:, 0].sum() / r[:, 1].sum() if r.any() else math.nan)
    assert (interval.low, interval.high) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(3, 0), "n: expected at least 1, got 0"),
        (lambda: wilson(3, 2), "expected 0 to n = 2, got 3"),
        (lambda: bootstrap([1.0]), "expected at least 2, got 1"),
        (lambda: bootstrap([1.0, math.nan]), "expected finite"),
        (lambda: bootstrap([1.0, 2.0], level=1.0), "between 0 and 1, got 1.0"),
        (lambda: bootstrap([1.0, 2.0], draws=0), "draws: expected at least 1"),
        (lambda: bootstrap([1.0, 2.0], lambda rows: math.nan), "NaN for all 1000"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), r"got \(2,\) and \(1,\)"),
    ],
)
def test_intervals_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
