"""tools/gpu_check.py through its main()."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_emo.gpu_check import run, training

ON_CPU = ["--device", "cpu", "--small"]
QUICK = [name for name in run.CHECKS if name != "training"]


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("gpu_check").main


def test_summary_on_stdout_progress_on_stderr_figures_in_json(tmp_path, main, capsys):
    file = tmp_path / "gpu_check.json"
    assert main([*ON_CPU, "--only", *QUICK, "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "| loss-parity | passed |" in shown.out
    assert "[7/7] timing passed in" in shown.err and "[7/7]" not in shown.out
    stored = json.loads(file.read_text())
    assert {"date", "commit", "machine", "torch"} <= set(stored["run"])
    assert [check["name"] for check in stored["checks"]] == QUICK
    skipped = [check["name"] for check in stored["checks"] if check["status"] == "skipped"]
    assert skipped == ["kernels", "synchronisation"]
    assert all(check["reason"] for check in stored["checks"] if check["status"] == "skipped")


@pytest.mark.slow
def test_a_real_run_trains(monkeypatch, main, capsys):
    flags = {"emo1": "--objective emo1 --emo-loss-path logits"}
    monkeypatch.setattr(training, "planned_runs", lambda settings, record: flags)
    assert main([*ON_CPU, "--only", "training"]) == 0
    assert "| emo1: lm loss falls | True |  | ok |" in capsys.readouterr().out


def test_a_failed_check_is_the_exit_code(monkeypatch, main, capsys):
    monkeypatch.setitem(run.CHECKS, "memory", lambda settings, record: record.expect("fits", False))
    assert main([*ON_CPU, "--only", "memory"]) == 1
    assert "| memory | failed |" in capsys.readouterr().out


def test_list_names_every_check(main, capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(run.CHECKS)


def test_mistakes_end_in_one_line(monkeypatch, main):
    with pytest.raises(SystemExit, match="^gpu_check: --only: expected of environment, "):
        main([*ON_CPU, "--only", "speed"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^gpu_check: --device cuda: torch finds no CUDA device"):
        main([])
