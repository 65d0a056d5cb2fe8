"""Whole training steps: the command lines, the ratios, and runs that go wrong."""

from __future__ import annotations

import json
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_emo.benchmark import steps
from megatron_emo.benchmark.report import write_json
from megatron_emo.benchmark.steps import StepsConfig, flags_for, time_steps


def test_the_order_rotates_and_ratios_are_taken_inside_each_round(monkeypatch, tmp_path):
    # Round 2 is disturbed for all alike: no ratio may show it.
    times = {
        "mle": [[1.0, 9.0, 1.0], [50.0] * 3, [2.0] * 3],
        "emo1": [[1.5] * 3, [60.0] * 3, [2.2] * 3],
        "tvd": [[1.0] * 3, [100.0] * 3, [2.0] * 3],
    }
    order = []

    def known(config, name, flags, folder):
        order.append(name)
        return times[name][int(folder.name[0])]

    monkeypatch.setattr(steps, "_run", known)
    config = StepsConfig(steps=6, objectives=("mle", "emo1", "tvd"), rounds=3)
    lines = []
    results = time_steps(config, lines.append)
    assert order == ["mle", "emo1", "tvd", "emo1", "tvd", "mle", "tvd", "mle", "emo1"]
    assert len(lines) == 9 and all("load" in line for line in lines)
    assert results["mle"].ratio is None and results["mle"].medians == [1.0, 50.0, 2.0]
    ratio = results["emo1"].ratio
    assert (ratio.median, ratio.min, ratio.of_minima) == pytest.approx((1.2, 1.1, 1.5))
    run = {**steps.describe_steps(config), **dict.fromkeys(("machine", "num_threads"), "x")}
    run |= dict.fromkeys(("torch", "python", "commit", "date"), "x")
    run["load_average"] = {"before": [1.0], "after": [1.0]}
    rows = [line.split() for line in steps.format_steps(run, results).splitlines()]
    assert ["emo1", "2.2000", "1.5000", "1.200", "1.100", "1.500"] in rows
    write_json(str(tmp_path / "out.json"), run, results)
    stored = json.loads((tmp_path / "out.json").read_text())["results"]["emo1"]
    assert stored["ratio"]["median"] == pytest.approx(1.2)


def test_an_objective_is_given_no_flag_it_does_not_have():
    flags = "--lr 1 --emo-cost-embedding f --emo-weight-max=3 --no-emo-half --emo-ramp-iters 2 --a"
    assert flags_for("emo1", flags.split()) == flags.split()
    assert flags_for("mle", flags.split()) == "--lr 1 --emo-ramp-iters 2 --a".split()
    flags = "--emo-half --emo-scale 5 --emo-cost-dtype fp8 --emo-gamma 2 -x -1"
    assert flags_for("emo2", flags.split()) == (
        "--emo-half --emo-scale 5 --emo-cost-dtype fp8 -x -1".split()
    )
    assert flags_for("focal", flags.split()) == "--emo-gamma 2 -x -1".split()


def stand_in(tmp_path, monkeypatch, code):
    script = tmp_path / "pretrain_gpt_emo.py"
    script.write_text(code)
    monkeypatch.setattr(steps, "_script", lambda: script)


def test_a_failed_run_shows_its_last_lines(tmp_path, monkeypatch):
    code = (
        "import sys\nfor i in range(100): print('line', i)\nsys.exit(sys.argv[1:] and 'the cause')"
    )
    stand_in(tmp_path, monkeypatch, code)
    with pytest.raises(RuntimeError, match="^mle: .* exit code 1:\n") as caught:
        time_steps(StepsConfig(steps=4, flags=("--lr", "1")))
    shown = str(caught.value).splitlines()
    assert shown[-1] == "the cause" and shown[-2] == "line 99" and "line 3" not in shown


def test_a_run_gets_its_flags_and_must_log_its_times(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    writer = SummaryWriter(str(tmp_path / "events"))
    for iteration in range(2, 6):
        writer.add_scalar("iteration-time", iteration / 4, iteration)
    writer.close()
    seen_path = tmp_path / "seen.json"
    code = f"""
import json, os, shutil, sys
json.dump([sys.argv[1:], os.environ["WORLD_SIZE"]], open({str(seen_path)!r}, "w"))
folder = sys.argv[sys.argv.index("--tensorboard-dir") + 1]
shutil.copytree({str(tmp_path / "events")!r}, folder, dirs_exist_ok=True)
"""
    stand_in(tmp_path, monkeypatch, code)
    flags = ("--lr", "1", "--emo-cost-embedding", "f")
    results = time_steps(StepsConfig(5, ("mle",), rounds=1, flags=flags))
    assert results["mle"].seconds == [[1.0, 1.25]]
    seen, world_size = json.loads(seen_path.read_text())
    assert seen[:4] == ["--lr", "1", "--objective", "mle"] and world_size == "1"
    assert seen[seen.index("--train-iters") + 1] == "5"
    assert "--log-timers-to-tensorboard" in seen
    with pytest.raises(RuntimeError, match="'iteration-time' of 3 iterations .* got 2"):
        time_steps(StepsConfig(6, ("mle",), rounds=1, flags=flags))


def test_ranks_are_started_by_torch_distributed_run(tmp_path, monkeypatch):
    seen = []

    def run(command, **kwargs):
        seen.append((command, kwargs["env"]))
        raise InterruptedError

    monkeypatch.setattr(steps.subprocess, "run", run)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for nproc_per_node in (None, 2):
        with pytest.raises(InterruptedError):
            time_steps(StepsConfig(nproc_per_node=nproc_per_node))
    (alone, environment), (launched, launched_environment) = seen
    assert alone[0] == launched[0] == sys.executable
    assert alone[1].endswith("pretrain_gpt_emo.py") and environment["MASTER_PORT"] == "0"
    assert launched[1:6] == "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    assert launched[6] == alone[1] and "WORLD_SIZE" not in launched_environment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "--steps: expected more than the 3 that are dropped, got 3"),
        ({"rounds": 0}, "--rounds: expected at least 1, got 0"),
        ({"nproc_per_node": 0}, "--nproc-per-node: expected at least 1, got 0"),
        ({"objectives": ("emo9",)}, "--objectives: expected mle, .*got 'emo9'"),
        ({"flags": ("--objective=mle",)}, "--objective: the benchmark sets it"),
        ({"flags": ("--train-iters", "9")}, "--train-iters: the benchmark sets it"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        StepsConfig(**change)


def test_a_package_without_its_checkout_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.megatron_emo, "__file__", str(tmp_path / "megatron_emo" / "x.py"))
    with pytest.raises(FileNotFoundError, match="--steps: expected a checkout"):
        time_steps(StepsConfig())
