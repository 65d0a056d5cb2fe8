"""examples/calibration: a tiny random model through every step, cut off and gone on with."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from icl_models import save_with_tokenizer

from megatron_emo.evaluation.icl import read_answers
from megatron_emo.evaluation.records import read_records
from megatron_emo.study.calibration.plan import count_tokens

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "calibration" / "run.py"
WORDS = "the film is so good and so bad about world sports review it".split()
BLOCK, BATCH = 16, 2


def sentences(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=6)).capitalize()}." for _ in range(number)]


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("calibration")
    save_with_tokenizer("llama-tied", folder / "model")
    (folder / "train.txt").write_text("\n".join(sentences(40, 0)))
    (folder / "other.txt").write_text("\n".join(sentences(6, 1)))
    task = {
        "name": "tiny",
        "template": "Review: {text} It is {label}.",
        "format": "label-text",
        "files": {"train": "train.tsv", "test": "test.tsv"},
        "labels": {"0": "bad", "1": "good"},
        "shots": 1,
    }
    (folder / "own-task.yaml").write_text(yaml.safe_dump(task))
    for name, seed in (("train", 2), ("test", 3)):
        rows = [f"{i % 2} {text}" for i, text in enumerate(sentences(8, seed))]
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return [
        *("--output", str(folder / "out"), "--model", str(folder / "model")),
        *("--text", str(folder / "train.txt"), "--eval", f"other={folder / 'other.txt'}"),
        *("--tasks", str(folder / "own-task.yaml"), "--task-data", str(folder)),
        *("--block", str(BLOCK), "--batch", str(BATCH), "--micro-batch", "1", "--lr", "1e-2"),
        *("--save-interval", "2", "--gpus", "0", "--threads", "1"),
    ]


def run(argv: list[str], *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), *argv, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objectives", "emo1"], "--objectives: expected mle, and any of"),
        (["--model", "nowhere"], "expected a folder with config.json"),
        (["--limit", "tiny=many"], r"--limit: expected \[TASK=\]N, got 'tiny=many'"),
        (["--batch", "3", "--micro-batch", "2"], "--batch: expected a multiple of 2"),
        (["--tasks", "sst3"], "sst3"),
        (["--seeds", "1,x"], "--seeds: expected numbers, got '1,x'"),
    ],
)
def test_mistakes_end_in_one_line_and_make_nothing(argv, words, message):
    spec = importlib.util.spec_from_file_location("calibration_run", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match=f"^calibration: .*{message}") as caught:
        module.main([*argv, *words])
    assert "\n" not in str(caught.value)
    assert not Path(argv[argv.index("--output") + 1]).exists()


@pytest.mark.slow
def test_from_a_model_to_a_table(argv):
    too_many = run(argv, "--sentences", "41")
    assert too_many.returncode == 1
    assert "--sentences: --text has 40, expected 41" in too_many.stderr

    # Each training ends early once; the same command goes on with it.
    argv = [*argv, "--sentences", "40", "--megatron-args=--exit-interval 7"]
    output = Path(argv[argv.index("--output") + 1])
    cut_off = run(argv)
    assert cut_off.returncode == 1
    assert "train/mle/seed100: ended with 0 without making" in cut_off.stderr
    again = run(argv)
    assert again.returncode == 1
    assert "train/emo1/seed100: ended with 0 without making" in again.stderr
    assert first_iteration(output, "mle") == 8, "goes on from its last checkpoint"

    result = run(argv)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert first_iteration(output, "emo1") == 8
    table = (output / "results" / "table.md").read_text()
    assert result.stdout.endswith(table + "\n")
    assert "40 sentences" in result.stdout and "how long" not in result.stdout

    # One epoch: the iterations that the tokens fill.
    tokens = count_tokens(output / "data" / "train_text_document")
    iters = (tokens - 1) // BLOCK // BATCH
    for objective in ("mle", "emo1"):
        tracker = output / "cells" / objective / "seed100" / "checkpoints"
        saved = (tracker / "latest_checkpointed_iteration.txt").read_text()
        assert int(saved) == iters > 2
        assert len(list(tracker.glob("iter_*"))) == 1, "only the last checkpoint is kept"
    check_records(output)

    # Nothing is left to do; one model's answers gone, they alone are made again.
    assert "15 of 15 tasks are done" in run(argv, "--dry-run").stdout
    (output / "cells" / "emo1" / "seed100" / "tiny.json").unlink()
    again = run(argv, "--dry-run").stdout
    assert "13 of 15 tasks are done" in again and "tiny.json is missing" in again


def first_iteration(output: Path, objective: str) -> int:
    log = (output / "log" / "train" / objective / "seed100.log").read_text()
    return min(int(found) for found in re.findall(r"iteration +(\d+)/ ", log))


def check_records(output: Path) -> None:
    records = read_records([output / "results" / "records.json"])
    models = {(r.labels["objective"], r.labels.get("seed")) for r in records}
    assert models == {("untouched", None), ("mle", "100"), ("emo1", "100")}
    assert len({r.model_sha256 for r in records}) == 3, "training changes the weights"
    assert all(r.model_sha256 for r in records)

    answers = {
        name: read_answers(output / "cells" / name / "answers" / "tiny.jsonl")
        for name in ("mle/seed100", "emo1/seed100")
    }
    right = {k: [a.predict("ppl") == a.gold for a in rows] for k, rows in answers.items()}
    expected = (sum(right["emo1/seed100"]) - sum(right["mle/seed100"])) / 8
    summary = read_records([output / "results" / "summary.json"])
    wanted = {"objective": "emo1", "minus": "mle", "task": "tiny", "scoring": "ppl"}
    (difference,) = [r for r in summary if wanted.items() <= r.labels.items()]
    assert difference.value == pytest.approx(expected) and difference.n == 8

    sources = json.loads((output / "data" / "sources.json").read_text())
    assert sources["sentences"] == 40 and set(sources["sha256"]) == {"train.txt", "other.txt"}
