"""`tools/scaling_study.py score`: which runs are scored, what is missing, the table in order."""

from __future__ import annotations

import csv
import json

import pytest

from megatron_emo.evaluation.records import Record, write_records
from megatron_emo.launch.run_result import RunResult, write_result
from megatron_emo.scaling.running import score_command

NAMES = ("b", "a", "c")


@pytest.fixture
def score(load_tool):
    return lambda *flags: load_tool("scaling_study").main(["score", *map(str, flags)])


def write_run(output, name):
    folder = output / "runs" / name
    folder.mkdir(parents=True)
    result = RunResult(name, f"h{name}", 10, 5, 40, 9.0, 0.1, 1, 1, "CPU", "mle", 3.0, {}, "")
    write_result(folder / "result.json", result)


@pytest.fixture
def output(tmp_path):
    """A study of three runs that are done."""
    plan = {"label": "mle", "objective": "mle", "seed": 1, "size": 8, "budget": None}
    plan |= {"params": 9, "non_embedding": 8, "tokens": 40, "flops": 700, "loss_flops": 70}
    plan |= {"flops_6nd": 600, "config": {"steps": 10}}
    entries = [{"name": n, "hash": f"h{n}", "index": i, **plan} for i, n in enumerate(NAMES)]
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("one\ntwo\n")
    data = {"path": ["train_text_document"], "held_out": str(held_out), "tokenizer_model": ""}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"format": 1, "data": data, "runs": entries})
    )
    for name in NAMES:
        write_run(tmp_path, name)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Names of the runs that were scored; a run without "bad" in its folder scores 2 nats."""
    called = []

    def score_run(run, settings):
        called.append(run.name)
        if (run.folder / "bad").exists():
            raise ValueError(f"{run.name}: no checkpoint")
        common = {"settings": {"scored": settings.recipe(run, "x")}, "seconds": 1.0}
        metrics = ("cross_entropy", "bits_per_byte", "token_perplexity", "byte_perplexity")
        records = [Record(metric, 2.0, "1", "", 5, **common) for metric in metrics]
        run.documents.write_text("")
        write_records(run.score, records)
        return records

    monkeypatch.setattr(score_command, "score_run", score_run)
    monkeypatch.setattr(score_command, "hash_held_out", lambda path: "x")
    return called


def read_table(output):
    with open(output / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_manifests_order_and_a_run_is_scored_once(score, output, calls, capsys):
    (output / "runs" / "a" / "bad").touch()
    with pytest.raises(SystemExit, match="1 of 3 planned runs are missing.*\n  a: no checkpoint"):
        score("--output", output)
    assert calls == list(NAMES) and not (output / "runs.csv").exists()
    (output / "runs" / "a" / "bad").unlink()
    score("--output", output)
    assert calls == [*NAMES, "a"]
    rows = read_table(output)
    assert [row["name"] for row in rows] == list(NAMES)
    assert rows[0] == {
        **{"name": "b", "label": "mle", "objective": "mle", "seed": "1", "size": "8"},
        **{"budget": "", "params": "9", "non_embedding": "8", "tokens": "40", "flops": "700"},
        **{"loss_flops": "70", "flops_6nd": "600", "flops_all": "770", "gpu_hours": "0.1"},
        **{"loss": "2.0", "bits_per_byte": "2.0", "documents": "runs/b/documents.jsonl"},
    }
    shown = capsys.readouterr().out
    assert "1 runs to score, 2 are scored" in shown
    assert "[1/1] a: 2.0000 nats/token" in shown and "s left" in shown


def test_a_run_that_is_not_done_is_an_error_before_anything_is_scored(score, output, calls):
    (output / "runs" / "c" / "result.json").unlink()
    with pytest.raises(SystemExit, match=r"(?s)1 of 3 .*--partial.*c: no result.json \(planned\)"):
        score("--output", output)
    assert not calls and not (output / "runs.csv").exists()


def test_a_partial_table_says_what_is_missing(score, output, calls, capsys):
    (output / "runs" / "c" / "result.json").unlink()
    (output / "runs" / "b" / "bad").touch()
    score("--output", output, "--partial")
    assert [row["name"] for row in read_table(output)] == ["a"]
    said = capsys.readouterr().err
    assert "2 of 3 planned runs are missing" in said
    assert "c: no result.json" in said and "b: no checkpoint" in said
    (output / "runs" / "a" / "bad").touch()
    (output / "runs" / "a" / "score.json").unlink()
    with pytest.raises(SystemExit, match="3 of 3"):
        score("--output", output, "--partial")
    assert [row["name"] for row in read_table(output)] == ["a"]


def test_two_scorings_do_not_meet(score, output, calls):
    with score_command._lock(output / ".score.lock"):
        with pytest.raises(SystemExit, match="another scoring is at work here"):
            score("--output", output)
    assert not calls


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", 0], "--jobs: expected at least 1, got 0"),
        (["--held-out", "none.txt"], "none.txt"),
        (["--limit", 0], "--limit: expected at least 1, got 0"),
    ],
)
def test_flags_out_of_range(score, output, calls, flags, message):
    with pytest.raises(SystemExit, match=message):
        score("--output", output, *flags)
    assert not calls


def test_the_text_that_was_trained_on_is_refused(score, output, calls, monkeypatch):
    monkeypatch.chdir(output)
    (output / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(SystemExit, match="expected a text that training does not see"):
        score("--output", output, "--held-out", "train.jsonl")
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["data"]["held_out"] = None
    (output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="--held-out: expected a file, or data.held_out"):
        score("--output", output)
    assert not calls


def test_a_folder_that_is_no_study(score, tmp_path):
    with pytest.raises(SystemExit, match="expected the folder of `run`"):
        score("--output", tmp_path)
