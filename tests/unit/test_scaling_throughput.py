"""Throughput studies: files, layouts, recipes, what event logs say, and what is made of it."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_emo.launch.events import EventLog
from megatron_emo.scaling.counts.flops import count_flops
from megatron_emo.scaling.pictures.throughput import read_throughput
from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.speed.throughput import EVENTS, Measured, read_cell
from megatron_emo.scaling.speed.throughput_cells import (
    Timing,
    command_of,
    environment_of,
    make_cells,
    recipe_text,
)
from megatron_emo.scaling.speed.throughput_file import parse_study
from megatron_emo.scaling.speed.throughput_report import (
    layout_of_row,
    make_result,
    make_rows,
    peak_flops,
    speedup,
    strong_efficiency,
)

TIMING = Timing(steps=4, warmup=2)
CONTENT = {
    "name": "study",
    "batch": 8,
    "precision": "fp32",
    "objectives": ["mle", "emo1"],
    "model": {"vocab_size": 1000, "seq_length": 64},
    "sizes": {"tiny": {"layers": 4, "hidden": 64, "heads": 4, "ffn": 128}},
    "layouts": [{}, {"tensor_parallel": 2}, {"data_parallel": 2, "micro_batch_size": 2}],
    "launch": {"gpus_per_node": 0, "ranks_per_node": 2},
}


def study(**changes):
    return parse_study({**copy.deepcopy(CONTENT), **changes})


def test_speedup_and_efficiency():
    assert speedup(8.0, 2.0) == 4.0
    assert strong_efficiency(8.0, 1, 2.0, 8) == 0.5
    assert strong_efficiency(8.0, 4, 4.0, 8) == 1.0


def test_a_grid_is_all_combinations_once():
    spec = study(
        layouts={
            "tensor_parallel": [1, 2],
            "micro_batch_size": [1, 4],
            "sequence_parallel": [True, False],
        }
    )
    cells, _ = make_cells(spec)
    names = {cell.layout_name for cell in cells}
    assert names == {
        *("tp1_pp1_cp1_dp1_mb1", "tp1_pp1_cp1_dp1_mb4", "tp2_pp1_cp1_dp1_mb1_sp"),
        *("tp2_pp1_cp1_dp1_mb4_sp", "tp2_pp1_cp1_dp1_mb1", "tp2_pp1_cp1_dp1_mb4"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layouts": [{"tensor_parallel": 3}]}, "attention heads 4"),
        ({"layouts": [{"context_parallel": 2}]}, "context_parallel 2: expected 1 on a CPU"),
        ({"layouts": [{"data_parallel": 4}]}, "4 ranks: expected at most 2"),
        ({"layouts": [{"pipeline_parallel": 3}]}, "divisor of layers 4"),
        ({"layouts": [{"micro_batch_size": 3}]}, "micro_batch_size = 3"),
    ],
)
def test_layouts_that_cannot_be_are_refused_by_name(changes, message):
    spec = study(**changes)
    with pytest.raises(PlanError, match=message):
        make_cells(spec)
    with pytest.raises(PlanError, match="expected at least one"):
        make_cells(spec, skip_impossible=True)
    both = replace(spec, layouts=(*spec.layouts, *study().layouts[:1]))
    cells, skipped = make_cells(both, skip_impossible=True)
    assert len(cells) == 2 and message in skipped[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": []}, "layout: unknown"),
        ({"mode": "sideways"}, "mode: expected one of strong, weak"),
        ({"batch": 0}, "batch: expected 1"),
        ({"objectives": ["gan"]}, "objectives: expected some of"),
        ({"objectives": ["mle", "mle"]}, "objectives: expected each label once"),
        ({"layouts": [{}, {}]}, "layouts: expected each once, got tp1_pp1_cp1_dp1_mb1 2 times"),
        ({"layouts": [{"tensor": 2}]}, "layouts.tensor: unknown; nearest: tensor_parallel"),
        ({"sizes": {}}, "sizes: expected model shapes"),
        ({"precision": "fp8"}, "precision: expected fp32 or bf16 on a CPU"),
        ({"launch": {"gpus_per_node": 8, "ranks_per_node": 2}}, "launch.ranks_per_node"),
    ],
)
def test_files_are_refused_by_key(changes, message):
    with pytest.raises(PlanError, match=message.replace(".", r"\.")):
        study(**changes)


@pytest.mark.parametrize(
    ("layout", "nodes", "message"),
    [
        ({"tensor_parallel": 4, "data_parallel": 3}, 2, "tensor_parallel 4: .* divisor of 6, the"),
        ({"data_parallel": 10}, 2, None),
        ({"tensor_parallel": 4, "data_parallel": 6}, 3, None),
        ({"data_parallel": 17}, 3, "17 ranks: expected the same number on each of 3 nodes"),
    ],
)
def test_no_tensor_parallel_group_spans_nodes(layout, nodes, message):
    launch = {"nodes": nodes, "gpus_per_node": 8}
    spec = study(layouts=[layout], mode="weak", launch=launch)
    if message:
        with pytest.raises(PlanError, match=message):
            make_cells(spec)
    else:
        assert make_cells(spec)[0]


def test_a_recipe_names_a_flag_once():
    layout = {"pipeline_parallel": 2, "virtual_pipeline": 2, "tensor_parallel": 2}
    spec = study(layouts=[layout], launch={"gpus_per_node": 4})
    (cell, *_), _ = make_cells(spec)
    flags = [word for word in shlex.split(recipe_text(cell, spec, TIMING)) if "--" in word]
    assert len(flags) == len(set(flags))
    assert "--num-virtual-stages-per-pipeline-rank" in flags


def test_objectives_take_turns():
    cells, _ = make_cells(study(rounds=2))
    first = [(c.round, c.layout_name, c.objective.label) for c in cells]
    assert len(first) == len(set(first)) == 12
    # Of a layout they follow each other; which is first changes with layout and round.
    firsts = [cells[i].objective.label for i in range(0, 12, 2)]
    assert firsts == ["mle", "emo1", "mle", "emo1", "mle", "emo1"]
    assert all(cells[i].layout_name == cells[i + 1].layout_name for i in range(0, 12, 2))
    assert len({c.name for c in cells}) == 12


def test_weak_scaling_grows_the_batch():
    cells, _ = make_cells(study(mode="weak"))
    assert {(c.layout.data_parallel, c.batch) for c in cells} == {(1, 8), (2, 16)}


def flags_of(cell, spec, tmp_path) -> list[str]:
    """What train.sh would run, by its own --print."""
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(recipe_text(cell, spec, TIMING))
    command = command_of(cell, spec, recipe)
    environment = environment_of(cell, spec, tmp_path)
    done = subprocess.run(
        [command[0], command[1], "--print", *command[2:]],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "python", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout)


def test_train_sh_gets_the_cell(tmp_path):
    spec = study(arguments=["--norm-epsilon", "1e-6"])
    cell = next(c for c in make_cells(spec)[0] if "tp2" in c.name and "emo1" in c.name)
    words = flags_of(cell, spec, tmp_path)

    def value(flag):
        return words[len(words) - 1 - words[::-1].index(flag) + 1]

    assert value("--nproc-per-node") == "2" and value("--objective") == "emo1"
    assert value("--tensor-model-parallel-size") == "2" and "--sequence-parallel" in words
    assert value("--train-iters") == "6" and value("--global-batch-size") == "8"
    assert value("--vocab-size") == "1000" and value("--norm-epsilon") == "1e-6"
    assert "--save" not in words and "--load" not in words and "--emo-time-loss" in words
    assert "--bf16" not in words and value("--emo-cost-dtype") == "fp32"


def test_several_nodes_need_an_allocation(monkeypatch, tmp_path):
    spec = study(launch={"nodes": 2, "gpus_per_node": 2}, layouts=[{"data_parallel": 4}])
    (cell, *_), _ = make_cells(spec)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(PlanError, match="2 nodes: expected a Slurm allocation"):
        command_of(cell, spec, tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert command_of(cell, spec, tmp_path)[:2] == ("srun", "--nodes=2")
    assert environment_of(cell, spec, tmp_path)["RANKS_PER_NODE"] == "2"


def write_log(folder: Path, rank: int, steps: dict[int, float], is_last: bool, loss_ms=(10, 20)):
    """An event log as a run leaves it: a start, and records a step."""
    log = EventLog(folder, rank)
    start = {
        "world_size": 2, "train_iters": 6, "host": "h", "pid": 1, "restart": 0, "objective": "mle",
        "cost_embedding": None, "save": None, "command": [], "environment": {}, "versions": {},
        "layout": {},
    }  # fmt: skip
    log.write("start", 0, **start)
    for iteration, ms in steps.items():
        forward, backward = loss_ms if is_last else (None, None)
        log.write(
            "loss_time",
            iteration,
            forward_ms=forward,
            backward_ms=backward,
            num_microbatches=2,
            peak_bytes=1000 + rank,
            device="CPU",
        )
        if is_last:
            log.write(
                "step", iteration, train_iters=6, losses={}, learning_rate=None, grad_norm=None,
                loss_scale=None, step_ms=ms, work_ms=None, tokens_per_s=1.0, consumed_samples=8,
                skipped=0, nan=0,
            )  # fmt: skip
    log.close()


@pytest.fixture
def cell(tmp_path):
    return next(c for c in make_cells(study())[0] if "dp2" in c.name)


def test_a_log_becomes_a_measurement(cell, tmp_path):
    folder = tmp_path / "cells" / cell.name / EVENTS
    write_log(folder, 0, dict.fromkeys(range(1, 7), 1.0), is_last=False)
    # An earlier start that was killed does not count.
    write_log(folder, 1, {1: 9.0, 2: 9.0, 3: 9.0}, is_last=True)
    write_log(folder, 1, {i: 100.0 + i for i in range(1, 7)}, is_last=True)
    found = read_cell(cell, TIMING, tmp_path)
    assert found.step_s == pytest.approx([0.103, 0.104, 0.105, 0.106])
    assert found.loss_s == pytest.approx([0.03] * 4)
    assert found.peak_bytes == 1001 and found.device == "CPU"


def test_steps_of_an_earlier_start_fill_no_gap(cell, tmp_path):
    folder = tmp_path / "cells" / cell.name / EVENTS
    write_log(folder, 0, {}, is_last=False)
    write_log(folder, 1, dict.fromkeys(range(1, 7), 9.0), is_last=True)
    write_log(folder, 1, dict.fromkeys(range(1, 5), 9.0), is_last=True)
    with pytest.raises(PlanError, match="2 are missing, the first 5"):
        read_cell(cell, TIMING, tmp_path)


@pytest.mark.parametrize(
    ("steps", "loss_ms", "message"),
    [
        (range(1, 6), (1, 2), "steps 3 to 6 in rank_00001.jsonl, 1 are missing, the first 6"),
        (range(1, 7), (None, None), "times of the loss 3 to 6"),
        ((), (1, 2), "steps 3 to 6"),
    ],
)
def test_a_gap_is_an_error_with_the_cells_name(cell, tmp_path, steps, loss_ms, message):
    folder = tmp_path / "cells" / cell.name / EVENTS
    write_log(folder, 0, {}, is_last=False)
    write_log(folder, 1, dict.fromkeys(steps, 5.0), is_last=True, loss_ms=loss_ms)
    with pytest.raises(PlanError, match=message) as caught:
        read_cell(cell, TIMING, tmp_path)
    assert cell.name in str(caught.value)


def test_no_log_is_an_error(cell, tmp_path):
    with pytest.raises(PlanError, match=f"{cell.name}: no measurement"):
        read_cell(cell, TIMING, tmp_path)


def measured(*step_s: float, device: str = "CPU") -> Measured:
    return Measured(
        list(step_s), [s * 0.25 for s in step_s], 1 << 30, device, {}, "2026-01-01T00:00:00Z"
    )


def test_rows_are_what_numpy_says_of_the_steps():
    spec = study(rounds=2)
    cells, _ = make_cells(spec)
    rng = np.random.default_rng(0)
    base = {"tp1": 1.0, "tp2": 0.8, "tp1_pp1_cp1_dp2": 0.5}
    data, steps = {}, {}
    for c in cells:
        key = "dp2" if "dp2" in c.name else "tp2" if "tp2" in c.name else "one"
        base = {"one": 1.0, "tp2": 0.8, "dp2": 0.5}[key] * (1.2 if "emo1" in c.name else 1)
        times = base * rng.uniform(0.9, 1.1, 20)
        data[c.name] = measured(*times)
        steps.setdefault((c.layout_name, c.objective.label), []).append(times)
    rows = make_rows(cells, data, spec, peak=1e12)
    assert len(rows) == 6
    for row in rows:
        rounds = steps[row["layout"], row["objective"]]
        times = np.concatenate(rounds)
        assert row["step_s"] == pytest.approx(np.median(times))
        assert row["step_s_q1"] == pytest.approx(np.percentile(times, 25))
        tokens = 8 * 64
        assert row["tokens_per_s"] == pytest.approx(tokens / np.median(times))
        shape = next(c.shape for c in cells if c.layout_name == row["layout"])
        rate = count_flops(shape, tokens) / np.median(times) / row["gpus"]
        assert row["tflops_per_gpu"] == pytest.approx(rate / 1e12)
        assert row["mfu"] == pytest.approx(rate / 1e12)
        assert row["loss_share"] == pytest.approx(0.25)
        one = np.median(np.concatenate(steps["tp1_pp1_cp1_dp1_mb1", row["objective"]]))
        assert row["speedup"] == pytest.approx(one / np.median(times))
        assert row["efficiency"] == pytest.approx(one / np.median(times) / row["gpus"])
        if row["objective"] == "emo1":
            mle = steps[row["layout"], "mle"]
            ratios = [np.median(a) / np.median(b) for a, b in zip(rounds, mle, strict=True)]
            assert row["ratio"] == pytest.approx(np.median(ratios))
        else:
            assert row["ratio"] is None


def test_strong_efficiency_counts_from_the_fewest_gpus():
    layouts = [{"data_parallel": 2}, {"data_parallel": 8}]
    spec = study(layouts=layouts, objectives=["mle"], launch={"gpus_per_node": 8})
    cells, _ = make_cells(spec)
    times = {2: 1.0, 8: 0.5}
    rows = make_rows(cells, {c.name: measured(times[c.layout.gpus]) for c in cells}, spec, None)
    assert [(row["speedup"], row["efficiency"]) for row in rows] == [(1.0, 1.0), (2.0, 0.5)]


def test_weak_efficiency_is_against_the_same_layout():
    spec = study(
        mode="weak", layouts=[{}, {"data_parallel": 2}, {"tensor_parallel": 2}], objectives=["mle"]
    )
    cells, _ = make_cells(spec)
    times = {"tp1_pp1_cp1_dp1_mb1": 1.0, "tp1_pp1_cp1_dp2_mb1": 1.25, "tp2_pp1_cp1_dp1_mb1_sp": 2.0}
    rows = make_rows(cells, {c.name: measured(times[c.layout_name]) for c in cells}, spec, None)
    assert [row["efficiency"] for row in rows] == [1.0, 0.8, 1.0]
    assert all(row["mfu"] is None for row in rows)


def test_a_busy_machine_is_called_one():
    spec = study(objectives=["mle"])
    cells, _ = make_cells(spec)
    calm = {c.name: measured(1.0, 1.01, 1.02, 0.99) for c in cells}
    busy = calm | {cells[1].name: measured(1.0, 2.0, 1.5, 0.9)}
    for data, is_noisy in ((calm, False), (busy, True)):
        result = make_result(spec, TIMING, make_rows(cells, data, spec, None), [], [])
        assert any("NOISE: in 1 of 3" in note for note in result["notes"]) == is_noisy


def test_a_cell_that_failed_has_no_row():
    spec = study()
    cells, _ = make_cells(spec)
    data = {c.name: measured(1.0) for c in cells[:-1]}
    assert len(make_rows(cells, data, spec, None)) == len(cells) - 1


def test_rows_are_what_pictures_and_estimates_read(tmp_path):
    spec = study()
    cells, _ = make_cells(spec)
    rows = make_rows(cells, {c.name: measured(1.0, 2.0) for c in cells}, spec, None)
    path = tmp_path / "throughput.json"
    path.write_text(json.dumps(make_result(spec, TIMING, rows, [], [])))
    assert len(read_throughput(path).rows) == 6
    assert [layout_of_row(row) for row in rows] == [
        next(c.layout for c in cells if c.layout_name == row["layout"]) for row in rows
    ]


def test_mfu_is_of_the_devices_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", None) == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8", None) == 1978.9e12
    assert peak_flops("CPU", "fp32", None) is None
    assert peak_flops("CPU", "fp32", 1e11) == 1e11


@pytest.mark.parametrize(
    "device",
    [
        *("NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100 80GB PCIe"),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20"),
    ],
)
def test_other_devices_have_no_peak(device):
    assert peak_flops(device, "bf16", None) is None
    assert peak_flops(device, "bf16", 1e15) == 1e15


@pytest.mark.parametrize(
    ("device", "precision", "has_mfu"),
    [
        *(("NVIDIA H200", "bf16", True), ("NVIDIA H200", "fp32", False)),
        *(("NVIDIA H200 NVL", "bf16", False), ("NVIDIA A100-SXM4-80GB", "fp8", False)),
    ],
)
def test_a_row_without_a_peak_is_noted(device, precision, has_mfu):
    spec = study(precision=precision, launch={"gpus_per_node": 2})
    cells, _ = make_cells(spec)
    data = {c.name: measured(1.0, device=device) for c in cells}
    rows = make_rows(cells, data, spec, None)
    assert {row["mfu"] is not None for row in rows} == {has_mfu}
    notes = make_result(spec, TIMING, rows, [], [])["notes"]
    assert (f"no {precision} rate of {device} is known" in " ".join(notes)) != has_mfu


@pytest.mark.parametrize("changes", [{"steps": 1}, {"warmup": 1}])
def test_few_steps_are_refused(changes):
    with pytest.raises(PlanError, match="expected at least 2"):
        Timing(**changes)
