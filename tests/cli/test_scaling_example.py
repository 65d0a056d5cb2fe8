"""examples/scaling: its corpora, its plan, its tasks, its table, and every step at toy size."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_emo.evaluation.records import Record, read_records, write_records
from megatron_emo.evaluation.texts import read_texts
from megatron_emo.scaling.command import build_parser
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.plans.plan_file import read_plan_file
from megatron_emo.study.scaling import corpora, laws, summary
from megatron_emo.study.scaling.command import build_parser as build_example_parser
from megatron_emo.study.scaling.command import build_study, parse_files
from megatron_emo.study.scaling.plan import analysis_tasks, data_tasks, training_commands
from megatron_emo.study.scaling.write_plan import add_data
from megatron_emo.study.tasks import order_tasks

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PLANS = ("plan_laptop", "plan_laptop_smoke")

needs_data = pytest.mark.skipif(
    not (DATA / "models" / "stories260K" / "tok512.bin").exists(), reason="no ../shared/data"
)


def test_a_corpus_is_cut_between_its_groups_and_shares_nothing():
    groups = [[f"{g} {i} " + "x" * 20 for i in range(3)] for g in range(10)] + [["0 0 " + "x" * 20]]
    cuts = [corpora.split_groups(groups, seed, 100) for seed in range(20)]
    for train, held_out in cuts:
        assert sorted(train + held_out) == sorted({text for group in groups for text in group})
        assert 100 <= sum(map(len, held_out)) < 200
        for group in groups[1:10]:
            assert len({text in held_out for text in group}) == 1
    assert cuts[3] == corpora.split_groups(groups, 3, 100)
    assert len({tuple(held_out) for _, held_out in cuts}) > 5
    with pytest.raises(ValueError, match="--held-out-bytes: expected less than the text there is"):
        corpora.split_groups(groups, 3, 10_000)
    with pytest.raises(ValueError, match="--held-out-bytes: expected at least 1, got -1"):
        corpora.split_groups(groups, 3, -1)
    with pytest.raises(ValueError, match="--held-out-bytes 1: expected text to hold out"):
        corpora.split_groups([["  "], ["\n"]], 3, 1)


def test_own_texts_become_two_files(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(50)))
    common = ["--output", str(tmp_path / "out"), "--held-out-bytes", "70"]
    corpora.main(["--name", "own", "--files", str(tmp_path / "a.txt"), *common])
    parts = [read_texts(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "held_out")]
    assert sorted(sum(parts, [])) == sorted(f"line {i}" for i in range(50))
    with pytest.raises(SystemExit, match="--name own: expected --files, or --root"):
        corpora.main(["--name", "own", *common])


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_with_data_is_the_plan_and_the_data(tmp_path, name):
    template = ROOT / "examples" / "scaling" / f"{name}.yaml"
    data = {"path": "./data/train_text_document", "tokenizer_model": "./model"}
    path = tmp_path / "plan.yaml"
    path.write_text(add_data(template.read_text(), data))
    spec = read_plan_file(path)
    assert spec.data.path == (str(tmp_path / "data" / "train_text_document"),)
    assert spec.data.tokenizer_model == str(tmp_path / "model")
    assert {**vars(spec), "data": None} == vars(read_plan_file(template))
    with pytest.raises(ValueError, match="expected no section data:, found one"):
        add_data(path.read_text(), data)


@pytest.mark.parametrize("name", PLANS)
def test_the_plans_are_accepted(name, capsys):
    plan = ROOT / "examples" / "scaling" / f"{name}.yaml"
    flags = ["plan", "--plan", str(plan), "--peak-tflops", "0.02", "--mfu", "1"]
    args = build_parser("").parse_args(flags)
    runs = args.run(args)["runs"]
    assert len(runs) == (40 if name == "plan_laptop" else 8)
    assert {run["objective"] for run in runs} == {"mle", "emo1"}


def build(tmp_path, *flags):
    return build_study(
        build_example_parser("").parse_args(["--output", str(tmp_path / "out"), *flags])
    )


def test_every_task_finds_what_it_reads(tmp_path):
    for name in ("stories260K.bin", "tok512.bin"):
        (tmp_path / name).touch()
    own = tmp_path / "own.txt"
    own.write_text("text\n")
    flags = ("--stories", str(tmp_path), "--corpora", "demo,own", "--data", f"own={own}")
    study = build(tmp_path, *flags)
    names = [task.name for task in order_tasks(data_tasks(study))]
    assert names[:2] == ["model", "costs"] and "demo/corpus" in names
    steps = ("texts", "tokens", "plan", "check")
    assert [name for name in names if name.startswith("own/")] == [f"own/{s}" for s in steps]
    run, score = training_commands(study, "own", 2)
    assert run[2] == "run" and "--resume" in run and score[2] == "score"
    for corpus in study.corpora:
        for path in (study.folder(corpus) / "runs.csv", study.output / corpus / "plan.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    analysis = order_tasks(analysis_tasks(study))
    assert {task.name: needs for task, needs in analysis.items()}["own/summary"] == {
        "own/laws",
    }
    given = build(tmp_path, "--model", str(tmp_path), *flags)
    assert "model" not in [task.name for task in data_tasks(given)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpora", "nothing"], "--corpora: expected some of .*, got 'nothing'"),
        (["--corpora", ""], "--corpora: expected at least one, got none"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--jobs", "-1"], "--jobs: expected at least 1, got -1"),
        (["--bootstrap", "-5"], "--bootstrap: expected at least 2, got -5"),
        (["--bootstrap", "0"], "--bootstrap: expected at least 2, got 0"),
        (["--held-out-bytes", "0"], "--held-out-bytes: expected at least 1, got 0"),
        (["--corpora", "demo,demo"], "--corpora: expected each once, got demo,demo"),
        (["--smoke", "--corpora", "demo,none"], "--corpora: expected some of .*, got 'none'"),
        (["--data", f"x={__file__}"], "--data x: expected one of --corpora demo,wikitext, got"),
        (["--data", "x"], "--data: expected NAME=FILE,..., got 'x'"),
        (["--data", "x=none.txt"], "--data x: .*none.txt: no such file"),
    ],
)
def test_flags_out_of_range(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, *flags)


def test_several_files_of_a_corpus(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.touch()
    assert parse_files([f"own={paths[0]},{paths[1]}"]) == {"own": tuple(paths)}
    assert parse_files([f"own={path}" for path in paths]) == {"own": tuple(paths)}


TRUTH = Surface(E=1.7, A=40.0, B=60.0, alpha=0.35, beta=0.4)


@pytest.fixture
def scored(tmp_path):
    """A study's folder of 4 budgets x 5 sizes x {mle, emo1}, emo1 0.02 nats above mle."""
    folder, rows = tmp_path / "study", []
    for budget in (1e12, 2e12, 4e12, 8e12):
        for index, size in enumerate(np.geomspace(0.3, 3, 5) * TRUTH.optimum(3e12)[0]):
            for label, extra in (("mle", 0.0), ("emo1", 0.02)):
                tokens = round(budget / 6 / size)
                name = f"{label}_{index}_{budget:g}"
                loss = float(TRUTH.loss(size, tokens)) + extra
                run = folder / "runs" / name
                record = Record("cross_entropy", loss, "nats/token", "", 100)
                write_records(run / "score.json", [record])
                document = {"id": 0, "sha256": "x", "tokens": 100, "nats": 100 * loss}
                (run / "documents.jsonl").write_text(json.dumps(document) + "\n")
                row = {"name": name, "label": label, "objective": label, "seed": 1}
                row |= {"size": f"s{index}", "budget": budget, "params": size, "tokens": tokens}
                row |= {"flops": budget, "flops_all": budget * (1 + (label == "emo1") / 10)}
                row |= {"gpu_hours": tokens / 1e9, "loss": loss, "bits_per_byte": loss / 2}
                rows.append(row | {"documents": f"runs/{name}/documents.jsonl"})
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Laws without a process for each."""

    def run_or_note(flags, path):
        args = build_parser("").parse_args([*flags, "--json", str(path)])
        try:
            args.run(args)
        except ValueError as error:
            path.write_text(json.dumps({"refused": str(error)}))
            return str(error)
        return ""

    monkeypatch.setattr(laws, "run_or_note", run_or_note)


def find_laws(folder, out, draws=0):
    flags = ["--csv", str(folder / "runs.csv"), "--output", str(out), "--objectives", "mle,emo1"]
    laws.main([*flags, "--bootstrap", str(draws)])


def test_the_page_says_what_the_runs_say(scored, tmp_path, in_process, monkeypatch, capsys):
    monkeypatch.setattr(laws, "APPROACHES", ("2", "vpnls"))
    monkeypatch.setattr(summary, "APPROACHES", ("2", "vpnls"))
    find_laws(scored, tmp_path / "laws", draws=20)
    flags = ["--corpus", "toy", "--study", str(scored), "--laws", str(tmp_path / "laws")]
    summary.main([*flags, "--output", str(tmp_path / "results")])
    page = (tmp_path / "results" / "table.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "## Best sizes (approach 2), C is flops_all of runs.csv" in page
    assert "## Laws, 80% intervals" in page and "90% intervals: held-out" in page
    assert "| emo1 | 1.1e+12 |" in page and "resamples without" not in page
    assert "40 runs: 4 budgets from 1e+12 to 8e+12 FLOPs x 5 sizes x 2 objectives" in page
    assert "held-out loss +0.0200 [+0.0200, +0.0200] nats/token at equal tokens" in page
    found = read_records([tmp_path / "results" / "summary.json"])
    values = {(r.metric, r.labels["objective"], r.labels.get("approach")): r for r in found}
    for label, extra in (("mle", 0), ("emo1", 0.02)):
        law = values["scaling_E", label, "vpnls"]
        assert law.value == pytest.approx(TRUTH.E + extra, abs=1e-5) and law.n == 20
        assert values["scaling_alpha", label, "vpnls"].value == pytest.approx(0.35, abs=1e-5)
    difference = values["scaling_difference_tokens", "emo1", None]
    assert difference.value == pytest.approx(0.02, abs=1e-9) and difference.n == 20
    assert values["scaling_speedup_flops", "emo1", None].value < 1
    # The bold loss of each budget is the least of its column.
    rows = [line for line in page.splitlines() if "| mle |" in line and "| s" in line]
    cells = [[cell.strip() for cell in row.split("|")[4:-1]] for row in rows]
    for column in zip(*cells, strict=True):
        least = min(float(cell.strip("*")) for cell in column)
        assert [cell for cell in column if "**" in cell] == [f"**{least:.4f}**"]


def test_the_page_says_which_resamples_had_no_law(scored, tmp_path, in_process, monkeypatch):
    for module in (laws, summary):
        monkeypatch.setattr(module, "APPROACHES", ("vpnls",))
    find_laws(scored, tmp_path / "laws", draws=2)
    for name, keys in (("mle_vpnls", ("bootstrap", "failures")), ("compare", ("failed_draws",))):
        path = tmp_path / "laws" / f"{name}.json"
        content = json.loads(path.read_text())
        at = content["objectives"][0] if name == "compare" else content[keys[0]]
        at[keys[-1]] = {"no slope": 1}
        path.write_text(json.dumps(content))
    page = summary.write_summary("toy", scored, tmp_path / "laws", tmp_path / "results")
    assert "mle, approach vpnls: 1 of 2 resamples without a law (1: no slope)." in page
    assert "1 of 2 resamples without a law or a pair's speedup (1: no slope)." in page
    assert "emo1, approach" not in page


def test_runs_without_budgets_have_laws_and_a_page(scored, tmp_path, in_process, monkeypatch):
    for module in (laws, summary):
        monkeypatch.setattr(module, "APPROACHES", ("2", "vpnls"))
    with open(scored / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(scored / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "budget": ""} for row in rows)
    find_laws(scored, tmp_path / "laws", draws=2)
    page = summary.write_summary("toy", scored, tmp_path / "laws", tmp_path / "results")
    assert "runs: without budgets, 6.6e+04 to" in page and "Refused" not in page
    assert "**emo1 against mle**, 20 pairs" in page
    losses = [line for line in page.splitlines() if "D/N" not in line and line.startswith("| s")]
    assert len(losses) == 40
    row = next(row for row in rows if row["label"] == "mle")
    ratio = float(row["tokens"]) / float(row["params"])
    cells = (row["size"], f"{float(row['params']):,.0f}", "mle", f"{int(row['tokens']):,}")
    assert f"| {' | '.join(cells)} | {ratio:.3g} | {float(row['loss']):.4f} |" in losses


def test_a_table_without_runs_has_no_laws(scored, tmp_path):
    (scored / "runs.csv").write_text("name,budget\n")
    with pytest.raises(SystemExit, match="laws: --csv .*: expected runs of `score`, got none"):
        find_laws(scored, tmp_path / "laws")


def test_what_a_fit_refuses_is_on_the_page(scored, tmp_path, in_process, monkeypatch):
    rows = (scored / "runs.csv").read_text().splitlines(keepends=True)
    (scored / "runs.csv").write_text("".join(rows[:21]))
    find_laws(scored, tmp_path / "laws")
    page = summary.write_summary("toy", scored, tmp_path / "laws", tmp_path / "results")
    assert "- mle, approach 3: --approach 3: expected at least 3 budgets, got 2" in page


def test_laws_of_another_table_are_refused(scored, tmp_path, in_process, monkeypatch):
    for module in (laws, summary):
        monkeypatch.setattr(module, "APPROACHES", ("vpnls",))
    find_laws(scored, tmp_path / "laws")
    rows = (scored / "runs.csv").read_text().splitlines(keepends=True)
    (scored / "runs.csv").write_text("".join(rows[:-1]))
    with pytest.raises(ValueError, match="expected laws of .*, got those of another"):
        summary.write_summary("toy", scored, tmp_path / "laws", tmp_path / "results")
    assert not (tmp_path / "results" / "table.md").exists()


def test_a_refusal_is_noted_and_a_failure_is_not(tmp_path, monkeypatch):
    path = tmp_path / "law.json"

    def answer(code, stderr):
        done = subprocess.CompletedProcess([], code, "", stderr)
        monkeypatch.setattr(laws.subprocess, "run", lambda *args, **kwargs: done)

    answer(1, "a warning\nscaling_study fit: --approach 2: expected more\n  and more\n")
    refused = "--approach 2: expected more\n  and more"
    assert laws.run_or_note(["fit"], path) == refused
    assert json.loads(path.read_text()) == {"refused": refused}
    answer(1, "Traceback ...\nKeyError: 'x'\n")
    with pytest.raises(RuntimeError, match="(?s)^fit --json .*: exit code 1.*KeyError"):
        laws.run_or_note(["fit"], path)


@pytest.fixture(scope="module")
def main():
    path = ROOT / "examples" / "scaling" / "run.py"
    spec = importlib.util.spec_from_file_location("scaling_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@needs_data
@pytest.mark.slow
def test_every_step_runs_after_a_kill_and_runs_once(tmp_path, main, capfd):
    """kill -9 of the whole study once a run is done; then the same command to the end."""
    out = tmp_path / "out"
    flags = ["--output", str(out), "--smoke", "--jobs", "2"]
    script = str(ROOT / "examples" / "scaling" / "run.py")
    process = subprocess.Popen(
        [sys.executable, script, *flags], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    runs = out / "demo" / "study" / "runs"
    with process:
        assert any(line.startswith("[1/8]") for line in process.stdout)
        os.killpg(process.pid, signal.SIGKILL)
    first = {path: path.read_bytes() for path in runs.glob("*/result.json")}
    main(flags)
    assert all(path.read_bytes() == content for path, content in first.items())
    assert "8 runs: 2 budgets" in capfd.readouterr().out
    results = out / "results" / "demo"
    assert len(read_records([results / "records.json"])) == 8 * 4
    assert (results / "table.md").exists() and (results / "runs.csv").exists()
    main(flags)
    printed = capfd.readouterr().out
    assert "0 runs to score, 8 are scored" in printed and " done in " not in printed
