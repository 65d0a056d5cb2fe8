"""The benchmark's own honesty: its exactness check, memory count, ratios and target ids."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_emo.benchmark import others, variants
from megatron_emo.benchmark.config import BenchmarkConfig
from megatron_emo.benchmark.measure import run_benchmark, time_rounds
from megatron_emo.benchmark.problem import make_problem
from megatron_emo.benchmark.report import describe_run, format_report, write_json, write_png
from megatron_emo.benchmark.tokens import Target, load_target, zipf_token_ids
from megatron_emo.benchmark.variants import VARIANTS, Variant, gradient_error
from megatron_emo.reference import reference_loss

SMALL = {"num_tokens": 12, "vocab_size": 40, "hidden_size": 6, "cost_dim": 5}
OBJECTIVES_AND_TABLES = [("mle", ""), ("emo1", ""), ("emo1", "-fp8")]
ZIPF = zipf_token_ids(12, 40, seed=3)


def config(**change) -> BenchmarkConfig:
    return BenchmarkConfig(**SMALL | {"rounds": 3, "warmup": 1} | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_gradients_of_float64(name, dtype):
    if not VARIANTS[name].runs_on("cpu"):
        pytest.skip(f"{name} does not run here; it needs {VARIANTS[name].needs}")
    variant = VARIANTS[name]
    assert gradient_error(variant, dtype, "cpu") <= variant.tolerance(dtype, "cpu")


def test_every_objective_path_and_table_has_a_row():
    paths = ("logits", "fused-logits", "fused-recompute", "fused-forward")
    own = [name for name in VARIANTS if VARIANTS[name].path]
    assert own == [f"{x}-{path}{y}" for path in paths for x, y in OBJECTIVES_AND_TABLES]
    for name in own:
        assert VARIANTS[name].path in name and VARIANTS[name].is_fused == ("fused" in name)
        assert VARIANTS[name].baseline == "mle-" + name.partition("-")[2].removesuffix("-fp8")


def test_only_rows_that_say_why_are_held_to_less():
    loose = {name for name in VARIANTS if VARIANTS[name].tolerance(torch.float32, "cpu") > 2e-6}
    assert loose == {"megatron-fused-ce"}
    assert "bf16" in VARIANTS["megatron-fused-ce"].note
    for variant in VARIANTS.values():
        assert variant.note or not variant.tolerances


def test_an_fp8_row_is_held_to_the_costs_of_its_own_table():
    in_fp32 = Variant(VARIANTS["emo1-fused-recompute"].build, "emo1", table="fp8")
    assert gradient_error(in_fp32, torch.float32, "cpu") > 1e-4


def test_the_truth_of_fp8_rows_is_the_reference_where_rows_have_unit_length():
    problem = make_problem(ZIPF, 40, 6, 5, seed=0).to("cpu", torch.float64)
    unit = F.normalize(problem.cost_embedding)
    logits = F.linear(problem.hidden, problem.weight)
    expected = reference_loss(logits, problem.target, "emo1", unit).loss.mean()
    found = variants._emo1_of_rows(logits, problem.target, unit)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def wrong_by_a_thousandth(problem):
    return lambda: 1.001 * F.cross_entropy(F.linear(problem.hidden, problem.weight), problem.target)


def test_a_variant_with_wrong_gradients_is_not_timed(monkeypatch):
    monkeypatch.setitem(VARIANTS, "wrong", Variant(wrong_by_a_thousandth, "mle"))
    assert gradient_error(VARIANTS["wrong"], torch.float32, "cpu") == pytest.approx(1e-3, rel=0.01)
    with pytest.raises(RuntimeError, match="^wrong: expected gradients within 2e-06.*got 1.0e-03"):
        run_benchmark(config(variants=("wrong",)), ZIPF)


def test_rounds_rotate_and_the_warm_up_is_not_counted(monkeypatch):
    problem = make_problem(ZIPF, 40, 6, 5, seed=0).to("cpu", torch.float32)
    calls = []

    def variant(name):
        def loss():
            calls.append(name)
            return F.linear(problem.hidden, problem.weight).mean()

        return loss

    seconds = time_rounds({x: variant(x) for x in "abc"}, problem, 3, 1, lambda line: None)
    assert calls == list("abcbcacababc")
    assert all(len(seconds[x][clock]) == 3 for x in "abc" for clock in ("wall", "cpu"))


def test_ratios_are_taken_inside_each_round(monkeypatch):
    # Round 2 is disturbed for both alike: no ratio may show it.
    times = {"mle-logits": [1.0, 50.0, 2.0], "emo1-logits": [1.5, 60.0, 2.2]}

    def fixed_times(losses, *_):
        return {name: {"wall": times[name]} for name in losses}

    monkeypatch.setattr("megatron_emo.benchmark.measure.time_rounds", fixed_times)
    results = run_benchmark(config(variants=tuple(times)), ZIPF)
    ratio = results["emo1-logits"].ratios["wall"]["mle-logits"]
    assert (ratio.median, ratio.min, ratio.of_minima) == pytest.approx((1.2, 1.1, 1.5))
    assert results["mle-logits"].ratios["wall"] == {}
    assert results["mle-logits"].tflops == pytest.approx(6 * 12 * 6 * 40 / 2.0 / 1e12)


def test_a_result_says_where_it_was_taken(tmp_path):
    target = Target(ZIPF, "--text some.txt")
    chosen = config(variants=("mle-logits", "emo1-logits", "torch-ce"))
    results = run_benchmark(chosen, target.ids)
    run = describe_run(chosen, target, [0.5, 0.25, 0.125])
    write_json(str(tmp_path / "out.json"), run, results)
    write_png(str(tmp_path / "out.png"), run, results)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["run"]["target"]["num_distinct"] == len(set(ZIPF.tolist()))
    assert stored["run"]["load_average"]["before"] == [0.5, 0.25, 0.125]
    assert stored["run"]["num_threads"] == torch.get_num_threads()
    assert len(stored["results"]["emo1-logits"]["seconds"]["cpu"]) == 3
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    text = format_report(run, results)
    assert "collectives" not in text and "roofline" not in text
    for shown in ("--text some.txt", "load [0.5, 0.25, 0.125]", torch.__version__, "U/N"):
        assert shown in text
    # A cost table adds its rows of the distinct targets to what must be alive.
    assert results["emo1-logits"].peak_bytes > results["mle-logits"].peak_bytes


def test_zipf_ids_follow_their_law():
    ids = zipf_token_ids(200_000, 5, seed=0)
    law = 1 / (torch.arange(1, 6) + 2.7)
    share = torch.bincount(ids, minlength=5) / len(ids)
    torch.testing.assert_close(share, law / law.sum(), rtol=0, atol=5e-3)
    assert torch.equal(ids, zipf_token_ids(200_000, 5, seed=0))


def test_distinct_ids_never_repeat():
    ids, source = load_target(40, 40, 0, ids="distinct")
    assert sorted(ids.tolist()) == list(range(40)) and source == "--ids distinct"
    some = load_target(12, 40, 3, ids="distinct").ids
    assert len(some.unique()) == 12 and some.tolist() != sorted(some.tolist())


def test_ids_from_npy(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(20, dtype=np.uint16).reshape(4, 5))
    ids, source = load_target(7, 40, 0, tokens=str(tmp_path / "ids.npy"))
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 6] and ids.dtype == torch.int64
    assert source == "--tokens ids.npy"


def test_ids_from_an_indexed_dataset(tmp_path):
    pytest.importorskip("megatron.core")
    from megatron_emo.data.upstream import import_indexed_dataset

    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.int32)
    for document in ([5, 6, 7], [8], [9, 10, 11]):
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{tmp_path}/d.idx")
    assert load_target(6, 40, 0, tokens=f"{tmp_path}/d").ids.tolist() == [5, 6, 7, 8, 9, 10]


def test_ids_from_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "b": 1, "c": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("c b a b c c")
    files = {"text": str(tmp_path / "text"), "tokenizer": str(tmp_path / "tokenizer.json")}
    ids, source = load_target(5, 3, 0, **files)
    assert ids.tolist() == [2, 1, 0, 1, 2]
    assert source == "--text text, --tokenizer tokenizer.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokens": "nowhere.npy"}, "nowhere.npy"),
        ({"tokens": "nowhere"}, "--tokens: expected a .npy file .* found no .*nowhere.bin"),
        ({"tokens": "floats.npy"}, "--tokens .*floats.npy: expected integers, got float64"),
        ({"tokens": "short.npy"}, "--tokens short.npy: expected 12 ids, got 3"),
        ({"tokens": "large.npy"}, "expected ids below --vocab-size 40, got 40"),
        ({"tokens": "short.npy", "text": "t"}, "--tokens and --text: expected one"),
        ({"tokens": "short.npy", "ids": "distinct"}, "--ids distinct: .* no --tokens"),
        ({"ids": "some"}, "--ids: expected one of real, distinct, got 'some'"),
        ({"text": "t"}, "--text and --tokenizer: expected both or neither"),
        ({"text": "t", "tokenizer": "short.npy"}, "--text: no such file"),
        ({"text": "t", "tokenizer": "nowhere"}, "--tokenizer: no such file"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    pytest.importorskip("tokenizers")
    np.save(tmp_path / "floats.npy", np.zeros(12))
    np.save(tmp_path / "short.npy", np.arange(3))
    np.save(tmp_path / "large.npy", np.arange(29, 41))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        paths = {k: v if k == "ids" else str(tmp_path / v) for k, v in files.items()}
        load_target(12, 40, 0, **paths)


def test_more_distinct_ids_than_there_are_are_refused():
    with pytest.raises(ValueError, match="--num-tokens of at most --vocab-size 40, got 41"):
        load_target(41, 40, 0, ids="distinct")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "--rounds: expected at least 1, got 0"),
        ({"num_tokens": -1}, "--num-tokens: expected at least 1, got -1"),
        ({"warmup": -1}, "--warmup: expected at least 0, got -1"),
        ({"workspace_mb": 0}, "--workspace-mb: expected at least 1, got 0"),
        ({"tensor_parallel": 0}, "--tensor-parallel: expected at least 1, got 0"),
        ({"dtype": "fp8"}, "--dtype: expected one of fp32, bf16, got 'fp8'"),
        ({"variants": ("emo9",)}, "--variants: expected mle-logits, .*got 'emo9'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_the_released_package_is_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "emoloss-0.0.3" not in variants.available_variants()
    everything = config(variants=("all",)).variants
    assert {"mle-logits", "emo1-fused-recompute", "torch-ce"} < set(everything)
    assert "emoloss-0.0.3" not in everything
    with pytest.raises(ValueError, match="emoloss-0.0.3 is not installed"):
        config(variants=("emoloss-0.0.3",))


def test_a_row_for_gpus_is_left_out_on_a_cpu(monkeypatch):
    monkeypatch.setattr(others, "is_importable", lambda name: True)
    assert "liger-linear-ce" in variants.available_variants("cuda")
    assert "liger-linear-ce" not in variants.available_variants("cpu")
    with pytest.raises(ValueError, match="liger-linear-ce needs --device cuda, got cpu"):
        config(variants=("liger-linear-ce",))


def test_a_module_in_an_absent_package_is_not_importable():
    assert others.is_importable("torch.nn")
    assert not others.is_importable("no_such_package.some.module")
