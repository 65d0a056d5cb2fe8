"""examples/language_modeling: its corpora, its plan, its table, and every step at toy size."""

from __future__ import annotations

import importlib.util
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_emo.evaluation.records import Record, read_records, write_records
from megatron_emo.study.language_modeling import corpora
from megatron_emo.study.language_modeling.plan import Study, count_tokens, data_tasks, study_tasks
from megatron_emo.study.language_modeling.sizes import OBJECTIVES, SIZES, grow
from megatron_emo.study.language_modeling.summary import summarise_all, write_summary
from megatron_emo.study.tasks import order_tasks

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"

needs_data = pytest.mark.skipif(
    not (DATA / "text" / "tinystories_944k.txt").exists(), reason="no ../shared/data"
)


@pytest.fixture(scope="module")
def main():
    path = ROOT / "examples" / "language_modeling" / "run.py"
    spec = importlib.util.spec_from_file_location("language_modeling_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_wikitext_falls_into_articles_of_paragraphs(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(
        " \n = One = \n \n First . \n = = Part = = \n Second . \n \n = Two = \n Third . \n"
    )
    assert corpora.read_wikitext(path) == [["First .", "Second ."], ["Third ."]]


def test_ag_news_joins_title_and_text(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text('"3","A title","Text, with\\a ""break"" ."\n')
    assert corpora.read_ag_news(path) == [['A title Text, with a "break" .']]
    path.write_text('"3","alone"\n')
    with pytest.raises(ValueError, match="row 1: expected class, title, text, got 2"):
        corpora.read_ag_news(path)


def test_stories_are_parted_by_single_line_ends(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("end of one.\nOne\n\nmore.\nTwo.<|endoftext|>Three.\nbegin of")
    assert corpora.read_tinystories(path) == [["One\n\nmore."], ["Two."], ["Three."]]


def test_books_lose_what_stands_around_them_and_nothing_else(tmp_path):
    sentences = [f"word{i} " * 60 + "end." for i in range(6)]
    inside = "\n".join(sentences)
    text = f"Title\n*** START OF THIS PROJECT X ***\n{inside}\nEnd of the Project Gutenberg EBook"
    (tmp_path / "book.txt").write_text(text)
    passages = [text for [text] in corpora.read_book(tmp_path / "book.txt")]
    # Three sentences of 61 words reach 150.
    assert passages == [
        " ".join(" ".join(sentences[:3]).split()),
        " ".join(" ".join(sentences[3:]).split()),
    ]


def test_a_text_is_in_one_split_alone():
    documents = {"train": ["a", "b", "b", "c  d"], "valid": ["a", "e"], "test": ["c d", "a", ""]}
    assert corpora.remove_overlap(documents) == {
        "train": ["b"],
        "valid": ["e"],
        "test": ["c d", "a"],
    }


@needs_data
@pytest.mark.parametrize("name", list(corpora.DOMAINS))
def test_real_domains_are_split_by_seed_without_overlap(name):
    splits = corpora.split_domain(name, DATA, 1)
    assert splits == corpora.split_domain(name, DATA, 1)
    texts = [text for part in splits.values() for text in part]
    assert len(texts) == len({" ".join(text.split()) for text in texts})
    train, valid, test = (len(splits[split]) for split in corpora.SPLITS)
    assert train > valid > 50 and test > 200
    assert not any("Gutenberg" in text for text in texts if name == "books")


@pytest.fixture
def study(tmp_path) -> Study:
    files = {}
    for name in ("one", "two"):
        files[name] = tuple(tmp_path / f"{name}.{split}.txt" for split in corpora.SPLITS)
        for path in files[name]:
            path.write_text("text\n")
    size = replace(SIZES["laptop"], domains=tuple(files), seeds=(1, 2))
    return Study(size, tmp_path / "out", tmp_path, files=files)


def flag(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_objectives_differ_in_nothing_but_the_objective(study):
    tasks = {task.name: task.command for task in study_tasks(study)}
    assert len(tasks) == 5 + 3 + 2 * 2 * 5 * 3 + 2 + 1
    order_tasks(study_tasks(study))
    for domain, seed in (("one", 1), ("two", 2)):
        commands = {o: list(tasks[f"{domain}/{o}/seed{seed}/train"]) for o in OBJECTIVES}
        for objective, command in commands.items():
            assert flag(command, "--objective") == objective
            assert flag(command, "--seed") == str(seed)
            command[command.index("--objective") + 1] = "X"
            for word in OBJECTIVES[objective]:
                command.remove(word)
            command[:] = [word.replace(f"/{objective}/", "/X/") for word in command]
        assert len({tuple(command) for command in commands.values()}) == 1
        assert flag(commands["emo1"], "--pretrained-checkpoint") == str(study.base_checkpoint)


def test_a_part_of_the_domains_has_the_base_of_all(study):
    whole = {task.name: task.command for task in study_tasks(study)}
    part = {task.name: task.command for task in study_tasks(replace(study, only=("two",)))}
    assert not [name for name in part if name.startswith("one/")]
    assert all(part[name] == whole[name] for name in part)
    assert {"base/train", "two/mle/seed1/train", "two/base/seed1/evaluate"} < set(part)


def test_epochs_become_steps_of_the_counted_tokens(study):
    prefix = study.prefix("one")
    prefix.parent.mkdir(parents=True)
    Path(f"{prefix}.bin").write_bytes(np.arange(1000, dtype=np.uint16).tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
    Path(f"{prefix}.idx").write_bytes(header)
    assert count_tokens(prefix) == 1000
    tuning = replace(study.size.tuning, iters=None, epochs=3.0, batch_size=2)
    size = replace(study.size, tuning=tuning, domains=("one",), seq_length=100)
    tasks = {task.name: task.command for task in study_tasks(replace(study, size=size))}
    assert flag(tasks["one/mle/seed1/train"], "--train-iters") == "15"
    Path(f"{prefix}.idx").write_bytes(b"something else, as long")
    with pytest.raises(ValueError, match="expected Megatron's indexed data set"):
        count_tokens(prefix)


def test_the_paper_size_takes_its_base_from_a_folder(study, tmp_path):
    size = replace(SIZES["paper"], domains=("one",))
    paper = replace(study, size=size, base_hf=tmp_path)
    assert [task.name for task in data_tasks(paper)] == ["data/texts", "data/tokens-one"]
    assert flag(data_tasks(paper)[1].command, "--tokenizer-model") == str(tmp_path)
    with pytest.raises(ValueError, match="--base: expected a Hugging Face folder"):
        replace(study, size=size)


def test_grow_multiplies_steps_and_texts():
    laptop, double = SIZES["laptop"], grow(SIZES["laptop"], 2)
    assert double.tuning.iters == 2 * laptop.tuning.iters
    assert double.num_prompts == 2 * laptop.num_prompts
    assert grow(SIZES["paper"], 3).tuning.epochs == 9
    with pytest.raises(ValueError, match="--grow: expected at least 1, got 0"):
        grow(laptop, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objectives", "emo1"], "--objectives: expected mle among them"),
        (["--objectives", "mle,kl"], "--objectives: expected some of .*, got 'kl'"),
        (["--domains", "mars"], "--domains: expected some of .*'mars'"),
        (["--only", "mars"], "--only: expected some of wikitext, .*'mars'"),
        (["--seeds", "1,x"], "--seeds: expected numbers, got '1,x'"),
        (["--seeds", "0"], "--seeds: expected numbers from 1 on"),
        (["--data", "a=b"], "--data: expected NAME=TRAIN,VALID,TEST, got 'a=b'"),
        (["--size", "paper"], "--domains: expected some of .*none, and no --data"),
        (["--data-root", "/no"], "input /no/.*: no task makes it, nor does it exist"),
        (["--summarize"], "expected cells that are evaluated, found none"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, main, words, message):
    with pytest.raises(SystemExit, match=f"^language_modeling: .*{message}") as caught:
        main(["--output", str(tmp_path / "out"), *words])
    assert "\n" not in str(caught.value)


def write_cell(cells: Path, objective: str, seed: int, values: dict, nats: list[float]) -> None:
    labels = {"domain": "d", "objective": objective, "seed": str(seed)}
    records = [
        Record(
            *(metric, value, "1", "by hand", 3),
            labels=labels | ({"decoding": decoding} if decoding else {}),
            provenance={},
        )
        for (metric, decoding), value in values.items()
    ]
    folder = cells / "d" / objective / f"seed{seed}"
    write_records(folder / "records.json", records)
    rows = [{"sha256": str(i), "nats": n, "tokens": 10} for i, n in enumerate(nats)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_is_the_mean_of_the_cells(tmp_path):
    cells = tmp_path / "cells"
    for objective, mauves in (("mle", (0.5, 0.7)), ("emo1", (0.8, 0.9)), ("base", (0.1,))):
        for seed, mauve in enumerate(mauves, 1):
            values = {("mauve", "unbiased"): mauve, ("token_perplexity", None): 10 * mauve}
            nats = {"mle": [20.0, 30, 40], "emo1": [22.0, 33, 47 + 6 * seed]}
            write_cell(cells, objective, seed, values, nats.get(objective, [50.0, 50, 50]))
    found = summarise_all(read_records([cells]), cells)
    mauve = found["d", "mle", "mauve", "unbiased"]
    assert mauve.value == pytest.approx(0.6) and mauve.n == 2
    assert mauve.settings["standard_deviation"] == pytest.approx(0.02**0.5)
    assert (mauve.interval.low, mauve.interval.high, mauve.interval.method) == (0.5, 0.7, "range")
    difference = found["d", "emo1", "cross_entropy_difference", None]
    # (2 + 3 + 13) / 30 and (2 + 3 + 19) / 30
    assert difference.value == pytest.approx(0.7)
    assert difference.settings["values"] == pytest.approx({"1": 0.6, "2": 0.8})
    assert difference.interval.low <= 0.7 <= difference.interval.high
    report = write_summary(cells, tmp_path / "results")
    assert "| mle | **6.0** ± 1.4 |  | 0.600 ± 0.141 |" not in report
    assert "| mle | 6.0 ± 1.4 |  | 0.600 ± 0.141 |" in report
    assert "**0.850** ± 0.071" in report and "| base | **1.0** |" in report
    assert "- MAUVE: emo1 is best; emo1 - mle by seed: +0.300, +0.200." in report
    # Higher perplexity and higher MAUVE in both seeds.
    assert "| emo1 | 0 / 1 | 1 / 0 |" in report
    assert read_records([tmp_path / "results" / "summary.json"])
    assert (tmp_path / "results" / "table.md").read_text() == report


def test_other_documents_than_the_controls_are_refused(tmp_path):
    values = {("mauve", "unbiased"): 0.5}
    write_cell(tmp_path, "mle", 1, values, [1.0, 2.0])
    write_cell(tmp_path, "emo1", 1, values, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="expected the documents of"):
        summarise_all(read_records([tmp_path]), tmp_path)


@needs_data
@pytest.mark.slow
def test_every_step_runs_and_runs_once(tmp_path, main, capsys):
    out = tmp_path / "out"
    main(["--output", str(out), "--smoke", "--jobs", "2"])
    assert "| emo1 |" in capsys.readouterr().out
    records = read_records([out / "results" / "records.json"])
    assert {r.labels["objective"] for r in records} == {"mle", "emo1", "base"}
    decodings = {r.labels.get("decoding") for r in records if r.metric == "mauve"}
    assert decodings == {"unbiased", "matched", "greedy"}
    control = {
        r.labels.get("decoding"): r.value
        for r in records
        if r.metric == "mauve" and r.labels["objective"] == "mle"
    }
    assert control["unbiased"] == control["matched"]
    main(["--output", str(out), "--smoke"])
    printed = capsys.readouterr().out
    assert printed.count("skipped: up to date") == 15 and " done in " not in printed
    main(["--output", str(out), "--smoke", "--dry-run"])
    assert "15 of 15 tasks are done" in capsys.readouterr().out
