"""The calibration study: sentences, commands, paired differences against scipy and by hand."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from megatron_emo.evaluation.icl import Answer
from megatron_emo.evaluation.records import Interval, Record, read_records, write_records
from megatron_emo.study.calibration import measure as measuring
from megatron_emo.study.calibration.command import describe, parse_numbers
from megatron_emo.study.calibration.cost import Cost, count_parameters
from megatron_emo.study.calibration.paired import compare_answers, compare_nats, mcnemar
from megatron_emo.study.calibration.plan import Measures, Study, Training, count_iters, study_tasks
from megatron_emo.study.calibration.summary import write_summary
from megatron_emo.study.calibration.texts import (
    choose_documents,
    parse_named_files,
    read_files,
    split_sentences,
    take_sentences,
)
from megatron_emo.study.tasks import order_tasks

WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "text" / "wikitext103"


@pytest.mark.parametrize(
    ("text", "apart", "expected"),
    [
        ("He left. She stayed!", False, ["He left.", "She stayed!"]),
        ("At 3.5 m, e.g. here. 12 came.", False, ["At 3.5 m, e.g. here.", "12 came."]),
        ("“Go.” He went (far.) Then?", False, ["“Go.”", "He went (far.)", "Then?"]),
        ("The U.S. Army left . It won .", True, ["The U.S. Army left .", "It won ."]),
        ('He said " no . " She did .', True, ['He said " no .', '" She did .']),
        ('He said " no . "', True, ['He said " no . "']),
        ("no end", False, ["no end"]),
        ("  ", False, []),
    ],
)
def test_sentences(text, apart, expected):
    assert split_sentences(text, apart) == expected


def test_documents_end_with_the_last_sentence():
    groups = [["One. Two.", "Three."], ["Four. Five."], ["Six."]]
    assert take_sentences(groups, 4) == ["One. Two.\nThree.", "Four."]
    assert take_sentences(groups, 6)[-1] == "Six."
    with pytest.raises(ValueError, match=r"--text has 6, expected 7; pass --sentences 6"):
        take_sentences(groups, 7)
    with pytest.raises(ValueError, match="--sentences: expected at least 1, got 0"):
        take_sentences(groups, 0)


def test_punctuation_of_a_document_is_looked_at_as_a_whole():
    """A heading-like paragraph without a full stop is one sentence in a tokenised text."""
    assert take_sentences([["U.S. Route 45", "It ends . Here ."]], 3) == [
        "U.S. Route 45\nIt ends . Here ."
    ]


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-103 is absent")
def test_wikitext_has_sentences_enough():
    groups = read_files([WIKITEXT / "wiki.valid.tokens"])
    documents = take_sentences(groups, 8000)
    assert len(documents) == 60
    assert not any(line.startswith("= ") for text in documents for line in text.split("\n"))


def test_measured_documents_were_not_trained_on():
    groups = [["seen before", "new one"], ["new two"], ["word"]]
    trained = ["x\nseen   before"]
    chosen = choose_documents(groups, trained, None)
    assert sorted(chosen) == ["new one", "new two"]
    assert choose_documents(groups, trained, 1) == chosen[:1]
    with pytest.raises(ValueError, match="--eval: expected documents beside those trained on"):
        choose_documents([["seen before"]], trained, None)


def test_named_files_and_numbers(tmp_path):
    (tmp_path / "a").touch()
    assert parse_named_files("--eval", [f"x={tmp_path / 'a'}"]) == {"x": tmp_path / "a"}
    for text, message in (("a", "NAME=FILE, got 'a'"), (f"x={tmp_path}/b", "no such file")):
        with pytest.raises(ValueError, match=f"--eval.*{message}"):
            parse_named_files("--eval", [text])
    assert parse_numbers("--limit", ["5", "mmlu=3"]) == {"": 5, "mmlu": 3}
    with pytest.raises(ValueError, match=r"--limit: expected \[TASK=\]N, got 'mmlu=-3'"):
        parse_numbers("--limit", ["mmlu=-3"])


@pytest.mark.parametrize("counts", [(0, 0), (0, 6), (3, 3), (9, 2), (40, 61), (900, 1001)])
def test_mcnemar_is_scipys_binomial_test(counts):
    a, b = counts
    expected = scipy.stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def write_answers(path: Path, right: list[bool], questions: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, is_right in enumerate(right):
        scores = [1.0, 2.0] if is_right else [2.0, 1.0]
        values = {"question": (questions or range(len(right)))[i], "gold": 0, "shots": []}
        values |= {"ppl": scores, "label": [-s for s in scores], "label_mean": scores}
        rows.append(
            dataclasses.asdict(Answer(**values, shots_dropped=0, tokens_cut=0, seconds=0.0))
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_documents(path: Path, nats: list[float], tokens: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": i, "sha256": str(i), "nats": n, "tokens": t, "words": t, "bytes": 3 * t}
        for i, (n, t) in enumerate(zip(nats, tokens, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_compared_question_by_question(tmp_path):
    rng = np.random.default_rng(0)
    right = rng.random((4, 50)) < 0.6
    paths = [write_answers(tmp_path / str(i), row.tolist()) for i, row in enumerate(right)]
    record = compare_answers({"1": (paths[0], paths[1]), "2": (paths[2], paths[3])}, "ppl", {})
    a, b, c, d = right.astype(int)
    assert record.value == pytest.approx(((a - b) + (c - d)).mean() / 2)
    assert record.settings["values"]["2"] == pytest.approx((c - d).mean())
    assert record.settings["only_a"]["1"] == ((a == 1) & (b == 0)).sum()
    only = ((c == 1) & (d == 0)).sum(), ((c == 0) & (d == 1)).sum()
    assert record.settings["mcnemar_p"]["2"] == pytest.approx(
        scipy.stats.binomtest(only[0], sum(only)).pvalue
    )
    # The normal approximation of a paired mean.
    half = 1.96 * ((a - b + c - d) / 2).std() / 50**0.5
    assert record.interval.low == pytest.approx(record.value - half, abs=0.03)
    assert record.interval.high == pytest.approx(record.value + half, abs=0.03)
    # label_mean is of the other sign: who is right is wrong.
    mean = compare_answers({"1": (paths[0], paths[1])}, "label-mean", {})
    assert mean.value == pytest.approx((b - a).mean())
    other = write_answers(tmp_path / "x", [True] * 50, list(range(1, 51)))
    with pytest.raises(ValueError, match="expected the questions of"):
        compare_answers({"1": (paths[0], other)}, "ppl", {})
    with pytest.raises(ValueError, match="pairs"):
        compare_answers({}, "ppl", {})


def test_nats_are_compared_document_by_document(tmp_path):
    tokens = [10, 20, 30]
    a = write_documents(tmp_path / "a", [12.0, 25.0, 30.0], tokens)
    b = write_documents(tmp_path / "b", [10.0, 20.0, 33.0], tokens)
    record = compare_nats({"1": (a, b), "2": (b, b)}, {})
    assert record.value == pytest.approx((2 + 5 - 3) / 60 / 2)
    assert record.settings["values"] == {"1": pytest.approx(4 / 60), "2": 0.0}
    assert record.interval.low <= record.value <= record.interval.high
    c = write_documents(tmp_path / "c", [10.0, 20.0, 33.0], [10, 20, 31])
    with pytest.raises(ValueError, match="expected the documents of"):
        compare_nats({"1": (a, c)}, {})


@pytest.fixture
def study(tmp_path) -> Study:
    """256 x 4 x 2 + 1 + 7 tokens: two batches and a rest."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("train.txt", "other.txt"):
        (tmp_path / name).touch()
    measures = Measures(
        ("sst2", "mmlu"), tmp_path, {"other": tmp_path / "other.txt"}, 5, {"": 9, "mmlu": 4}
    )
    study = Study(
        tmp_path / "model",
        tmp_path / "out",
        (tmp_path / "train.txt",),
        100,
        measures,
        Training(batch_size=4),
        seeds=(1, 2),
        cost=Cost(134.5e6),
    )
    write_tokens(study.prefix, 256 * 4 * 2 + 8)
    return study


