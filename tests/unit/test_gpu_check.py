"""The GPU checks' own logic, and those of their parts that run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megatron_emo.benchmark.measure import VariantResult
from megatron_emo.gpu_check import (
    environment,
    kernels,
    memory,
    narrow_tables,
    parity,
    report,
    run,
    synchronisation,
    timing,
    training,
)
from megatron_emo.gpu_check.dense import dense_loss
from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.reference import reference_loss

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings("cpu", small=True)


def failed(record: Record) -> list[str]:
    return [figure.name for figure in record.failures]


@pytest.fixture
def h200(monkeypatch):
    """Full-size settings of a machine that has the card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return Settings("cuda")


def test_bounds_decide_and_notes_do_not():
    record = Record()
    record.note("shown", 9.0)
    record.bound("within", 1.0, 1.0)
    record.bound("above", 1.1, 1.0)
    record.bound("not a number", float("nan"), 1.0)
    record.bound("does not apply", 2.0, 1.0, applies=False)
    record.expect("holds", True)
    record.expect("does not hold", False)
    assert failed(record) == ["above", "not a number", "does not hold"]


def test_a_failing_check_keeps_its_figures_and_the_rest_runs(monkeypatch):
    def breaks(settings, record):
        record.note("found before", 1)
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    checks = {
        "first": breaks,
        "second": lambda settings, record: record.skip("no such thing here"),
        "third": lambda settings, record: record.bound("too slow", 2.0, 1.0),
        "fourth": lambda settings, record: record.bound("fast", 0.5, 1.0),
    }
    monkeypatch.setattr(run, "CHECKS", checks)
    lines = []
    results = run.run_checks(SMALL, report=lines.append)
    assert [result.status for result in results] == ["failed", "skipped", "failed", "passed"]
    assert results[0].figures[0].name == "found before"
    assert results[0].summary == "RuntimeError: CUDA error: an illegal memory access"
    assert [result.reason for result in results[1:]] == ["no such thing here", "too slow", ""]
    assert run.has_failed(results) and not run.has_failed(results[3:])
    assert len(lines) == 8 and lines[2].startswith("[2/4] second")
    only = run.run_checks(SMALL, ["fourth", "second"])
    assert [result.name for result in only] == ["second", "fourth"]
    with pytest.raises(ValueError, match="--only: expected of first.*got 'fifth'"):
        run.run_checks(SMALL, ["fifth"])


def test_fp32_products_are_exact_during_a_check_alone(monkeypatch):
    seen = []
    check = {"one": lambda *_: seen.append(torch.get_float32_matmul_precision())}
    monkeypatch.setattr(run, "CHECKS", check)
    torch.set_float32_matmul_precision("high")
    try:
        run.run_checks(SMALL)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA device"):
        Settings("cuda")


def test_every_check_says_in_one_line_what_it_does():
    for name in run.CHECKS:
        assert 20 < len(run.describe_check(name)) < 96, name
        assert run.describe_check(name).endswith("."), name


