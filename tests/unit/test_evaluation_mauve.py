"""MAUVE against the package mauve-text and against scipy, and features against plain forwards."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, special

from megatron_emo.evaluation import features as features_module
from megatron_emo.evaluation.command import build_parser, run_command
from megatron_emo.evaluation.features import compute_features
from megatron_emo.evaluation.mauve import (
    cluster,
    default_num_clusters,
    frontier_integral,
    mauve_from_clusters,
    mauve_from_features,
    mauve_from_histograms,
    reduce_features,
)
from megatron_emo.evaluation.records import read_records

ORACLE = Path(__file__).resolve().parents[2] / ".venv" / "oracles" / "mauve"
SEEDS = range(5)
SIZE = 2000
NUM_CLUSTERS = 20
WORDS = [f"w{index}" for index in range(100)]


def make_mixture(rng, size: int, shift: float = 0.0, num_modes: int = 6) -> np.ndarray:
    centres = np.random.default_rng(7).normal(size=(6, 8)) * 2
    return centres[rng.integers(0, num_modes, size)] + rng.normal(size=(size, 8)) + shift


def make_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    narrow = rng.normal(size=(SIZE, 8)) * np.linspace(0.5, 1, 8) + 1
    return {
        "shift": (make_mixture(rng, SIZE), make_mixture(rng, SIZE, 0.3)),
        "unequal": (make_mixture(rng, SIZE), make_mixture(rng, 1600, 0.2)),
        "far": (make_mixture(rng, SIZE), make_mixture(rng, SIZE, 3.0)),
        "modes": (make_mixture(rng, SIZE), make_mixture(rng, SIZE, num_modes=5)),
        "narrow": (rng.normal(size=(SIZE, 8)) + 1, narrow),
    }


@pytest.fixture(scope="module")
def oracle():
    """mauve-text's compute_mauve, imported beside the environment."""
    if not ORACLE.exists():
        pytest.skip("mauve-text is not in .venv/oracles: make env puts it there")
    pytest.importorskip("faiss")
    sys.path.insert(0, str(ORACLE))
    try:
        return importlib.import_module("mauve").compute_mauve
    finally:
        sys.path.remove(str(ORACLE))


def make_labels(expected, num_p: int, num_q: int) -> np.ndarray:
    """A clustering that fills clusters as the package's own did."""
    counts = np.concatenate([expected.p_hist * num_p, expected.q_hist * num_q])
    clusters = np.tile(np.arange(len(expected.p_hist)), 2)
    return np.repeat(clusters, np.rint(counts).astype(int))


@pytest.mark.filterwarnings("ignore:builtin type .*:DeprecationWarning")
@pytest.mark.parametrize("name", make_pairs())
def test_the_package_gives_the_same(oracle, name):
    """The same from its histograms; and nearly the same from our own clusters.

    A hundred rows a cluster keep the spread of one clustering's value near or below 0.01, so the
    difference of two means of five has one of 0.006; over 12 seeds those agree within 0.006.
    """
    p, q = make_pairs()[name]
    reduced = reduce_features(p, q)
    ours, theirs = [], []
    for seed in SEEDS:
        expected = oracle(
            p_features=p, q_features=q, seed=seed, num_buckets=NUM_CLUSTERS, verbose=False
        )
        theirs.append(expected.mauve)
        got = mauve_from_clusters(reduced, make_labels(expected, len(p), len(q)), NUM_CLUSTERS, 0)
        assert (got.mauve, got.mauve_star, got.frontier_integral) == pytest.approx(
            (expected.mauve, expected.mauve_star, expected.frontier_integral), abs=1e-9
        )
        labels = cluster(reduced, NUM_CLUSTERS, seed)
        ours.append(mauve_from_clusters(reduced, labels, NUM_CLUSTERS, seed).mauve)
    print(f"{name}: ours {np.mean(ours):.4f}, mauve-text {np.mean(theirs):.4f}")
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.02


@pytest.mark.filterwarnings("ignore:builtin type .*:DeprecationWarning")
@pytest.mark.parametrize(("num_p", "num_q"), [(155, 200), (145, 145), (12, 40)])
def test_as_many_clusters_as_the_package_takes(oracle, num_p, num_q):
    rng = np.random.default_rng(0)
    p, q = make_mixture(rng, num_p), make_mixture(rng, num_q)
    expected = oracle(p_features=p, q_features=q, verbose=False)
    assert default_num_clusters(num_p, num_q) == len(expected.p_hist)