def write_tokens(prefix: Path, number: int) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 8))
    Path(f"{prefix}.bin").write_bytes(bytes(2 * number))


def test_one_epoch_of_whole_batches(study):
    assert count_iters(study) == 2
    write_tokens(study.prefix, 256 * 4)
    with pytest.raises(ValueError, match="--sentences: 100 make 1,024 tokens, expected more than"):
        count_iters(study)


def test_objectives_differ_in_the_objective_alone(study):
    commands = {task.name: task.command for task in order_tasks(study_tasks(study))}
    mle = " ".join(commands["train/mle/seed2"])
    emo = " ".join(commands["train/emo1/seed2"])
    assert mle != emo
    assert mle.replace("mle", "emo1") == emo
    other = " ".join(commands["train/mle/seed1"])
    assert other.replace("--seed 1 ", "--seed 2 ").replace("seed1", "seed2") == mle
    flags = mle.split()
    for flag, value in (("--train-iters", "2"), ("--lr", "2e-05"), ("--weight-decay", "0.0")):
        assert flags[flags.index(flag) + 1] == value
    assert flags[flags.index("--load") + 1] == flags[flags.index("--save") + 1]


def test_every_model_is_asked_the_same(study):
    tasks = [t for t in study_tasks(study) if t.name.startswith("measure/")]
    assert len(tasks) == 5 * 3
    asked = {}
    for task in tasks:
        words = " ".join(task.command).split(" icl ")[-1].split(" perplexity ")[-1].split()
        model = words.index("--model")
        kept = words[:model] + words[model + 2 :]
        kept = [word for word in kept if not word.startswith(("objective=", "seed="))]
        asked.setdefault(task.name.rsplit("/", 1)[1], set()).add(
            " ".join(kept[: kept.index("--label")])
        )
    assert all(len(ways) == 1 for ways in asked.values()), asked
    assert "--limit 9" in next(iter(asked["sst2"])) and "--limit 4" in next(iter(asked["mmlu"]))
    assert all(task.seconds for task in tasks)


