"""`scaling_study.py pictures`, `compare --joint` and the page of a study through their main()."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from scaling_runs import write_runs

from megatron_emo.evaluation.records import Record, write_records


@pytest.fixture(scope="module")
def call(load_tool):
    return lambda tool, *words: load_tool(tool).main([str(word) for word in words])


@pytest.fixture(scope="module")
def study(tmp_path_factory, call):
    """A study's folder with its pictures, one run done, one failed, one that never began."""
    folder = tmp_path_factory.mktemp("parent") / "small"
    folder.mkdir()
    csv = write_runs(folder / "runs.csv", budgets=3, sizes=4, seeds=1, with_hours=False)
    call("scaling_study", "pictures", "--csv", csv, "--output", folder / "pictures", *QUICK)
    runs = [
        {"name": name, "hash": f"h{name}", "label": "mle", "seed": 3, "tokens": 77123}
        for name in ("a1", "b2", "c3")
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "runs": runs}))
    for name, state in (("a1", "running"), ("b2", "failed")):
        own = folder / "runs" / name
        own.mkdir(parents=True)
        times = {"started": "2027-01-15T08:00:00Z", "ended": None}
        (own / "state.json").write_text(json.dumps({"state": state, "attempts": 2, **times}))
        # The second is that of another configuration.
        result = {"hash": "ha1", "tokens": 81920, "seconds": 61.5, "gpu_hours": 0.017}
        (own / "result.json").write_text(json.dumps(result))
    return folder


QUICK = ("--bootstrap", 20)


def test_pictures_with_their_numbers_and_an_index(study):
    index = json.loads((study / "pictures" / "pictures.json").read_text())
    names = [entry["name"] for entry in index["pictures"]]
    assert "isoflop" in names and "speedup" in names and index["refused"] == []
    for entry in index["pictures"]:
        assert (study / "pictures" / entry["image"]).read_bytes().startswith(b"\x89PNG")
        lines = (study / "pictures" / entry["csv"]).read_text().splitlines()
        assert lines[0].startswith("panel,x_axis,y_axis,series,kind,x,y") and len(lines) > 20
        assert entry["caption"]
    assert not list((study / "pictures").glob(".*"))
    assert index["settings"]["draws"] == 20 and "runs.csv" in index["sources"]


def test_the_page_shows_tables_pictures_and_runs(study, tmp_path, call, capsys):
    page = tmp_path / "page.html"
    call("report", "--study", study, "--html", page, "--title", "Small")
    assert "pictures of small" in capsys.readouterr().out
    text = page.read_text()
    for words in ("Law of each objective", "Best size of each budget", "One law or two"):
        assert words in text
    assert text.count('src="data:image/png;base64,') == 7 and "srcset" not in text
    rows = re.findall(r"<tr><th [^>]*>(\w\d)</th>(.*?)</tr>", text, re.DOTALL)
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row) for name, row in rows}
    assert cells["a1"][:5] == ["mle", "3", "done", "2", "2027-01-15 08:00"]
    assert cells["a1"][6:9] == ["81920", "61.5", "0.017"]
    assert cells["b2"][2] == "failed" and cells["b2"][6:] == ["–"] * 5
    assert cells["c3"][2:] == ["planned", *["–"] * 8] and ">77123<" not in text
    assert "Not known: without hours: gpu_hours is empty in line 2." in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


