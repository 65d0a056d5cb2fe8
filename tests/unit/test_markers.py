"""Markers: whole or absent, the first of a start stays, and what scripts read of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_emo.launch import markers
from megatron_emo.launch.markers import Marker, State, main, read_marker, remove_markers

PREEMPTED = Marker(State.PREEMPTED, 75, 1000.0, 0, 40, "stopped by SIGTERM", "SIGTERM")
FAILED = Marker(State.FAILED, 74, 1001.0, 3, 41, "OSError: disk full")


def test_a_marker_is_a_json_file_of_its_name(tmp_path):
    assert markers.write_marker(tmp_path / "new", PREEMPTED)
    assert os.listdir(tmp_path / "new") == ["PREEMPTED"]
    content = json.loads((tmp_path / "new" / "PREEMPTED").read_text())
    assert (content["iteration"], content["signal"], content["exit_code"]) == (40, "SIGTERM", 75)
    assert read_marker(tmp_path / "new") == PREEMPTED


def test_the_first_of_a_start_stays_and_those_of_earlier_starts_go(tmp_path):
    markers.write_marker(tmp_path, PREEMPTED)
    assert not markers.write_marker(tmp_path, FAILED, since=999.0)
    assert read_marker(tmp_path) == PREEMPTED
    assert markers.write_marker(tmp_path, FAILED, since=1000.5)
    assert os.listdir(tmp_path) == ["FAILED"]
    remove_markers(tmp_path)
    assert read_marker(tmp_path) is None


def test_a_kill_while_it_is_written_leaves_none(tmp_path, monkeypatch):
    def no_rename(source, target):
        assert json.loads(Path(source).read_text())["iteration"] == 40
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(KeyboardInterrupt):
        markers.write_marker(tmp_path, PREEMPTED)
    assert read_marker(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"time": 1.0}',
        "[" * 100_000,
        "\x00",
        json.dumps({"exit_code": 0, "time": 1e30, "rank": 0, "iteration": 1, "message": ""}),
        json.dumps({"exit_code": 0, "time": 1.0, "rank": 0, "iteration": "1", "message": ""}),
    ],
)
def test_what_is_no_marker_counts_as_none(tmp_path, text):
    (tmp_path / "FINISHED").write_text(text)
    assert read_marker(tmp_path) is None
    assert markers.write_marker(tmp_path, PREEMPTED)
    assert os.listdir(tmp_path) == ["PREEMPTED"]


def test_secrets_stay_out_of_the_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary1234")
    markers.write_marker(tmp_path, replace(FAILED, message="no access with hf_canary1234"))
    assert read_marker(tmp_path).message == "no access with <redacted>"


@pytest.mark.parametrize(
    ("marker", "code", "line"),
    [
        (PREEMPTED, 75, "PREEMPTED iteration 40 code 75 1970-01-01T00:16:40Z stopped by SIGTERM"),
        (FAILED, 1, "FAILED iteration 41 code 74 1970-01-01T00:16:41Z OSError: disk full"),
        (Marker(State.FINISHED, 0, 5.0, 0, None, ""), 0, "FINISHED code 0 1970-01-01T00:00:05Z"),
        (None, 3, "no marker in "),
    ],
)
def test_the_command_prints_a_line_and_ends_with_the_state(tmp_path, capsys, marker, code, line):
    if marker is not None:
        markers.write_marker(tmp_path, marker)
    assert main([str(tmp_path)]) == code
    assert capsys.readouterr().out.startswith(line)


def test_the_command_passes_over_markers_of_an_earlier_start(tmp_path, capsys):
    markers.write_marker(tmp_path, PREEMPTED)
    assert main([str(tmp_path), "--since", "1000"]) == 75
    assert main([str(tmp_path), "--since", "1001"]) == 3


def test_bash_reads_it_without_torch(tmp_path):
    markers.write_marker(tmp_path, PREEMPTED)
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['markers', sys.argv[1]]; "
        "runpy.run_module('megatron_emo.launch.markers', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (75, "")