def make_histograms(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p, q = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("seed", range(4))
def test_mauve_equals_scipys_divergences_summed_by_hand(seed):
    p, q = make_histograms(seed)
    points = [(1.0, 0.0), (0.0, 1.0)]
    for step in range(25):
        w = 1e-6 + step * (1 - 2e-6) / 24
        r = w * p + (1 - w) * q
        points.append(
            (
                math.exp(-5 * special.rel_entr(q, r).sum()),
                math.exp(-5 * special.rel_entr(p, r).sum()),
            )
        )
    areas = []
    for axis in (0, 1):
        line = sorted(points, key=lambda point: (point[axis], -point[1 - axis]))
        pairs = zip(line, line[1:], strict=False)
        areas.append(sum((b[axis] - a[axis]) * (a[1 - axis] + b[1 - axis]) / 2 for a, b in pairs))
    assert mauve_from_histograms(p * 60, q) == pytest.approx(sum(areas) / 2, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_frontier_integral_is_the_integral(seed):
    p, q = make_histograms(seed)

    def cost(w):
        r = w * p + (1 - w) * q
        return w * special.rel_entr(p, r).sum() + (1 - w) * special.rel_entr(q, r).sum()

    assert frontier_integral(p, q) == pytest.approx(2 * integrate.quad(cost, 0, 1)[0], abs=1e-7)


def test_equal_and_disjoint_histograms():
    p = np.array([0.1, 0.2, 0.7])
    nearly = p * (1 + np.array([1, -1, 1]) * 2.0**-52)
    for q in (p, nearly):
        assert mauve_from_histograms(p, q) == pytest.approx(1.0, abs=1e-9)
        assert frontier_integral(p, q) == pytest.approx(0.0, abs=1e-12)
    assert mauve_from_histograms([7], [3]) == 1.0
    a, b = np.array([1.0, 0, 0]), np.array([0, 0.5, 0.5])
    assert frontier_integral(a, b) == pytest.approx(1.0, abs=1e-12)
    assert 0 < mauve_from_histograms(a, b) < 0.01


def test_one_seed_gives_one_value_whatever_the_lengths_of_the_rows():
    p, q = make_pairs()["shift"]
    first = mauve_from_features(p[:200], q[:150], seed=3)
    again = mauve_from_features(p[:200], q[:150] * 4.0, seed=3)
    assert first.num_clusters == 15
    assert (first.mauve, first.mauve_star) == (again.mauve, again.mauve_star)
    assert first.p_histogram.sum() == pytest.approx(1.0)
    assert mauve_from_features(p[:200], p[:200], seed=0).mauve == pytest.approx(1.0)


def test_few_distinct_rows_and_zero_rows_are_clustered():
    ones = np.ones((40, 3))
    assert mauve_from_features(ones, ones, seed=0).mauve == pytest.approx(1.0)
    assert mauve_from_features(np.zeros((20, 3)), ones, seed=0).mauve < 0.01
    two = np.concatenate([ones, ones * [1, 0, -1]])
    assert mauve_from_features(two, two, seed=0, num_clusters=8).mauve == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("p", "q", "num_clusters", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), None, r"features of p: expected .*got shape \(1, 3\)"),
        (np.ones((5, 3)), np.ones((5, 4)), None, "one width, got 3 of p, 4 of q"),
        (np.ones((5, 3)), np.full((5, 3), np.nan), None, "features of q: expected finite"),
        (np.ones((5, 3)), np.ones((5, 3)), 11, r"--num-clusters: expected 2 to 10 .*got 11"),
        (np.ones((5, 3)), np.ones((5, 3)), 1, r"--num-clusters: expected 2 to 10 .*got 1"),
        (np.ones((5, 3)), np.ones((5, 3)), 0, r"--num-clusters: expected 2 to 10 .*got 0"),
    ],
)
def test_bad_features_are_named(p, q, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        mauve_from_features(p, q, 0, num_clusters)


def test_bad_histograms_are_named():
    for p, q, message in (
        ([1, 2], [1], "of one size"),
        ([0, 0], [1, 1], "histogram p"),
        ([1, 1], [1, -1], "histogram q"),
    ):
        with pytest.raises(ValueError, match=message):
            mauve_from_histograms(p, q)


def save_featurizer(folder: Path, kind: str = "gpt2", with_specials: bool = True) -> Path:
    """A tiny random model, and a tokenizer of WORDS."""
    from hf_models import VOCAB_SIZE, save_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    if kind == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = AutoConfig.for_model(
            "bert",
            **sizes,
            intermediate_size=40,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=48,
        )
        torch.manual_seed(3)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    else:
        save_model(kind, folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {"bos_token": "<s>"} if with_specials else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    return folder


def make_texts(num_texts: int = 9, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for _ in range(num_texts)]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "bert"])
def test_features_are_the_last_tokens_state_in_a_plain_forward(tmp_path, kind):
    from transformers import AutoModel

    folder = save_featurizer(tmp_path, kind)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [*make_texts(), "", "w3", "unknown ü w3"]
    features = compute_features(texts, folder, max_tokens=40, batch_size=4)
    assert features.dtype == np.float32
    for text, got in zip(texts, features, strict=True):
        words = [WORDS.index(w) + 2 if w in WORDS else 0 for w in text.split()] or [1]
        with torch.no_grad():
            hidden = model(torch.tensor([words[:40]])).last_hidden_state[0, -1]
        np.testing.assert_allclose(got, hidden.numpy(), rtol=1e-4, atol=1e-4 * hidden.abs().max())


