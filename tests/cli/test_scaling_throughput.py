"""`tools/scaling_study.py throughput` and `estimate`: from a YAML over runs of train.sh to rows.

train.sh is the real one; the trainer behind it is a script that writes the event log of a run whose
steps take what its layout and objective say.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = """
name: stub
batch: 8
precision: fp32
objectives: [mle, emo1]
model: {vocab_size: 1000, seq_length: 64}
sizes:
  tiny: {layers: 4, hidden: 64, heads: 4, ffn: 128}
layouts:
  - {}
  - {tensor_parallel: 2}
  - {data_parallel: 2}
launch: {gpus_per_node: 0, ranks_per_node: 2}
"""
# python -u -m megatron_emo.launch.torchrun FLAGS; 0.1 s of one rank, 0.05 and 0.08 of two.
TRAINER = """#!{python}
import os, sys
from pathlib import Path
from megatron_emo.launch.events import EventLog

words = sys.argv[1:]
value = lambda flag: words[len(words) - 1 - words[::-1].index(flag) + 1]
tp, ranks = int(value("--tensor-model-parallel-size")), int(value("--nproc-per-node"))
with open(os.environ["STUB_CALLS"], "a") as file:
    print(value("--objective"), tp, ranks, file=file)
if os.environ.get("STUB_FAILS") == f"{{tp}}":
    sys.exit("the stub fails")
ms = (80.0 if tp == 2 else 100.0 / ranks) * (1.1 if value("--objective") == "emo1" else 1)
for rank in range(ranks):
    log = EventLog(Path(value("--tensorboard-dir"), "events"), rank)
    log.write("start", 0, world_size=ranks, train_iters=9, host="h", pid=1, restart=0,
        objective=value("--objective"), cost_embedding=None, save=None, command=[],
        environment={{}}, versions={{"torch": "x"}}, layout={{}})
    is_last = rank == ranks - 1
    for i in range(1, int(value("--train-iters")) + 1):
        log.write("loss_time", i, forward_ms=ms / 8 if is_last else None,
            backward_ms=ms / 8 if is_last else None, num_microbatches=1, peak_bytes=1 << 30,
            device="CPU")
        if is_last:
            log.write("step", i, train_iters=9, losses={{}}, learning_rate=None, grad_norm=None,
                loss_scale=None, step_ms=ms if i > 2 else 1e6, work_ms=None, tokens_per_s=1.0,
                consumed_samples=8, skipped=0, nan=0)
"""


@pytest.fixture
def tool(load_tool):
    return lambda *flags: load_tool("scaling_study").main([*map(str, flags)])


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Point train.sh at the stub, and return what it was called with."""
    trainer = tmp_path / "python"
    trainer.write_text(TRAINER.format(python=sys.executable))
    trainer.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(trainer))
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    return lambda: (tmp_path / "calls").read_text().splitlines()


def by_cell(rows: list[dict]) -> dict:
    return {(row["layout"].split("_")[0], row["gpus"], row["objective"]): row for row in rows}


