"""Entropy, top-1 mass and matched temperatures against numpy and scipy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from icl_models import save_with_tokenizer
from scipy.optimize import brentq
from scipy.stats import entropy as scipy_entropy

from megatron_emo.evaluation.entropy import (
    generation_perplexity,
    generation_records,
    match_temperature,
    measure_sharpness,
    temperature_records,
)
from megatron_emo.evaluation.generation import Decoding, generate
from megatron_emo.evaluation.models import LanguageModel, Window, load_model
from megatron_emo.evaluation.rows import RowFile

WINDOWS = [Window([5, 9, 80, 3, 44, 7], [3, 44, 7, 8], 2), Window([1, 2], [2, 250])]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = save_with_tokenizer("llama-tied", tmp_path_factory.mktemp("m") / "llama")
    return load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def logits(model) -> np.ndarray:
    """Of all predictions of WINDOWS that count, [6, vocabulary]."""
    with torch.no_grad():
        rows = [model.model(torch.tensor([w.tokens])).logits[0, w.first :] for w in WINDOWS]
    return torch.cat(rows).numpy()


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def mean_entropy(logits: np.ndarray, temperature: float) -> float:
    return scipy_entropy(softmax(logits, temperature), axis=-1).mean()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("batch_tokens", [2, 100])
def test_entropy_top1_and_slope(model, logits, temperature, batch_tokens):
    found = measure_sharpness(model, WINDOWS, temperature=temperature, batch_tokens=batch_tokens)
    assert found.tokens.tolist() == [4, 2]
    q = softmax(logits, temperature)
    np.testing.assert_allclose(found.top1, [q[:4].max(1).sum(), q[4:].max(1).sum()], rtol=1e-10)
    assert found.mean_entropy == pytest.approx(mean_entropy(logits, temperature), rel=1e-10)
    h = 1e-5
    ends = [mean_entropy(logits, temperature * math.exp(step)) for step in (h, -h)]
    assert found.mean_slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.4, 0.99, 1.0, 1.8, 30.0])
def test_matched_temperature_is_the_root(model, logits, temperature):
    target = mean_entropy(logits, temperature)
    passes = []

    def measure(t: float) -> tuple[float, float]:
        passes.append(t)
        found = measure_sharpness(model, WINDOWS, temperature=t)
        return found.mean_entropy, found.mean_slope

    match = match_temperature(measure, target, tolerance=1e-9)
    root = brentq(lambda t: mean_entropy(logits, t) - target, 0.01, 100, xtol=1e-12)
    assert match.temperature == pytest.approx(root, rel=1e-5)
    assert match.entropy_before == pytest.approx(mean_entropy(logits, 1.0), rel=1e-10)
    assert match.entropy_after == pytest.approx(target, abs=1e-9)
    assert match.passes == len(passes) <= (7 if 0.3 < temperature < 3 else 12)
    records = temperature_records(match, target, 6, {})
    assert [r.metric for r in records] == [
        *("matched_temperature", "entropy_before", "entropy_after", "entropy_target")
    ]
    assert records[0].value == match.temperature and records[0].n == 6


def test_steps_that_leave_the_bracket_are_halved():
    """A slope ten times too small sends Newton's steps far out."""

    def measure(t: float) -> tuple[float, float]:
        return 5 / (1 + t**-4), 0.1 * 20 * t**-4 / (1 + t**-4) ** 2

    match = match_temperature(measure, 1.0, tolerance=1e-6)
    assert match.temperature == pytest.approx(0.25**0.25, rel=1e-5)


@pytest.mark.parametrize("target", [-0.5, 5.71, 100.0])
def test_an_entropy_out_of_reach_is_an_error_soon(model, target):
    passes = []

    def measure(t: float) -> tuple[float, float]:
        passes.append(t)
        found = measure_sharpness(model, WINDOWS, temperature=t)
        return found.mean_entropy, found.mean_slope

    with pytest.raises(ValueError, match="temperature of 0.01 to 100.0, found"):
        match_temperature(measure, target)
    assert len(passes) <= 8


