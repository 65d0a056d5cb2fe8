"""examples/oracle: run.py on tiny languages, and the results that are kept beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_emo.evaluation.oracle.study import read_runs
from megatron_emo.evaluation.records import read_records

EXAMPLE = Path(__file__).parents[2] / "examples" / "oracle"
TINY = ["--num-train", "100", "--num-dev", "50", "--batch-size", "50", "--max-epochs", "1"]
TEXT = "the cat saw the dog and the dog saw the cat. a dog ran to the cat and a cat ran. " * 3


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("oracle_run", EXAMPLE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def argv(tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    languages = ["--language", "random50:5@4", "--language", "corpus:6@4"]
    study = ["--objectives", "emo1,emo", "--seeds", "7,42", *TINY]
    out = ["--output", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]
    return [*languages, *study, *out]


def test_runs_records_tables_and_a_picture_come_out(tmp_path, main, argv, capsys):
    main(argv)
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    # mle, emo1 with two costs and four weights each, emo with two costs.
    assert len(read_runs(out / "runs.jsonl")) == 2 * 2 * 11
    assert (out / "plane.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert table in printed and "## random50:5@4" in table and "## corpus:6@4" in table
    records = read_records([out])
    assert {r.labels["language"] for r in records} == {"random50", "corpus"}
    corpus = next(r for r in records if r.labels["language"] == "corpus")
    assert list(corpus.data) == ["text.txt"]
    with pytest.raises(SystemExit, match="^oracle: .*exists; --resume goes on with it"):
        main(argv)
    main([*argv, "--resume", "--jobs", "2", "--objectives", "mixce"])
    assert len(read_runs(out / "runs.jsonl")) == 2 * 2 * (11 + 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--language", "esperanto"], "--language: expected randomZ:V or corpus:V"),
        (["--objectives", "kl"], "--objectives: expected some of mle, mixce"),
        (["--costs", "cosine"], "--costs: expected some of identity, output-layer, got .'cosine'"),
        (["--seeds", "7,x"], "--seeds: expected numbers, got '7,x'"),
        (["--num-train", "10"], "--num-train: expected at least --batch-size 50, got 10"),
        (["--language", "corpus:99"], "--text: expected at least 98 different words, got 8"),
        (["--text", "no-such-file"], "no-such-file"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, main, argv, words, message):
    with pytest.raises(SystemExit, match=f"^oracle: .*{message}") as caught:
        main([*argv, *words])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_help_shows_the_docstrings_command(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python examples/oracle/run.py --output" in capsys.readouterr().out


def test_the_kept_records_are_the_means_of_the_kept_runs():
    runs = read_runs(EXAMPLE / "results" / "runs.jsonl")
    records = read_records([EXAMPLE / "results"])
    assert len({run.seed for run in runs}) == 5
    for record in records:
        labels = record.labels
        width = "" if labels["hidden_size"] == "50" else f"@{labels['hidden_size']}"
        key = (f"{labels['language']}:{labels['vocabulary']}{width}",)
        key += tuple(labels[name] for name in ("objective", "cost", "weight"))
        ours = [r for r in runs if (r.language, r.objective, r.cost, r.weight) == key]
        assert len(ours) == record.n
        if not record.metric.startswith("optimum"):
            mean = sum(run.measures[record.metric] for run in ours) / len(ours)
            assert record.value == pytest.approx(mean)