def test_a_study_is_run_resumed_and_compared(tool, plan, calls, tmp_path, capsys):
    out, table = tmp_path / "study", tmp_path / "rows.csv"
    flags = ("throughput", "--plan", plan, "--output", out, "--steps", 3, "--warmup", 2)
    tool(*flags, "--csv", table, "--peak-tflops", 0.001)
    shown = capsys.readouterr().out
    assert "[6/6]" in shown and "MFU means nothing" in shown
    result = json.loads((out / "throughput.json").read_text())
    rows = by_cell(result["rows"])
    assert rows["tp1", 1, "mle"]["step_s"] == pytest.approx(0.1)
    assert rows["tp1", 2, "mle"]["efficiency"] == pytest.approx(1.0)
    assert rows["tp2", 2, "mle"]["efficiency"] == pytest.approx(0.1 / 0.08 / 2)
    assert rows["tp2", 2, "emo1"]["ratio"] == pytest.approx(1.1)
    assert all(row["loss_share"] == pytest.approx(0.25) for row in result["rows"])
    assert rows["tp1", 1, "mle"]["mfu"] > 0 and result["failed"] == []
    with open(table, newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    with pytest.raises(SystemExit, match="--resume"):
        tool(*flags)
    tool(*flags, "--resume")
    assert len(calls()) == 6  # nothing was run again
    capsys.readouterr()

    device = tmp_path / "device.json"
    rates = {"flops": 5e10, "bandwidth": 1e10, "start_s": 1e-5}
    entry = {
        "schema": "megatron_emo.scaling_device/1", "kind": "cpu", "name": "CPU", "backend": "gloo",
        "date": "2026-01-01", "threads": 1, "cores": 2, "memory": None, "alone": rates,
        "together": rates, "link": {"latency": 1e-4, "bandwidth": 1e9, "shares": {}},
        "ranks_per_node": 2,
    }  # fmt: skip
    device.write_text(json.dumps(entry))
    report = tmp_path / "estimate.json"
    tool("estimate", "--plan", plan, "--device", device, "--against", out, "--json", report)
    shown = capsys.readouterr().out
    assert "Kendall tau" in shown and "assumed" in shown
    against = json.loads(report.read_text())
    assert len(against["against"]) == 6 and len(against["summary"]) == 2
    assert {one["best_measured"] for one in against["summary"]} == {"tp1_pp1_cp1_dp2_mb1"}


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    tool, plan, calls, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "study"
    flags = ("throughput", "--plan", plan, "--output", out, "--steps", 2, "--warmup", 2)
    monkeypatch.setenv("STUB_FAILS", "2")
    with pytest.raises(SystemExit, match="tiny_tp2_pp1_cp1_dp1_mb1_sp_mle_r0"):
        tool(*flags)
    result = json.loads((out / "throughput.json").read_text())
    assert len(result["rows"]) == 4 and len(result["failed"]) == 2
    assert not any("tp2" in row["layout"] for row in result["rows"])
    assert "FAILED" in capsys.readouterr().out
    monkeypatch.setenv("STUB_FAILS", "")
    tool(*flags, "--resume")
    assert len(json.loads((out / "throughput.json").read_text())["rows"]) == 6
    assert len(calls()) == 6 + 2


def test_nothing_starts_where_a_layout_cannot_be(tool, plan, calls, tmp_path):
    plan.write_text(STUDY.replace("- {tensor_parallel: 2}", "- {context_parallel: 2}"))
    flags = ("throughput", "--plan", plan, "--output", tmp_path / "study")
    with pytest.raises(SystemExit, match="context_parallel 2: expected 1 on a CPU"):
        tool(*flags)
    assert not (tmp_path / "study").exists() and not (tmp_path / "calls").exists()
    tool(*flags, "--skip-impossible", "--steps", 2)
    assert len(calls()) == 4


def test_the_examples_are_estimated(tool, tmp_path, capsys):
    plan, out = ROOT / "examples/scaling/throughput_8b.yaml", tmp_path / "out.json"
    tool("estimate", "--plan", plan, "--device", "h100", "--nodes", 4, "--top", 3, "--json", out)
    result = json.loads(out.read_text())
    for ranking in result["rankings"]:
        rows = ranking["rows"]
        assert [row["rank"] for row in rows] == [1, 2, 3] and ranking["gpus"] == 32
        for row in rows:
            terms = (
                *("compute_s", "tensor_s", "context_s", "expert_s", "pipeline_s", "loss_s"),
                *("bubble_s", "data_s", "optimizer_s"),
            )
            assert row["step_s"] == pytest.approx(sum(row[name] for name in terms))
    assert len(result["assumptions"]) > 8
    assert "terms in ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "h9000"), "--device: expected one of"),
        (("--gpus", 0), "--gpus: expected 1 to"),
        (("--gpus", 8, "--nodes", 1), "--nodes: expected --gpus or --nodes"),
        (("--top", 0), "--top: expected at least 1"),
        (("--save-device", "x"), "--save-device: expected --measure"),
        (("--against", "plan.yaml"), "--against .*: expected JSON"),
    ],
)
def test_flags_are_refused_by_name(tool, plan, flags, message, monkeypatch):
    monkeypatch.chdir(plan.parent)
    with pytest.raises(SystemExit, match=message):
        tool("estimate", "--plan", plan, *flags)


@pytest.mark.slow
def test_this_machine_is_measured(tool, plan, tmp_path, capsys):
    device = tmp_path / "device.json"
    tool("estimate", "--plan", plan, "--measure", "--save-device", device, "--gpus", 2)
    assert "beside another" in capsys.readouterr().out
    entry = json.loads(device.read_text())
    assert entry["alone"]["flops"] > 1e8 and entry["link"]["bandwidth"] > 1e5
    tool("estimate", "--plan", plan, "--device", device, "--gpus", 1)
