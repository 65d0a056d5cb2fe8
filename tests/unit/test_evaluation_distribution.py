"""Distances between next-token distributions against numpy, one position at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from icl_models import save_with_tokenizer
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from megatron_emo.evaluation.distribution import (
    MEASURES,
    compare_logits,
    distribution_records,
    measure_distributions,
    select_texts,
)
from megatron_emo.evaluation.models import LanguageModel, load_model

TEXTS = [
    "the film is so good and so bad it is about world",
    "Review: it is so good",
    "naïve café 中文 so so",
    "short",
    "it is the film and the film is bad and good " * 8,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[LanguageModel, LanguageModel]:
    """A model and a reference of another architecture, with one tokenizer."""
    folder = tmp_path_factory.mktemp("m")
    return tuple(
        load_model(save_with_tokenizer(name, folder / name), dtype="float64")
        for name in ("llama-tied", "gpt2")
    )


def measures_of(q: np.ndarray, p: np.ndarray, target: int) -> dict[str, float]:
    """All measures of one position from two probability vectors."""
    return {
        "forward_cross_entropy": scipy_entropy(p) + scipy_entropy(p, q),
        "reverse_cross_entropy": scipy_entropy(q) + scipy_entropy(q, p),
        "tvd": 1 - np.minimum(p, q).sum(),
        "forward_kl": scipy_entropy(p, q),
        "reverse_kl": scipy_entropy(q, p),
        "js": jensenshannon(p, q) ** 2,
        "entropy": scipy_entropy(q),
        "reference_entropy": scipy_entropy(p),
        "top1_mass": max(q),
        "cross_entropy": -np.log(q[target]),
        "reference_cross_entropy": -np.log(p[target]),
    }


def probabilities(model: LanguageModel, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0].numpy() / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def values_of(models, windows, **options) -> dict[str, float]:
    measured = measure_distributions(*models, windows, **options)
    convention = options.get("convention", "tokens")
    records = distribution_records(measured, {}, convention=convention)
    return {record.metric: record.value for record in records}


@pytest.mark.parametrize("batch_tokens", [5, 64, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_means_equal_brute_force(models, batch_tokens, temperature):
    model, reference = models
    windows = select_texts(*models, TEXTS, min_words=1, max_tokens=120).windows
    found = values_of(models, windows, batch_tokens=batch_tokens, temperature=temperature)
    rows = []
    for text in TEXTS:
        ids = [model.prefix_id, *model.encode(text)]
        q = probabilities(model, ids, temperature)
        p = probabilities(reference, ids)
        rows += [measures_of(q[i], p[i], ids[i + 1]) for i in range(len(ids) - 1)]
    assert set(found) == set(MEASURES)
    for name, value in found.items():
        expected = np.mean([row[name] for row in rows])
        assert value == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("batch_tokens", [5, 2048])
def test_the_released_convention(models, batch_tokens):
    """Positions 2 to the last, the one after the last token too; the mean of texts' means."""
    model, reference = models
    windows = select_texts(*models, TEXTS, convention="emo", min_words=1).windows
    found = values_of(models, windows, convention="emo", batch_tokens=batch_tokens)
    texts = []
    for text in TEXTS:
        ids = model.encode(text)
        p, q = probabilities(reference, ids), probabilities(model, ids)
        rows = [measures_of(q[i], p[i], 0) for i in range(1, len(ids))]
        row = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        following = [measures_of(q[i], p[i], ids[i + 1]) for i in range(len(ids) - 1)]
        for name in ("cross_entropy", "reference_cross_entropy"):
            row[name] = np.mean([values[name] for values in following])
        texts.append(row)
    for name, value in found.items():
        assert value == pytest.approx(np.mean([row[name] for row in texts]), rel=1e-9), name


def test_a_model_is_no_distance_from_itself(models):
    model = models[0]
    windows = select_texts(model, model, TEXTS, min_words=1).windows
    found = values_of((model, model), windows)
    assert all(abs(found[name]) < 1e-12 for name in ("tvd", "forward_kl", "reverse_kl", "js"))
    assert found["forward_cross_entropy"] == pytest.approx(found["entropy"], rel=1e-12)


def test_fp32_keeps_its_digits_over_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 6, 50_000, generator=generator, dtype=torch.float64) * 4
    y = z + 1e-2 * y
    target = torch.arange(6)
    exact, rounded = compare_logits(z, y, target), compare_logits(z.float(), y.float(), target)
    # KL is 1e-3 here, and cross-entropies are 4: as their difference it would keep three digits.
    # A log-probability of -30 is rounded by 1e-6 in fp32, and log p - log q is 0.04: 3e-5 of it.
    np.testing.assert_allclose(rounded, exact, rtol=5e-5)


def test_padding_of_the_wider_vocabulary_is_left_out():
    z, y = torch.randn(2, 3, 7, dtype=torch.float64)
    wide = torch.cat([z, torch.full((3, 2), 5.0)], dim=1)
    target = torch.tensor([0, 3, 6])
    torch.testing.assert_close(compare_logits(wide, y, target), compare_logits(z, y, target))


def test_texts_out_of_range_are_counted(models):
    selected = select_texts(*models, TEXTS, min_words=3, max_tokens=60)
    assert (len(selected.windows), selected.num_short, selected.num_long) == (3, 1, 1)
    # The context of both is 256 tokens.
    assert len(select_texts(*models, [TEXTS[4] * 4] + TEXTS, min_words=3).windows) == 4
    with pytest.raises(ValueError, match="expected at least 1 text of --min-words 20 .* found 0"):
        select_texts(*models, TEXTS[:4])
    with pytest.raises(ValueError, match="--convention: expected one of"):
        select_texts(*models, TEXTS, convention="token")


def test_other_merges_of_the_same_tokens_are_refused(models, tmp_path):
    import json

    folder = save_with_tokenizer("gpt2", tmp_path / "other")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="--reference other: .* splits 'the film"):
        select_texts(models[0], load_model(folder), TEXTS, min_words=1)


def test_intervals_are_of_texts(models):
    windows = select_texts(*models, TEXTS, min_words=1).windows
    measured = measure_distributions(*models, windows)
    for record in distribution_records(measured, {}, draws=200):
        sums, counts = measured[record.metric]
        assert record.interval.low < record.value < record.interval.high
        assert record.interval.high <= (sums / counts).max()
        assert record.n == counts.sum() and record.settings["texts"] == 5
    alone = measure_distributions(*models, windows[:1])
    assert distribution_records(alone, {})[0].interval is None
