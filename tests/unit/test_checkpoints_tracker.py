"""A tracker is its former name or the new one, whatever instruction its writer ends at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emo.checkpoints import read_tracker, write_tracker
from megatron_emo.torch_dist import TRACKER

ROOT = Path(__file__).resolve().parents[2]

# Forks for every instruction of a write and kills there; prints what was found, and how often. The
# writer's file alone, since a fork of a process with torch in it takes a hundred times as long.
KILLER = """
import importlib.util, os, signal, sys
from collections import Counter

spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
os.fsync = lambda descriptor: None  # what is killed leaves its pages to the system
path, found = sys.argv[2], Counter()
monitoring = sys.monitoring
monitoring.use_tool_id(monitoring.DEBUGGER_ID, "kill")

def write_until(last):
    count = 0
    def count_one(code, offset):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    monitoring.register_callback(
        monitoring.DEBUGGER_ID, monitoring.events.INSTRUCTION, count_one)
    monitoring.set_events(monitoring.DEBUGGER_ID, monitoring.events.INSTRUCTION)
    files.write_durably(path, b"20")
    os._exit(0)

for last in range(1, 10_000):
    with open(path, "wb") as stream:
        stream.write(b"10")
    child = os.fork()
    if child == 0:
        write_until(last)
    _, status = os.waitpid(child, 0)
    found[open(path, "rb").read()] += 1
    if os.WIFEXITED(status):
        break
print(last, found[b"10"], found[b"20"], sorted(os.listdir(os.path.dirname(path))))
"""


def test_a_writer_killed_at_any_instruction_leaves_one_of_the_two_names(tmp_path):
    writer = ROOT / "megatron_emo" / "checkpoints" / "files.py"
    result = subprocess.run(
        [sys.executable, "-I", "-c", KILLER, str(writer), str(tmp_path / TRACKER)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    last, former, new, files = result.stdout.split(" ", 3)
    # Each time one name or the other, and both happened: kills came before and after the rename.
    assert int(last) == int(former) + int(new) and int(former) > 100 and int(new) > 10
    assert files.strip() == str([TRACKER])


def test_a_part_left_behind_is_no_hindrance(tmp_path):
    (tmp_path / f".{TRACKER}.part").write_text("99")
    write_tracker(tmp_path, 12)
    assert read_tracker(tmp_path) == 12


def test_a_full_disk_leaves_the_former_name(tmp_path, monkeypatch):
    write_tracker(tmp_path, 10)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tracker(tmp_path, 20)
    assert read_tracker(tmp_path) == 10