@pytest.mark.parametrize("objective", ["mle", "emo1"])
def test_dense_loss_is_the_reference(objective):
    logits = torch.randn(9, 31, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 31, (9,))
    embedding = torch.randn(31, 5, dtype=torch.float64)
    embedding[3] = 0
    unit = torch.nn.functional.normalize(embedding)
    losses = [
        dense_loss(logits, target, unit, objective),
        reference_loss(logits, target, objective, embedding).loss,
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_row_kernel_comparisons_hold_for_the_torch_twins():
    record = Record()
    for vocab_size, dtype, scale in kernels._CASES[:4]:
        kernels.compare_with_dense(SMALL, record, vocab_size, dtype, scale)
    kernels.compare_infinities(SMALL, record)
    kernels.compare_two_runs(SMALL, record)
    kernels.check_wide_offsets(SMALL, record, vocab_size=211, limit=211 * 40)
    assert failed(record) == []
    assert len(record.figures) == 4 * 2 + 3 + 2 + 2


def test_row_kernel_comparisons_see_a_wrong_gradient(monkeypatch):
    right = kernels.loss_and_gradient

    def wrong(example):
        loss, gradient = right(example)
        gradient[-1] = 0  # as if its offset had wrapped
        return loss, gradient

    monkeypatch.setattr(kernels, "loss_and_gradient", wrong)
    record = Record()
    kernels.compare_with_dense(SMALL, record, 301, torch.float32, 3.0)
    kernels.check_wide_offsets(SMALL, record, vocab_size=211, limit=211 * 40)
    assert failed(record) == [
        "V=301 float32 logits of 3: gradient error",
        "104 x 211 logits: gradient error",
    ]


def test_launches_are_counted_and_the_kernels_put_back():
    triton_kernels = pytest.importorskip("megatron_emo.loss.triton_kernels")
    before = triton_kernels.row_statistics
    with pytest.raises(TypeError), kernels.launched_kernels() as launched:
        triton_kernels.row_statistics()
    assert launched == {"row_statistics"} and triton_kernels.row_statistics is before


def test_loss_parity_holds_and_sees_a_wrong_gradient(monkeypatch):
    record = Record()
    parity.check_loss_parity(SMALL, record)
    assert failed(record) == []
    names = [figure.name for figure in record.figures]
    assert sum(name.startswith("fp32") for name in names) == 12
    right = parity.run_path

    def wrong(layer, objective, path, upstream, frozen=""):
        results = right(layer, objective, path, upstream, frozen)
        if path == "recompute" and "dW" in results:
            results["dW"][0] *= 1.01
        return results

    monkeypatch.setattr(parity, "run_path", wrong)
    record = Record()
    parity.check_loss_parity(SMALL, record)
    assert [name.partition(":")[0] for name in failed(record)] == [
        "fp32 mle recompute",
        "fp32 emo1 recompute",
        "fp32 emo1 recompute, one input frozen",
    ]


def test_bf16_errors_are_held_to_those_of_the_plain_computation(monkeypatch):
    layer = parity.make_layer(SMALL, torch.bfloat16)
    monkeypatch.setattr(parity, "PATHS", ("vocab_parallel_loss", "recompute"))
    record = Record()
    parity.compare_in_bf16(record, layer, "emo1", applies=True)
    assert failed(record) == []
    right = parity.run_path

    def rounded_again(*args):
        results = right(*args)
        return results | {"dX": (results["dX"].float() * 1.005).bfloat16()}

    monkeypatch.setattr(parity, "run_path", rounded_again)
    parity.compare_in_bf16(record, layer, "emo1", applies=True)
    assert len(failed(record)) == 2


def test_table_products_hold_and_a_wrong_one_is_seen(monkeypatch):
    record = Record()
    narrow_tables.check_narrow_tables(SMALL, record)
    assert failed(record) == [] and len(record.figures) == 10
    right = narrow_tables.cost_of_targets

    def wrong(rows, table, dtype):
        return right(rows.to(torch.bfloat16).to(rows.dtype), table, dtype)

    monkeypatch.setattr(narrow_tables, "cost_of_targets", wrong)
    record = Record()
    narrow_tables.check_narrow_tables(SMALL, record)
    assert failed(record) == ["fp32 V=320 d=48: product", "fp32 V=301 d=45: product"]


def test_waits_are_listed_by_line_and_other_warnings_left_out(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with synchronisation.waits() as lines:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (somewhere)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    assert len(lines) == 2 and lines[0].startswith("test_gpu_check.py:")
    assert synchronisation.describe_lines([*lines, "a.py:1"]) == f"{lines[0]} x 2, a.py:1"
    assert synchronisation.describe_lines([]) == "nowhere"


def test_more_waits_than_expected_fail(monkeypatch, h200):
    layer = parity.make_layer(SMALL, torch.bfloat16)
    monkeypatch.setattr(synchronisation, "make_layer", lambda *_: layer)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    right = synchronisation.run_once

    def run_once(layer, objective, path, host_target):
        right(layer, objective, path, host_target)
        if path in ("recompute", "forward"):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(synchronisation, "run_once", run_once)
    record = Record()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        synchronisation.check_synchronisation(h200, record)
    assert failed(record) == [
        f"{name} recompute: waits, planned targets" for name in ("mle", "emo1")
    ]


def test_peaks_are_those_of_the_run_alone():
    kept = torch.ones(1 << 18)

    def allocate():
        torch.zeros(1 << 18).add_(kept)

    assert memory.peak_bytes("cpu", allocate) == 1 << 20


def test_memory_is_bounded_at_full_size_only():
    record = Record()
    memory.check_memory(SMALL, record)
    bounded = [figure.name for figure in record.figures if figure.passed is not None]
    assert bounded == ["V=509 emo1 recompute into main_grad: beyond dX, MiB"]
    assert failed(record) == []


def fake_result(*seconds: float) -> VariantResult:
    return VariantResult(
        gradient_error=0.0, peak_bytes=0, seconds={"gpu": list(seconds)}, ratios={}
    )


def test_times_are_held_to_their_bounds(h200):
    results = {
        "mle-fused-forward": fake_result(0.040, 0.040),
        "emo1-fused-forward": fake_result(0.047, 0.047),
        "mle-fused-logits": fake_result(0.040, 0.040),
        "emo1-fused-logits": fake_result(0.045, 0.045),
    }
    record = Record()
    for vocab_size in memory.VOCAB_SIZES:
        for name, result in results.items():
            timing.record_variant(h200, record, vocab_size, name, results, result)
    assert failed(record) == [
        "V=131072 emo1-fused-forward: ms (median)",
        "V=131072 emo1-fused-forward over mle-fused-forward",
        "V=16384 emo1-fused-forward over mle-fused-forward",
    ]


def test_another_card_has_ratios_but_no_milliseconds_to_keep(h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    results = {"mle-fused-forward": fake_result(0.09), "emo1-fused-forward": fake_result(0.1)}
    record = Record()
    timing.record_variant(h200, record, 131072, "emo1-fused-forward", results, fake_result(0.1))
    assert [figure.at_most for figure in record.figures] == [None, 1.15]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    timing.record_variant(h200, record, 131072, "emo1-fused-forward", results, fake_result(0.9))
    assert [figure.at_most for figure in record.figures[2:]] == [None, None]


def test_timing_runs_the_variants_there_are():
    names = timing.chosen_variants()
    assert {"torch-ce", "mle-logits", "emo1-fused-forward"} <= set(names)
    results, distinct = timing.time_variants(SMALL, 61)
    assert set(results) == set(names) and 0 < distinct <= 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 570.1, 700 W, 80 W, 345 MHz, 1980 MHz, 31, 0 %, Disabled", "700 W"),
        ("echo nothing of use", None),
        ("exit 9", None),
    ],
)
def test_what_nvidia_smi_says_is_kept(tmp_path, monkeypatch, answer, expected):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{answer}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    values = environment.query_nvidia_smi()
    assert values.get("power.limit") == expected
    assert expected or set(values) == {"nvidia-smi"}


def test_absent_packages_are_named_absent():
    assert environment.installed_version("no-such-package-anywhere") == "absent"
    assert environment.installed_version("torch") == torch.__version__.partition("+")[0]


def test_training_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run.SkippedCheck, match="megatron-core is not installed"):
        training.check_training(SMALL, Record())