def test_the_estimate_is_the_sum_over_the_threads(study):
    tasks = study_tasks(study)
    line, estimate = describe(study, tasks, 2).split("\n")
    assert line == "100 sentences, 2,056 tokens: 2 iterations of 4 x 256 for each of 4 trainings"
    # Two iterations of 1,024 tokens at 70 a second, four times; all else is smaller.
    seconds = sum(task.seconds or 0 for task in tasks)
    assert seconds > 4 * 2048 / 70
    assert f"about {seconds / 120:.0f} min for all of it on 2 free cores" in estimate
    unknown = dataclasses.replace(study, cost=None)
    assert "once the first tasks are done" in describe(unknown, study_tasks(unknown), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("emo1",)}, "--objectives: expected mle, and any of"),
        ({"objectives": ("mle", "emo3")}, "--objectives"),
        ({"seeds": (1, 1)}, "--seeds: expected different numbers from 1 on"),
        ({"seeds": (0,)}, "--seeds"),
        ({"gpus": 3, "tensor_parallel": 2}, "--gpus: expected a multiple of --tensor-parallel 2"),
        ({"tensor_parallel": 0}, "--gpus: expected a multiple of --tensor-parallel 0"),
        ({"gpus": 8}, "--batch: expected a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_refused(study, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(study, **changes)


def test_tasks_are_known_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="sst3"):
        Measures(("sst3",), tmp_path, {}, None)
    with pytest.raises(ValueError, match="--limit: expected tasks of sst2, got 'mmlu'"):
        Measures(("sst2",), tmp_path, {}, None, {"": 5, "mmlu": 4})


def test_graphics_cards_train_in_bf16(study):
    study = dataclasses.replace(study, gpus=2, tensor_parallel=2)
    commands = {task.name: " ".join(task.command) for task in study_tasks(study)}
    train = commands["train/mle/seed1"]
    assert " --bf16" in train and "--nproc-per-node 2" in train
    assert "--tensor-model-parallel-size 2" in train
    # What bf16 training changed is in its fp32 masters: they are exported, and measured.
    assert "--dtype float32" in commands["export/mle/seed1"]
    assert "--dtype float32" in commands["measure/untouched/sst2"]


def test_another_learning_rate_does_not_go_on_from_these_weights(study):
    train = next(task for task in study_tasks(study) if task.name == "train/mle/seed1")
    assert train.resumes == (study.cell("mle", 1) / "checkpoints",)
    assert str(train.resumes[0]) in train.command


