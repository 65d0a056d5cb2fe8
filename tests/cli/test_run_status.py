"""tools/run_status.py: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest

from megatron_emo.launch.events import EventLog
from megatron_emo.launch.markers import Marker, State, write_marker


@pytest.fixture
def run_status(load_tool):
    return load_tool("run_status").main


@pytest.fixture
def run_dir(tmp_path):
    log = EventLog(tmp_path / "events", rank=0)
    log.write("heartbeat", 12, train_iters=20, step_ms=100.0, work_ms=None)
    log.close()
    return tmp_path


def mark(run_dir, state, code):
    write_marker(run_dir, Marker(state, code, 1e9, 0, 12, "OSError: disk full"))


@pytest.mark.parametrize(
    ("state", "code", "expected"), [("FINISHED", 0, 0), ("PREEMPTED", 75, 0), ("FAILED", 74, 3)]
)
def test_exit_codes_and_text(run_status, run_dir, capsys, state, code, expected):
    mark(run_dir, State(state), code)
    assert run_status([str(run_dir)]) == expected
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    assert rows[1][0] == "state"
    assert rows[1][1].startswith(state.lower())
    assert ["step", "12 of 20 (60.0%)"] in rows
    assert (["failed", "first  rank 0, iteration 12"] in rows) == (code == 74)
    assert (["disk", "full"] in rows) == (code == 74)


def test_json_has_types(run_status, run_dir, capsys):
    assert run_status([str(run_dir), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["state"], content["iteration"], content["step_ms"]) == ("running", 12, 100.0)
    assert content["eta_s"] == pytest.approx(0.8)
    assert content["ranks"][0]["rank"] == 0


def test_watch_looks_again_until_the_run_has_ended(run_status, run_dir, capsys, monkeypatch):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            mark(run_dir, State.FAILED, 70)

    monkeypatch.setattr("time.sleep", sleep)
    assert run_status([str(run_dir), "--watch", "5"]) == 3
    assert naps == [5.0, 5.0]
    assert capsys.readouterr().out.count("running") == 2


def test_a_folder_without_a_run_is_code_2(run_status, tmp_path, capsys):
    assert run_status([str(tmp_path)]) == 2
    assert "run_status: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_status([str(tmp_path), "--watch", "0"])
    assert "expected seconds above 0, got 0" in capsys.readouterr().err
