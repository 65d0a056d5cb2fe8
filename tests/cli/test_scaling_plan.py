"""`tools/scaling_study.py plan`: a YAML in, a table, a JSON and a CSV out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from megatron_emo.scaling.plans.plan_file import REPLICATED_CHINCHILLA

ROOT = Path(__file__).parents[2]
TEXT = """
name: small
budgets: [1e17, 2e17, 4e17]
sizes: [256, 320, 384, 512, 640]
objectives: [mle, emo1]
model: {vocab_size: 5000, seq_length: 512}
recipe: {head_size: 64, steps: 4096}
"""


@pytest.fixture
def plan(load_tool):
    return lambda *flags: load_tool("scaling_study").main(["plan", *map(str, flags)])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(TEXT)
    return path


def test_a_plan_becomes_a_table_and_files(plan, path, tmp_path, capsys):
    out, table = tmp_path / "new" / "plan.json", tmp_path / "plan.csv"
    plan("--plan", path, "--device", "a100", "--mfu", 0.5, "--json", out, "--csv", table)
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 30 and result["device"] == "NVIDIA A100-SXM4-80GB"
    for run in result["runs"]:
        assert abs(run["flops"] / run["budget"] - 1) < 0.01
        assert run["gpu_hours"] == pytest.approx(run["flops_all"] / 312e12 / 0.5 / 3600)
        assert ("--objective" in run["arguments"]) and run["config"]["steps"] == run["steps"]
        assert (run["emo_share"] > 0) == (run["objective"] == "emo1")
    shown = capsys.readouterr().out.splitlines()
    rows = [line for line in shown if line.startswith(("mle ", "emo1 "))]
    assert len(rows) == 30 and len({row.split()[-1] for row in rows}) == 30
    assert any("MFU 50% assumed" in line and "312 TFLOP/s" in line for line in shown)
    totals = result["totals"]
    assert totals[-1]["runs"] == 30 and totals[-1]["objective"] == "all"
    with open(table, newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["run"] for row in cells] == [run["run"] for run in result["runs"]]


def test_fit_reads_the_table_with_its_losses(plan, path, tmp_path, load_tool, capsys):
    table, runs, law = (tmp_path / name for name in ("plan.csv", "runs.csv", "law.json"))
    plan("--plan", path, "--csv", table)
    with open(table, newline="") as file, open(runs, "w", newline="") as out:
        reader = csv.DictReader(file)
        writer = csv.DictWriter(out, [*reader.fieldnames, "loss"])
        writer.writeheader()
        for row in reader:
            params, tokens = float(row["params_active"]), float(row["tokens"])
            writer.writerow(row | {"loss": float(REPLICATED_CHINCHILLA.loss(params, tokens))})
    columns = "params=params_active,tokens=tokens,flops=flops,budget=budget,loss=loss"
    fit = load_tool("scaling_study").main
    common = ["fit", "--csv", str(runs), "--columns", columns, "--where", "objective=mle"]
    fit([*common, "--approach", "vpnls", "--json", str(law)])
    found = json.loads(law.read_text())
    assert found["E"] == pytest.approx(1.8172, abs=1e-5) and found["num_budgets"] == 3
    fit([*common, "--approach", "2"])
    # And the law that was found says where the next plan's optima are.
    capsys.readouterr()
    plan("--plan", path, "--law", law)
    assert "WARNING" not in capsys.readouterr().out


def test_a_refused_plan_says_all_and_leaves_the_last_result(plan, path, tmp_path):
    out = tmp_path / "plan.json"
    out.write_text("kept")
    path.write_text(TEXT.replace("[1e17, 2e17, 4e17]", "[1e17, 4e19]").replace("320", "330"))
    with pytest.raises(SystemExit) as stopped:
        plan("--plan", path, "--json", out)
    message = str(stopped.value)
    assert out.read_text() == "kept"
    assert message.startswith(f"scaling_study plan: --plan {path}: ")
    for part in ("isoflop-range: budget 4e+19, size 256", "too-few-points: mle: as fit --approach"):
        assert part in message
    assert "`allow: [edge-optimum, isoflop-range, too-few-points]`" in message


def test_what_is_allowed_is_a_warning(plan, path, capsys):
    path.write_text(TEXT.replace(", 4e17", ""))
    plan("--plan", path, "--allow", "too-few-points")
    assert "WARNING    too-few-points: mle: as fit --approach 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mfu", 0], "--mfu: expected above 0, to 1, got 0.0"),
        (["--peak-tflops", -1], "--peak-tflops: expected above 0, got -1.0"),
        (["--gpus", 0], "layout.gpus: expected 1 to 1,000,000, got 0"),
        (["--law", "none.json"], "No such file"),
    ],
)
def test_flags_out_of_range(plan, path, flags, message):
    with pytest.raises(SystemExit, match=message):
        plan("--plan", path, *flags)


def test_a_law_that_is_none(plan, path, tmp_path):
    law = tmp_path / "law.json"
    for text in ("{}", "[1]", "no", '{"E": null}'):
        law.write_text(text)
        with pytest.raises(SystemExit, match="--law .*expected a JSON file of `fit`"):
            plan("--plan", path, "--law", law)
    law.write_text('{"E": 1, "A": 0, "B": 1, "alpha": 0.3, "beta": 0.3}')
    with pytest.raises(SystemExit, match="--law .*expected A, B, alpha, beta above 0"):
        plan("--plan", path, "--law", law)


def test_a_device_that_is_not_listed(plan, path, capsys):
    plan("--plan", path, "--peak-tflops", 0.1)
    assert "given peak, bf16 peak 0.1 TFLOP/s (--peak-tflops)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plan_isoflop.yaml", "plan_token_ratios.yaml"])
def test_the_examples(plan, name, capsys):
    plan("--plan", ROOT / "examples" / "scaling" / name, "--device", "h200")
    assert "GPU-h" in capsys.readouterr().out