def test_nothing_to_predict_is_an_error(model):
    with pytest.raises(ValueError, match="entropy: expected at least 1 predicted token, found 0"):
        measure_sharpness(model, [Window([], [])])


# Of a model's own texts


@pytest.fixture(scope="module")
def generated(model, tmp_path_factory) -> list[dict]:
    decoding = Decoding.choose("unbiased", max_new_tokens=7, seed=1)
    prompts = ["the film", "it is so good and", "Review:"]
    file = RowFile(tmp_path_factory.mktemp("g") / "g.jsonl", {}, total=3, group=2)
    return generate(model, prompts, decoding, file, batch_size=2)


def test_generations_are_measured_where_they_were_drawn(model, generated):
    entropies, masses = [], []
    for row in generated:
        ids = model.encode(row["prompt"])
        for token in row["tokens"]:
            with torch.no_grad():
                q = model.model(torch.tensor([ids])).logits[0, -1].softmax(-1).numpy()
            entropies.append(scipy_entropy(q))
            masses.append(q.max())
            ids.append(token)
    values = {r.metric: r for r in generation_records(model, generated, 7, {}, batch_tokens=9)}
    assert values["generation_entropy"].value == pytest.approx(np.mean(entropies), rel=1e-9)
    assert values["generation_top1_mass"].value == pytest.approx(np.mean(masses), rel=1e-9)
    assert values["generation_entropy"].n == sum(len(row["tokens"]) for row in generated)
    assert values["mean_length"].value == np.mean([len(row["tokens"]) for row in generated])
    assert values["ended_share"].value == np.mean([row["ended"] for row in generated])


def test_generation_perplexity_is_token_weighted(model):
    rows = [
        {"prompt": "the film is", "continuation": " so good and so bad", "text": None},
        {"prompt": "it", "continuation": " is", "text": None},
        {"prompt": "it", "continuation": "", "text": None},
        {"prompt": "", "continuation": "good", "text": None},
    ]
    nats = []
    for row in rows:
        row["text"] = row["prompt"] + row["continuation"]
        ids = [model.prefix_id, *model.encode(row["text"])]
        begin = 1 + len(model.encode(row["prompt"]))
        with torch.no_grad():
            log_q = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats += [-float(log_q[i - 1, ids[i]]) for i in range(begin, len(ids))]
    record = generation_perplexity(model, rows, {})
    assert record.n == len(nats)
    assert record.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-9)
    with pytest.raises(ValueError, match="at least 1 generated token, found 0"):
        generation_perplexity(model, rows[2:3], {})


@pytest.mark.parametrize(
    "prompt, continuation, is_continuation_cut",
    [
        ("the film is so good and so bad", " and bad", False),
        ("the", " and bad and good" * 3, True),
    ],
)
def test_generation_perplexity_of_a_text_beyond_the_context(
    tmp_path, prompt, continuation, is_continuation_cut
):
    """Of 8 positions: the prompt is cut, or the continuation too."""
    model = load_model(
        save_with_tokenizer("gpt2", tmp_path / "short", positions=8), dtype="float64"
    )
    row = {"prompt": prompt, "continuation": continuation}
    row["text"] = row["prompt"] + row["continuation"]
    ids = [model.prefix_id, *model.encode(row["text"])]
    cut = len(ids) - 9
    begin = max(1 + len(model.encode(prompt)), cut + 1)
    assert cut > 0 and (1 + len(model.encode(prompt)) < cut + 1) == is_continuation_cut
    with torch.no_grad():
        log_q = model.model(torch.tensor([ids[cut:-1]])).logits[0].log_softmax(-1)
    nats = [-float(log_q[i - 1 - cut, ids[i]]) for i in range(begin, len(ids))]
    record = generation_perplexity(model, [row], {})
    assert record.n == len(nats)
    assert record.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-9)