def test_a_run_that_was_cut_off_goes_on_and_a_whole_one_is_kept(tmp_path, monkeypatch):
    folder, cache = save_featurizer(tmp_path / "model"), tmp_path / "cache"
    texts, done = make_texts(), []
    plain = compute_features(texts, folder, batch_size=2)
    monkeypatch.setattr(features_module, "BLOCK", 4)
    compute = features_module._Batches.compute

    def compute_until(self, rows, last=6):
        if len(done) >= last:
            raise KeyboardInterrupt
        done.extend(rows)
        return compute(self, rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(features_module._Batches, "compute", compute_until)
        compute_features(texts, folder, batch_size=2, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(
        features_module._Batches, "compute", lambda self, rows: compute_until(self, rows, 99)
    )
    resumed = compute_features(texts, folder, batch_size=2, cache_dir=cache)
    assert sorted(done) == list(range(len(texts)))
    np.testing.assert_array_equal(resumed, plain)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]
    np.testing.assert_array_equal(compute_features(texts, folder, cache_dir=cache), plain)
    assert len(done) == len(texts)
    compute_features(texts, folder, max_tokens=5, cache_dir=cache)
    compute_features(texts[::-1], folder, cache_dir=cache)
    assert len(done) == 3 * len(texts)


def test_bad_texts_and_flags_are_named(tmp_path):
    folder = save_featurizer(tmp_path, with_specials=False)
    for changes, message in (
        ({"max_tokens": 49}, "--max-tokens: expected at most 48, .* got 49"),
        ({"max_tokens": 0}, "--max-tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size: expected at least 1, got 0"),
        ({}, "text 1: expected a token, found none"),
    ):
        with pytest.raises(ValueError, match=message):
            compute_features(["w1", ""], folder, **changes)
    with pytest.raises(ValueError, match="at least 1 text"):
        compute_features([], folder)


def run_mauve(*flags: object) -> list:
    return run_command(build_parser("").parse_args(["mauve", *map(str, flags)]))


def test_command_measures_texts_of_two_fields(tmp_path, capsys):
    folder = save_featurizer(tmp_path / "tiny")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"original": make_texts(30), "sampled": make_texts(24, 1)}))
    out = tmp_path / "mauve.json"
    flags = ["--p", texts, "--q", texts, "--field-p", "original", "--field-q", "sampled"]
    flags += ["--featurizer", folder, "--num-clusters", 5, "--cache", tmp_path / "cache"]
    run_mauve(*flags, "--json", out, "--label", "domain=made")
    errors = capsys.readouterr().err
    assert "caution: 30 and 24 texts" in errors and "unequal" in errors
    records = {record.metric: record for record in read_records([out])}
    assert list(records) == ["mauve", "mauve-star", "frontier-integral"]
    mauve = records["mauve"]
    singles = mauve.settings["values"]
    assert mauve.value == pytest.approx(np.mean(singles)) and len(singles) == 5
    assert (mauve.interval.low, mauve.interval.high) == (min(singles), max(singles))
    assert mauve.interval.method == "range"
    assert mauve.n == 24 and mauve.settings["max_tokens"] == 48 and mauve.model == "tiny"
    assert list(mauve.data) == ["texts.json"] and mauve.labels == {"domain": "made"}
    again = run_mauve(*flags)
    assert [record.value for record in again] == [r.value for r in records.values()]


def test_command_takes_features(tmp_path, capsys):
    for side, values in zip("pq", make_pairs()["modes"], strict=True):
        (tmp_path / side).mkdir()
        np.save(tmp_path / side / "x.npy", values[:300])
    flags = ["--p", tmp_path / "p/x.npy", "--q", tmp_path / "q/x.npy", "--seeds", 2, "--seed", 4]
    mauve = run_mauve(*flags, "--limit", 250)[0]
    assert mauve.settings["seeds"] == [4, 5] and mauve.n == 250
    assert mauve.model is None and set(mauve.data) == {"p/x.npy", "q/x.npy"}
    assert "caution" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("w1\nw2\n", [], "--featurizer: expected a folder"),
        ("w1\n", ["--featurizer", "."], "--p: expected at least 2 texts, found 1"),
        ("w1\nw2\n", ["--seeds", 0], "--seeds: expected at least 1, got 0"),
    ],
)
def test_command_names_what_is_wrong(tmp_path, content, flags, message):
    path = tmp_path / "texts.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        run_mauve("--p", path, "--q", path, *flags)


@pytest.mark.parametrize("values", [np.arange(4.0), np.ones((4, 2), dtype=int)])
def test_command_names_an_array_that_is_no_features(tmp_path, values):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=r"x.npy: expected floats of shape \[texts, width\]"):
        run_mauve("--p", tmp_path / "x.npy", "--q", tmp_path / "x.npy")
    (tmp_path / "y.npy").write_text("text")
    with pytest.raises(ValueError, match="y.npy: expected a .npy array"):
        run_mauve("--p", tmp_path / "y.npy", "--q", tmp_path / "y.npy")
