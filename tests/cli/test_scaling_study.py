"""`tools/scaling_study.py fit`: a CSV in, a law in JSON out."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from megatron_emo.evaluation.records import hash_file
from megatron_emo.scaling.laws.surfaces import Surface

TRUTH = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
COLUMNS = "params=Model Size,flops=Training FLOP,loss=loss"


@pytest.fixture
def fit(load_tool):
    return lambda *flags: load_tool("scaling_study").main(["fit", *map(str, flags)])


@pytest.fixture
def runs(tmp_path):
    """5 budgets x 9 sizes for two objectives, emo 0.1 above mle, one loss missing, one far off."""
    rng = np.random.default_rng(0)
    path = tmp_path / "runs.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Model Size", "Training FLOP", "tokens", "objective", "loss"])
        for objective, extra in (("mle", 0.0), ("emo1", 0.1)):
            for flops in np.geomspace(1e18, 1e20, 5):
                for size in TRUTH.optimum(flops)[0] * np.geomspace(0.2, 5, 9):
                    tokens = flops / 6 / size
                    loss = TRUTH.loss(size, tokens) * np.exp(rng.normal(0, 1e-3)) + extra
                    writer.writerow([size, flops, tokens, objective, loss])
            writer.writerow([1e9, 1e20, 1e20 / 6e9, objective, ""])
            writer.writerow([1e9, 1e20, 1e20 / 6e9, objective, 9.0])
    return path


@pytest.mark.parametrize("approach", ["3", "vpnls"])
def test_a_surface_with_intervals(fit, runs, tmp_path, capsys, approach):
    out = tmp_path / "new" / "law.json"
    flags = ["--csv", runs, "--columns", COLUMNS, "--where", "objective=mle", "--json", out]
    fit(*flags, "--approach", approach, "--drop-highest", 1, "--bootstrap", 20, "--seed", 1)
    law = json.loads(out.read_text())
    assert law["E"] == pytest.approx(1.69, abs=0.1) and law["n"] == 45
    assert law["a"] == pytest.approx(law["beta"] / (law["alpha"] + law["beta"]))
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        interval = law["intervals"][name]
        assert interval["low"] < law[name] < interval["high"] and interval["level"] == 0.8
        assert len(law["bootstrap"]["values"][name]) == 20
    assert [(p["line"], p["reason"]) for p in law["dropped"]] == [
        (47, "loss: empty"),
        (48, "--drop-highest 1: one of the highest losses"),
    ]
    assert "no tokens column: D = C / (6 N)" in law["notes"]
    assert law["csv"] == {"runs.csv": hash_file(runs)} and law["converged"] is True
    predicted = Surface(*(law[name] for name in ("E", "A", "B", "alpha", "beta"))).loss(
        law["points"]["params"], law["points"]["tokens"]
    )
    measured = np.array(law["points"]["loss"])
    misses = predicted - measured if approach == "vpnls" else np.log(predicted / measured)
    np.testing.assert_allclose(law["points"]["residuals"], misses, atol=1e-9)
    assert law["leave_largest_out"]["n"] == 9
    shown = capsys.readouterr().out
    assert "dropped    line 47: loss: empty" in shown and "D = C / (6 N)" in shown


def test_isoflop_optima_are_kept(fit, runs, tmp_path):
    laws = {}
    for vertex in ("parabola", "akima"):
        out = tmp_path / f"{vertex}.json"
        fit(
            *("--csv", runs, "--columns", f"{COLUMNS},tokens=tokens", "--approach", 2),
            *("--where", "objective=emo1", "--vertex", vertex, "--drop-highest", 1),
            *("--bootstrap", 10, "--json", out),
        )
        laws[vertex] = law = json.loads(out.read_text())
        np.testing.assert_allclose(law["frontier"]["optima"]["flops"], np.geomspace(1e18, 1e20, 5))
        assert law["a"] == pytest.approx(TRUTH.a, abs=0.1)
        assert law["details"]["vertex"] == vertex and law["n"] == 45
        assert not any("tokens column" in note for note in law["notes"])
    assert laws["parabola"]["a"] != laws["akima"]["a"]


def test_the_envelope_of_curves(fit, tmp_path):
    path, out = tmp_path / "curves.csv", tmp_path / "law.json"
    lines = ["N,D,L"]
    for size in np.geomspace(1e8, 1e10, 10):
        lines += [f"{size},{d},{TRUTH.loss(size, d)}" for d in size * np.geomspace(1, 500, 12)]
    path.write_text("\n".join(lines) + "\n")
    columns = ("--csv", path, "--columns", "params=N,tokens=D,loss=L")
    fit(*columns, "--approach", 1, "--json", out, "--bootstrap", 10)
    law = json.loads(out.read_text())
    assert law["a"] == pytest.approx(TRUTH.a, abs=0.03) and law["num_curves"] == 10
    assert law["bootstrap"]["unit"] == "curve"
    assert {refused["reason"][:12] for refused in law["refused"]} == {"edge optimum"}
    assert "no flops column: C = 6 N D" in law["notes"]


def test_a_refused_table_leaves_the_last_result(fit, runs, tmp_path):
    out = tmp_path / "law.json"
    out.write_text("kept")
    short = tmp_path / "short.csv"
    short.write_text("\n".join(runs.read_text().splitlines()[:19]) + "\n")
    with pytest.raises(SystemExit, match="expected at least 3 budgets, got 2: 9 at C = 1e"):
        fit("--csv", short, "--columns", COLUMNS, "--approach", 3, "--json", out)
    assert out.read_text() == "kept"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bootstrap", -1], "--bootstrap: expected at least 0, got -1"),
        (["--jobs", 0], "--jobs: expected at least 1, got 0"),
        (["--level", 1.5], "--level: expected between 0 and 1, got 1.5"),
        (["--delta", 0], "--delta: expected above 0, got 0.0"),
        (["--seed", -1], "--seed: expected at least 0, got -1"),
        (["--where", "mle"], "--where: expected NAME=VALUE, got 'mle'"),
        (["--drop-highest", 900], "--drop-highest: expected 0 to"),
        (["--budget-tolerance", -1], "--budget-tolerance: expected at least 0, got -1.0"),
    ],
)
def test_flags_out_of_range(fit, runs, flags, message):
    with pytest.raises(SystemExit, match=message):
        fit("--csv", runs, "--columns", COLUMNS, "--approach", 3, *flags)


def test_a_file_that_is_not_there(fit, tmp_path):
    with pytest.raises(SystemExit, match="scaling_study fit: .*No such file"):
        fit("--csv", tmp_path / "none.csv", "--columns", COLUMNS, "--approach", 3)


def test_help_says_what_each_approach_is(fit, capsys):
    with pytest.raises(SystemExit) as stopped:
        fit("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for part in ("IsoFLOP curves", "nats/token", "ROLE=NAME", "default: 0.8", "projected out"):
        assert part in shown