def test_a_run_that_fails_shows_its_last_lines(tmp_path, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nprint(sys.argv[-3])\nsys.exit('out of memory')\n")
    monkeypatch.setattr(training, "SCRIPT", script)
    with pytest.raises(RuntimeError, match="^out of memory\nafter: --bf16\n--bf16\nout of mem"):
        training.run_pretraining(SMALL, ["--bf16"])


def test_losses_that_do_not_fall_fail(monkeypatch):
    losses = {1: 5.0, training.ITERATIONS: 5.0}
    monkeypatch.setattr(training, "run_pretraining", lambda settings, flags: losses)
    record = Record()
    training.check_training(SMALL, record)
    assert failed(record) == ["mle: lm loss falls", "emo1: lm loss falls"]


def test_a_gpu_trains_on_every_path_and_in_fp8_where_it_can(monkeypatch, h200):
    monkeypatch.setattr(training, "transformer_engine_obstacle", lambda: "")
    planned = training.planned_runs(h200, Record())
    assert list(planned)[2:] == [
        *("emo1 recompute", "emo1 forward"),
        *("emo1 transformer engine", "emo1 transformer engine fp8", "mle transformer engine fp8"),
    ]
    assert "--fp8-format hybrid" in planned["emo1 transformer engine fp8"]
    monkeypatch.setattr(training, "transformer_engine_obstacle", lambda: "ImportError: no")
    record = Record()
    assert len(training.planned_runs(h200, record)) == 4
    assert record.figures[0].value == "not made: ImportError: no"


def test_json_holds_what_is_no_number_as_text(tmp_path):
    record = Record()
    record.bound("lost", float("nan"), 1.0)
    result = run.CheckResult("one", run.FAILED, "lost", 0.1234, record.figures)
    file = tmp_path / "new" / "out.json"
    report.write_json(str(file), {"date": "today"}, [result])
    stored = json.loads(file.read_text())
    assert stored["run"] == {"date": "today"}
    assert stored["checks"][0]["figures"] == [
        {"name": "lost", "value": "nan", "at_most": 1.0, "passed": False}
    ]


def test_the_summary_names_what_failed():
    record = Record()
    record.bound("slow | path", 2.0, 1.0)
    result = run.CheckResult("one", run.FAILED, "line 1\nline 2", 0.1, record.figures)
    text = report.format_markdown(report.describe_run(SMALL), [result])
    assert "| one | failed | 0.1 | line 1 |" in text
    assert "| slow \\| path | 2 | <= 1 | FAILED |" in text


def test_all_but_training_runs_without_megatron():
    code = """
import sys
sys.modules["megatron"] = None
from megatron_emo.gpu_check.record import Settings
from megatron_emo.gpu_check.run import CHECKS, run_checks
results = run_checks(Settings("cpu", small=True))
assert [result.name for result in results] == list(CHECKS)
print([(result.name, result.status, result.reason) for result in results])
assert {result.name for result in results if result.status == "skipped"} == {
    "kernels", "synchronisation", "training"
}
assert not any(result.status == "failed" for result in results)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
