"""Scores of finished runs: against transformers in float64, resumed, and tabulated for the fits."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from icl_models import save_with_tokenizer

from megatron_emo.conversion.import_hf import import_hf
from megatron_emo.evaluation.records import Record, hash_file, read_records
from megatron_emo.evaluation.rows import read_rows
from megatron_emo.launch.run_result import RunResult, write_result
from megatron_emo.scaling.laws.fit_command import add_arguments as add_fit_arguments
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.running import score
from megatron_emo.scaling.running.finished_runs import Unfinished, read_finished
from megatron_emo.scaling.running.score import ScoreSettings, read_score, score_run
from megatron_emo.scaling.running.score_table import make_row, write_table
from megatron_emo.study.scaling.columns import compare_columns, fit_columns

STEPS = 100
TEXTS = ["It is about world. sports.", "so good and so bad it is", "film, the: bad. Review", "I"]


def make_entry(name: str, **changes) -> dict:
    """A run as the manifest has it."""
    entry = {"name": name, "hash": f"hash-{name}", "index": 0, "config": {"steps": STEPS}}
    entry |= {"label": "emo1", "objective": "emo1", "seed": 1, "size": 64, "budget": 1e9}
    entry |= {"params": 1000, "non_embedding": 700, "tokens": 6400, "flops_6nd": 8 * 10**8}
    return entry | {"flops": 9 * 10**8, "loss_flops": 10**8} | changes


def finish(output: Path, entry: dict, **changes) -> None:
    """Write the result that a training leaves."""
    same = {key: entry[key] for key in ("name", "hash", "tokens", "objective")}
    result = {"iteration": STEPS, "samples": 100, "seconds": 1800.0, "gpu_hours": 0.5, "starts": 1}
    result |= {"ranks": 1, "device": "CPU", "lm_loss": 3.0, "versions": {}, "commit": ""}
    folder = output / "runs" / entry["name"]
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder / "result.json", RunResult(**(same | result | changes)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Hugging Face folders, and each as the checkpoint that a run of STEPS steps leaves."""
    root = tmp_path_factory.mktemp("models")
    for name, width in (("small", 96), ("large", 160)):
        save_with_tokenizer("llama", root / name, positions=32, intermediate_size=width)
        checkpoints = root / f"{name}-checkpoints"
        import_hf(root / name, checkpoints, say=lambda _: None)
        (checkpoints / "release").rename(checkpoints / f"iter_{STEPS:07d}")
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    return root


@pytest.fixture
def output(models, tmp_path):
    """A study of two runs, the held-out texts beside it."""
    entries = [make_entry("small"), make_entry("large")]
    for entry in entries:
        finish(tmp_path, entry)
        train = tmp_path / "runs" / entry["name"] / "train"
        train.mkdir()
        (train / "checkpoints").symlink_to(models / f"{entry['name']}-checkpoints")
    data = {"path": ["data/train_text_document"], "held_out": str(tmp_path / "held_out.jsonl")}
    manifest = {"format": 1, "data": data | {"tokenizer_model": ""}, "runs": entries}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_held_out(tmp_path, TEXTS)
    return tmp_path


def write_held_out(output: Path, texts: list[str]) -> Path:
    path = output / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    score.hash_held_out.cache_clear()
    score._read_texts.cache_clear()
    return path


@pytest.fixture
def settings(output):
    return ScoreSettings(output / "held_out.jsonl", tokenizer=None)


def find_run(output: Path, name: str):
    manifest = json.loads((output / "manifest.json").read_text())
    return read_finished(output, next(e for e in manifest["runs"] if e["name"] == name))


def scored(output, name, settings):
    return score_run(find_run(output, name), settings)


def value(records, metric) -> float:
    return next(record.value for record in records if record.metric == metric)


