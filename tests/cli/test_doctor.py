"""tools/doctor.py: its report, its verdict and its code; with a run's flags in tests/mcore."""

from __future__ import annotations

import contextlib
import io
import os
import re

import pytest

from megatron_emo.launch import doctor
from megatron_emo.launch.exit_codes import VerdictError

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def one_process(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


def test_one_process_reports_and_is_sound(one_process, load_tool, capsys, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-a-secret")
    assert load_tool("doctor").main([]) == 0
    report = capsys.readouterr().out
    for title in ("versions", "environment", "machine", "checks", "verdict: sound"):
        assert f"\n{title}" in report, title
    assert "NCCL_ALGO" in report and "canary" not in report
    assert "one process: no network" in report


def test_help_says_units_and_defaults(load_tool, capsys):
    with pytest.raises(SystemExit) as caught:
        load_tool("doctor").main(["--help"])
    assert caught.value.code == 0
    assert "seconds" in (shown := capsys.readouterr().out) and "Default: 60" in shown


def test_what_would_not_start_ends_with_78_and_the_reason(one_process, capsys):
    def check():
        print("a thousand arguments")
        raise VerdictError("--lr: expected more")

    assert doctor.diagnose(5.0, check) == 78
    shown = capsys.readouterr().out
    assert shown.endswith("verdict: would not start\nerror: --lr: expected more\n")
    assert "a thousand arguments" not in shown


def check_ranks(variable):
    """Report on two ranks, one of which has `variable`."""
    if variable and os.environ["RANK"] == "1":
        os.environ[variable] = "Ring"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = doctor.diagnose(60.0)
    if variable:
        os.environ.pop(variable, None)
    report = out.getvalue()
    if os.environ["RANK"] == "1":
        assert report == "", report
    elif variable:
        assert re.search(rf"\n  {variable} +\(absent\)  \(rank 0\)\n +Ring  \(rank 1\)\n", report)
        assert "verdict: would not start\nerror: ranks do not agree" in report
    else:
        assert "world (2 ranks): " in report and report.endswith("verdict: sound\n")
    assert code == (78 if variable else 0)


@pytest.mark.parametrize("variable", ["", "NCCL_ALGO"])
def test_two_ranks_are_compared_and_their_network_is_timed(run_distributed, variable):
    run_distributed(2)(check_ranks, variable=variable)