def test_a_page_of_records_and_a_study(study, tmp_path, call):
    records = tmp_path / "records"
    about = {"command": "x", "date": "2026-01-02T03:04:05Z"}
    write_records(records / "all.json", [Record("m", 0.5, "1", "M", 9, provenance=about)])
    page = tmp_path / "page.html"
    call("report", "--study", study, "--records", records, "--html", page)
    text = page.read_text()
    assert "Scaling study small: 7 pictures, 3 runs. 1 record of 1 metric" in text
    assert 'id="results"' in text and 'id="study-1-runs"' in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--study", "{study}"], "--study: expected --html FILE with it, got none"),
        (["--study", "{empty}", "--html", "{page}"], "expected pictures.json or"),
        (["--study", "{study}", "--html", "{page}", "--png", "{empty}"], "--png: expected --rec"),
    ],
)
def test_a_page_that_cannot_be(study, tmp_path, call, words, message):
    places = {"study": study, "empty": tmp_path, "page": tmp_path / "page.html"}
    with pytest.raises(SystemExit, match=message):
        call("report", *(word.format(**places) for word in words))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"runs": [{"name": "../../x"}]}', "expected the name of a file beside it"),
        ('{"runs": [{}]}', "expected a study's runs"),
        ('{"runs": 3}', "expected runs"),
        ('{"runs": ' + "[" * 100_000, "expected JSON"),
    ],
)
def test_a_page_of_a_study_whose_manifest_is_another(study, tmp_path, call, manifest, message):
    shutil.copytree(study, tmp_path / "study")
    (tmp_path / "study" / "manifest.json").write_text(manifest)
    with pytest.raises(SystemExit, match=f"--study.*manifest.json: .*{message}"):
        call("report", "--study", tmp_path / "study", "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_pictures_that_are_not_made_any_more_go(tmp_path, call, capsys):
    csv = write_runs(tmp_path / "runs.csv", ["mle"], budgets=3, sizes=4, seeds=1)
    out = tmp_path / "out"
    out.mkdir()
    stale = {"pictures": [{"image": "speedup.png", "csv": "../speedup.csv"}]}
    (out / "pictures.json").write_text(json.dumps(stale))
    for name in ("speedup.png", "speedup.csv", "mine.csv"):
        (out / name).write_text("old")
    call("scaling_study", "pictures", "--csv", csv, "--output", out, "--format", "svg", *QUICK)
    assert not (out / "speedup.png").exists() and not (out / "speedup.csv").exists()
    assert (out / "mine.csv").read_text() == "old"
    assert (out / "isoflop.svg").read_text().startswith("<?xml")
    said = capsys.readouterr().out
    assert "refused    speedup: expected two objectives, got one: mle" in said
    page = tmp_path / "page.html"
    call("report", "--study", out, "--html", page)
    assert page.read_text().count('src="data:image/svg+xml;base64,') == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--csv: expected a file, or --throughput, got neither"),
        (["--csv", "{folder}/none.csv"], "No such file"),
        (["--csv", "{csv}", "--bootstrap", "5"], "--bootstrap: expected at least 20 draws, got 5"),
        (["--csv", "{csv}", "--baseline", "x"], "--baseline: expected one of mle, emo1, got 'x'"),
        (["--csv", "{csv}", "--columns", "a=b"], "--columns: expected ROLE=NAME"),
        (["--csv", "{short}"], "no picture can be drawn:\nisoflop: mle: expected a budget"),
        (["--csv", "{bare}"], "has no column label or objective"),
    ],
)
def test_mistakes_leave_the_last_pictures(tmp_path, study, call, flags, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "isoflop.png").write_text("kept")
    lines = (study / "runs.csv").read_text().splitlines()
    (tmp_path / "short.csv").write_text("\n".join(lines[:4]) + "\n")
    (tmp_path / "bare.csv").write_text("N,D,L\n1,2,3\n")
    places = {"folder": tmp_path, "csv": study / "runs.csv", "short": tmp_path / "short.csv"}
    places["bare"] = tmp_path / "bare.csv"
    with pytest.raises(SystemExit, match=message):
        words = [word.format(**places) for word in flags]
        call("scaling_study", "pictures", "--output", out, *words)
    assert [path.name for path in out.iterdir()] == ["isoflop.png"]


def test_compare_tests_one_law_for_both(study, tmp_path, call, capsys):
    columns = "objective=objective,params=params,tokens=tokens,flops=flops,loss=loss,budget=budget"
    flags = ["--csv", study / "runs.csv", "--columns", columns, "--bootstrap", 10]
    out = tmp_path / "compare.json"
    call("scaling_study", "compare", *flags, "--joint", 9, "--json", out)
    joint = json.loads(out.read_text())["joint"]["emo1"]
    assert joint["n"] == 12 and joint["draws"] == 9 and 0.1 <= joint["p"] <= 1
    assert joint["base"]["E"] == joint["other"]["E"]
    assert joint["objective_two_laws"] < joint["objective_one_law"]
    assert "one law    of mle and emo1: statistic" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--joint: expected 0 or at least 2 draws, got 1"):
        call("scaling_study", "compare", *flags, "--joint", 1)