@torch.no_grad()
def exact_nats(folder: Path) -> tuple[list[float], list[int]]:
    """Nats and scored tokens of each text by transformers alone, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, tokens = [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logs = model(ids).logits[0, :-1].log_softmax(-1)
        nats.append(-sum(logs[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)))
        tokens.append(ids.shape[1] - 1)
    return nats, tokens


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_score_is_the_cross_entropy_of_the_checkpoint(models, output, settings, name):
    records = scored(output, name, settings)
    nats, tokens = exact_nats(models / name)
    assert max(tokens) < 32  # one window a text
    assert value(records, "cross_entropy") == pytest.approx(sum(nats) / sum(tokens), rel=1e-6)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert value(records, "bits_per_byte") == pytest.approx(
        sum(nats) / num_bytes / math.log(2), rel=1e-6
    )
    rows = read_rows(find_run(output, name).documents)
    assert [row["nats"] for row in rows] == pytest.approx(nats, rel=1e-6)
    assert [row["tokens"] for row in rows] == tokens


def test_records_say_what_was_scored_and_nothing_else_is_left(output, settings):
    records = scored(output, "small", settings)
    run = find_run(output, "small")
    assert read_records([run.score]) == records
    for record in records:
        assert record.labels["run"] == record.model == "small"
        assert record.labels["label"] == "emo1" and record.settings["iteration"] == STEPS
        assert record.data == {"held_out.jsonl": hash_file(output / "held_out.jsonl")}
        assert record.model_sha256 and record.provenance["commit"]
    assert not run.exported.exists()
    scored(output, "small", replace(settings, keep=True))
    assert (run.exported / "config.json").exists()


def test_what_is_scored_is_scored_once(output, settings):
    run = find_run(output, "small")
    recipe = settings.recipe(run, "text")
    assert read_score(run, recipe) is None
    sha = hash_file(settings.held_out)
    records = score_run(run, settings)
    assert read_score(run, settings.recipe(run, sha)) == records
    for other in (replace(settings, window=16), replace(settings, limit=2)):
        assert read_score(run, other.recipe(run, sha)) is None
    assert read_score(run, settings.recipe(run, "other text")) is None
    assert read_score(run, settings.recipe(replace(run, hash="other"), sha)) is None
    run.documents.unlink()
    assert read_score(run, settings.recipe(run, sha)) is None


def test_another_checkpoint_is_scored_again_and_a_lost_one_is_not(models, output, settings):
    run = find_run(output, "small")
    records = score_run(run, settings)
    sha = hash_file(settings.held_out)
    run.checkpoints.unlink()
    assert read_score(run, settings.recipe(run, sha)) == records
    with pytest.raises(ValueError, match="^small: "):
        score_run(run, settings)
    run.checkpoints.symlink_to(models / "large-checkpoints")
    assert read_score(run, settings.recipe(run, sha)) is None
    again = score_run(run, settings)
    assert value(again, "cross_entropy") != value(records, "cross_entropy")


def test_a_score_that_was_cut_off_is_gone_on_with(output, settings, monkeypatch):
    run = find_run(output, "small")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_emo.evaluation.perplexity.perplexity_records", stop)
        with pytest.raises(KeyboardInterrupt):
            score_run(run, settings)
    assert run.documents.exists() and not run.score.exists()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_emo.evaluation.perplexity.sum_nats", stop)
        records = score_run(run, settings)
    assert value(records, "cross_entropy") > 0
    # Rows of other settings are no rows of these.
    other = score_run(run, replace(settings, window=3, stride=1))
    assert value(other, "cross_entropy") != value(records, "cross_entropy")


def test_a_model_that_is_not_finite_has_no_score(models, output, settings, tmp_path, monkeypatch):
    from megatron_emo.evaluation import perplexity

    whole = perplexity.sum_nats
    monkeypatch.setattr(perplexity, "sum_nats", lambda *a, **k: whole(*a, **k) * math.nan)
    with pytest.raises(ValueError, match="^small: .*finite"):
        scored(output, "small", settings)
    assert not find_run(output, "small").score.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash": "x"}, "hash: expected 'hash-a', found 'x'"),
        ({"iteration": 99}, "iteration: expected 100, found 99"),
        ({"tokens": 6399}, "tokens: expected 6400, found 6399"),
        ({"gpu_hours": 0.0}, "gpu_hours: expected above 0, got 0.0"),
    ],
)
def test_a_result_that_is_not_the_runs_own_does_not_count(tmp_path, changes, message):
    entry = make_entry("a")
    finish(tmp_path, entry, **changes)
    with pytest.raises(Unfinished, match=message):
        read_finished(tmp_path, entry)


def test_a_run_without_a_result_is_named_with_its_state(tmp_path):
    entry = make_entry("a")
    with pytest.raises(Unfinished, match=r"^a: no result.json \(planned\)"):
        read_finished(tmp_path, entry)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "state.json").write_text('{"state": "failed"}')
    with pytest.raises(Unfinished, match=r"^a: no result.json \(failed\)"):
        read_finished(tmp_path, entry)


@pytest.fixture
def table(tmp_path):
    """runs.csv of 3 budgets x 4 sizes x 2 objectives on a known surface, emo1 0.02 above mle."""
    truth = Surface(E=1.7, A=40.0, B=60.0, alpha=0.35, beta=0.4)
    rows = []
    rng = np.random.default_rng(0)
    for budget in (1e12, 3e12, 9e12):
        for size in np.geomspace(0.4, 2.5, 4) * truth.optimum(budget)[0]:
            for label, extra in (("mle", 0.0), ("emo1", 0.02)):
                tokens = round(budget / 6 / size)
                numbers = {"params": round(size), "flops": round(6 * size * tokens)}
                numbers |= {"loss_flops": 10 * tokens * (label == "emo1")}
                numbers |= {"non_embedding": round(size / 2), "flops_6nd": round(budget)}
                name = f"{label}_{len(rows)}"
                entry = make_entry(name, label=label, budget=budget, tokens=tokens, **numbers)
                finish(tmp_path, entry)
                run = read_finished(tmp_path, entry)
                loss = truth.loss(size, tokens) + extra
                spread = rng.normal(0, 0.01, 5)
                documents = [
                    {"id": i, "sha256": "x", "tokens": 10, "nats": 10 * (loss + d - spread.mean())}
                    for i, d in enumerate(spread)
                ]
                run.documents.write_text("".join(json.dumps(row) + "\n" for row in documents))
                records = [
                    Record("cross_entropy", float(loss), "nats/token", "", 50),
                    Record("bits_per_byte", float(loss) / 2, "bits/byte", "", 50),
                ]
                rows.append(make_row(run, records, tmp_path))
    write_table(tmp_path / "runs.csv", rows)
    return tmp_path / "runs.csv", truth


def run_command(module, add_arguments, flags):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return module.run(parser.parse_args(list(map(str, flags))))


def test_fit_takes_the_table_as_it_is(table):
    from megatron_emo.scaling.laws import fit_command

    path, truth = table
    with_budgets, without = (fit_columns([{"budget": budget}]) for budget in (1e12, ""))
    assert with_budgets == without + ",budget=budget"
    for columns in (without, with_budgets, "params=params,tokens=tokens,loss=loss"):
        flags = ("--csv", path, "--columns", columns, "--where", "label=mle")
        law = run_command(fit_command, add_fit_arguments, (*flags, "--approach", "vpnls"))
        assert law["E"] == pytest.approx(truth.E, abs=1e-4) and law["n"] == 12


def test_compare_takes_the_table_as_it_is(table):
    from megatron_emo.scaling.comparison import compare_command

    path, _ = table
    columns = compare_columns([{"budget": 1e12}])
    flags = ("--csv", path, "--columns", columns, "--bootstrap", 20)
    found = run_command(compare_command, compare_command.add_arguments, flags)
    [emo] = found["objectives"]
    assert emo["n"] == 12 and not emo["unpaired_lines"]
    assert emo["pairs"]["difference_tokens"] == pytest.approx([0.02] * 12, abs=1e-6)


@pytest.mark.slow
def test_several_at_once_score_as_one_does(output, settings):
    from megatron_emo.scaling.running.score_command import _score_each

    runs = [find_run(output, name) for name in ("small", "large")]
    alone = {name: records for name, records, error in _score_each(runs, settings, 1)}
    for run in runs:
        run.score.unlink()
        run.documents.unlink()
    together = {name: records for name, records, error in _score_each(runs, settings, 2)}
    for name, records in alone.items():
        pairs = zip(records, together[name], strict=True)
        assert all((a.metric, a.value) == (b.metric, b.value) for a, b in pairs)


ORPHAN = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from megatron_emo.scaling.running.score_command import _begin_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin_worker, initargs=(1,))
    print(pool.submit(os.getpid).result(), flush=True)
    signal.pause()
"""


@pytest.mark.slow
def test_a_worker_does_not_outlive_a_killed_command(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        worker = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    ended = select.poll()
    ended.register(worker, select.POLLIN)
    assert ended.poll(30_000)
    os.close(worker)
