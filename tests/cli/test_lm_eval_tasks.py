"""lm-eval, offline, on the tasks that --write-lm-eval wrote: an independent second opinion.

One process for all tasks: without shots, with the first shots, and a task in groups with a
preamble. Log-probabilities and accuracy must be ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from icl_models import save_with_tokenizer

from megatron_emo.evaluation.records import read_records

pytest.importorskip("lm_eval")

FILM = """\
name: {name}
format: jsonl
files: {{train: train.jsonl, test: test.jsonl}}
columns: {{text: sentence, label: y}}
labels: {{1: good, 0: quite bad}}
template: 'Review: "{{text}}" It is {{label}}.'
shots: {shots}
retriever: first
"""
QUIZ = """\
name: quiz
format: csv
files: {train: "*_dev.csv", test: "*_test.csv"}
columns: {text: question, label: answer}
choices: [a, b, c]
preamble: "About {group}, {{so}} it is.\\n\\n"
template: "{text}\\nAnswer: {label} ({a})"
separator: "\\n\\n"
shots: 1
retriever: first
within_group: true
"""
TASKS = ("zero", "two", "quiz")


def write_tasks(folder) -> None:
    for split, size in (("train", 3), ("test", 6)):
        rows = [{"sentence": f"{i} film is {'so' * (i % 3)} é", "y": i % 2} for i in range(size)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    for name, shots in (("zero", 0), ("two", 2)):
        (folder / f"{name}.yaml").write_text(FILM.format(name=name, shots=shots))
    for group, size in (("world_news", 3), ("sports", 2)):
        for split, count in (("dev", 1), ("test", size)):
            rows = [f'"what, {i}?",good {i},the bad,a film,{i % 3}' for i in range(count)]
            text = "\n".join(["question,a,b,c,answer", *rows]) + "\n"
            (folder / f"{group}_{split}.csv").write_text(text)
    (folder / "quiz.yaml").write_text(QUIZ)


def run_lm_eval(model: str, folder) -> dict[str, list[dict]]:
    """Return lm-eval's samples by task, and its results under "results"."""
    names = ",".join(f"megatron_emo_{name}" for name in TASKS)
    flags = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    flags += ["--include_path", str(folder / "lm"), "--tasks", names, "--device", "cpu"]
    flags += ["--batch_size", "4", "--output_path", str(folder / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lm_eval", *flags],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = {}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_megatron_emo_").rsplit("_", 1)[0]
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    [results] = (folder / "out").rglob("results_*.json")
    return found | {"results": json.loads(results.read_text())["results"]}


@pytest.mark.slow
def test_lm_eval_finds_the_same_log_probabilities(load_tool, tmp_path, capsys):
    write_tasks(tmp_path)
    model = str(save_with_tokenizer("llama", tmp_path / "model"))
    evaluate = load_tool("evaluate").main
    ours, accuracy = {}, {}
    for name in TASKS:
        task = ["icl", "--task", str(tmp_path / f"{name}.yaml")]
        evaluate([*task, "--write-lm-eval", str(tmp_path / "lm")])
        kept, out = tmp_path / f"{name}.answers", tmp_path / f"{name}.json"
        flags = ["--predictions", str(kept), "--scoring", "label", "--json", str(out)]
        evaluate([*task, "--model", model, *flags])
        ours[name] = [json.loads(line) for line in kept.read_text().splitlines()]
        accuracy[name] = read_records([out])[0].value
    assert f"{tmp_path}/lm/megatron_emo_quiz_sports.yaml" in capsys.readouterr().out
    theirs = run_lm_eval(model, tmp_path)
    theirs["quiz"] = theirs.pop("quiz_sports") + theirs.pop("quiz_world_news")
    for name in TASKS:
        assert len(theirs[name]) == len(ours[name]) > 0
        for their, our in zip(theirs[name], ours[name], strict=True):
            found = [float(answer[0][0]) for answer in their["resps"]]
            np.testing.assert_allclose(our["label"], found, rtol=1e-5)
            assert our["gold"] == int(their["target"])
        mean = np.mean([their["acc"] for their in theirs[name]])
        assert mean == pytest.approx(accuracy[name])
        reported = theirs["results"][f"megatron_emo_{name}"]["acc,none"]
        assert reported == pytest.approx(accuracy[name])
