"""evaluate.py icl as a user runs it, on a tiny random model and a task of their own."""

from __future__ import annotations

import json

import pytest
from icl_models import save_with_tokenizer

from megatron_emo.evaluation.records import read_records

YAML = """\
name: mine
format: jsonl
files: {train: train.jsonl, test: test.jsonl}
columns: {text: sentence, label: y}
labels: {1: good, 0: quite bad}
template: 'Review: "{text}" It is {label}.'
shots: 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_with_tokenizer("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture
def task(tmp_path) -> str:
    for split, size in (("train", 6), ("test", 8)):
        rows = [{"sentence": f"film {i} is {'so' * (i % 3)}", "y": i % 2} for i in range(size)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    (tmp_path / "mine.yaml").write_text(YAML)
    return str(tmp_path / "mine.yaml")


@pytest.fixture
def icl(load_tool):
    return lambda *flags: load_tool("evaluate").main(["icl", *flags])


def test_records_are_written_and_printed(icl, model, task, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--scoring", "ppl,label,label-mean", "--label", "objective=emo1", "--json", str(out)]
    icl("--model", model, "--task", task, *flags)
    records = read_records([out])
    assert [r.metric for r in records] == ["accuracy", "macro_f1"] * 3 + [
        "accuracy_majority",
        "accuracy_random",
    ]
    first = records[0]
    assert first.labels == {"scoring": "ppl", "task": "mine", "objective": "emo1"}
    assert set(first.data) == {"train.jsonl", "test.jsonl"}
    assert first.settings["shots"] == 2 and first.settings["retriever"] == "topk"
    assert first.n == 8 and first.interval.method == "wilson" and first.model_sha256
    assert capsys.readouterr().out.count("accuracy") == 5


def test_predictions_are_kept_and_gone_on_with(icl, model, task, tmp_path):
    answers, first, second = (tmp_path / name for name in ("a.jsonl", "1.json", "2.json"))
    flags = ["--model", model, "--task", task, "--predictions", str(answers), "--shots", "1"]
    icl(*flags, "--json", str(first))
    lines = answers.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    answers.write_text("".join(lines[:5]))
    icl(*flags, "--resume", "--json", str(second))
    values = [[record.value for record in read_records([path])] for path in (first, second)]
    assert values[0] == values[1]
    with pytest.raises(SystemExit, match=r"evaluate icl: --predictions .*: exists; --resume goes"):
        icl(*flags)
    with pytest.raises(SystemExit, match="has seed 0, expected 1"):
        icl(*flags, "--resume", "--seed", "1")
    icl(*flags, "--overwrite", "--seed", "1")
    assert answers.read_text() != "".join(lines) and len(answers.read_text().splitlines()) == 8


def test_a_limit_an_encoder_and_other_shots(icl, model, task, tmp_path):
    out = tmp_path / "out.json"
    flags = ["--model", model, "--task", task, "--limit", "3", "--json", str(out)]
    icl(*flags, "--encoder", model, "--order", "nearest-last")
    record = read_records([out])[0]
    assert record.n == 3
    assert record.settings["features"] == record.model_sha256
    icl(*flags, "--retriever", "random", "--max-length", "60")
    record = read_records([out])[0]
    assert record.settings["max_length"] == 60 and record.settings["num_shots_dropped"] > 0


def test_what_cannot_be_used_is_named(icl, model, task, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_EMO_EVAL_DATA", raising=False)
    for flags, message in (
        (["--task", task], "--model: expected a Hugging Face folder, got none"),
        (["--task", "sst3"], r"--task: expected a \.yaml file or one of ag_news"),
        (["--task", "sst2"], "--data: expected the folder"),
        (["--task", "sst2", "--data", str(tmp_path)], r"stsa\.binary\.train: no such file"),
        (["--task", task, "--scoring", "f1"], "--scoring: expected any of ppl, label, label-mean"),
        (["--task", task, "--model", "nowhere"], "--model nowhere"),
        (["--task", task, "--model", model, "--shots", "7"], "--shots: expected at most 6"),
        (["--task", task, "--model", model, "--resume"], "--resume: expected --predictions"),
        (["--task", task, "--model", model, "--overwrite"], "--overwrite: expected --predictions"),
        (["--task", str(tmp_path / "no.yaml")], r"no\.yaml"),
    ):
        with pytest.raises(SystemExit, match=message):
            icl(*flags)


def test_help_names_tasks_and_defaults(icl, capsys):
    with pytest.raises(SystemExit) as stop:
        icl("--help")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tools/evaluate.py icl --model smollm2/ --task sst2" in said
    for name in ("tweet_emotion", "mmlu_text", "default: ppl,label", "MEGATRON_EMO_EVAL_DATA"):
        assert name in said