def test_a_measurement_goes_on_only_with_its_own_answers(tmp_path, monkeypatch):
    model, calls = tmp_path / "model", []
    model.mkdir()
    (model / "config.json").write_text("{}")

    def cut_off(args):
        calls.append(Path(args.per_document))
        calls[-1].with_name(calls[-1].name + ".part").write_text("half")
        raise KeyboardInterrupt

    def finish(args):
        assert args.resume
        calls.append(Path(args.per_document))
        calls[-1].write_text("whole")
        calls[-1].with_name(calls[-1].name + ".recipe.json").write_text("{}")
        return []

    words = ["perplexity", "--model", str(model), "--texts", "t.jsonl"]
    answers = tmp_path / "answers" / "t.jsonl"
    monkeypatch.setattr(measuring, "run_command", cut_off)
    for config in ("{}", '{"a": 1}'):
        (model / "config.json").write_text(config)
        with pytest.raises(KeyboardInterrupt):
            measuring.measure(words, tmp_path / "t.json", answers)
    assert len(list(answers.parent.iterdir())) == 1, "another model's half is dropped"
    monkeypatch.setattr(measuring, "run_command", finish)
    calls[-1].with_name(calls[-1].name + ".part").unlink()
    measuring.measure(words, tmp_path / "t.json", answers)
    assert calls[0] != calls[1] == calls[2]
    names = {path.name for path in answers.parent.iterdir()}
    assert names == {"t.jsonl", "t.jsonl.recipe.json"} and answers.read_text() == "whole"


def make_cell(cells: Path, objective: str, seed: str | None, right: list[bool], nats: float):
    cell = cells / objective / f"seed{seed}" if seed else cells / objective
    labels = {"objective": objective} | ({"seed": seed} if seed else {})
    asked = {**labels, "task": "sst2", "scoring": "ppl"}
    share, n = sum(right) / len(right), len(right)
    between = Interval(share - 0.01, share + 0.01)
    write_records(
        cell / "sst2.json",
        [
            Record("accuracy", share, "1", "d", n, interval=between, labels=asked),
            Record("accuracy_majority", 0.55, "1", "d", n, labels={**labels, "task": "sst2"}),
            Record("accuracy_random", 0.5, "1", "d", n, labels={**labels, "task": "sst2"}),
        ],
    )
    value = float(np.exp(nats))
    text = Record("token_perplexity", value, "1", "d", 40, labels={**labels, "text": "wiki"})
    write_records(cell / "wiki.json", [text])
    write_answers(cell / "answers" / "sst2.jsonl", right)
    write_documents(cell / "answers" / "wiki.jsonl", [20 * nats] * 2, [20, 20])


def test_the_table_and_its_verdicts(tmp_path):
    half = [True] * 20 + [False] * 20
    make_cell(tmp_path / "cells", "untouched", None, half, 3.0)
    for seed in ("1", "2"):
        make_cell(tmp_path / "cells", "mle", seed, half, 2.0)
        make_cell(tmp_path / "cells", "emo1", seed, [True] * 40, 2.5)
    table = write_summary(tmp_path / "cells", tmp_path / "results")
    (accuracies,) = [line for line in table.split("\n") if line.startswith("| sst2")]
    cells = [cell.strip() for cell in accuracies.strip("|").split("|")]
    assert cells[:5] == ["sst2", "40", "50.0", "55.0", "50.0 [49.0, 51.0]"]
    assert cells[5] == "50.0 [50.0, 50.0]" and cells[6] == "100.0 [100.0, 100.0]"
    assert cells[7].startswith("+50.0 [") and cells[7].endswith("p 1.9e-06, 1.9e-06")
    (texts,) = [line for line in table.split("\n") if line.startswith("| wiki")]
    assert "| 7.39 " in texts and "+0.5000 [+0.5000, +0.5000]" in texts
    assert "- emo1 against mle: better on sst2 (ppl); worse on wiki; undecided on 0 of 2" in table
    assert "- mle against untouched: better on wiki; worse on none; undecided on 1 of 2" in table

    summary = read_records([tmp_path / "results" / "summary.json"])
    (mean,) = [
        r for r in summary if r.metric == "token_perplexity" and r.labels["objective"] == "mle"
    ]
    assert mean.n == 2 and mean.n_unit == "seeds" and "seed" not in mean.labels
    assert len(read_records([tmp_path / "results" / "records.json"])) == 5 * 4
    with pytest.raises(ValueError, match="expected models that are measured, found none"):
        write_summary(tmp_path / "none", tmp_path / "results")


def test_parameters_are_counted_in_the_headers(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2, 3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.ones(5)}, tmp_path / "y.safetensors")
    assert count_parameters(tmp_path) == 11
    assert count_parameters(tmp_path / "none") is None
    assert Cost(269e6).training(1000) > Cost(134.5e6).training(1000)
    assert Cost(1e6).questions("sst2", None) is None
