"""`launch/torchrun.py`: the last line and the exit code of one node; by real processes if slow."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import ROOT, clean_environment, text_of, wait_for
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_emo.launch import torchrun
from megatron_emo.launch.markers import Marker, State, write_marker

WORKER = """
import json, os, signal, subprocess, sys, time
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    behaviour, save = sys.argv[1], sys.argv[sys.argv.index("--save") + 1]
    if os.environ["RANK"] == "1":
        if behaviour == "raise":
            raise ValueError("a line\\nthe last line")
        if behaviour == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "code":
            sys.exit(78)
        if behaviour == "orphan":
            print("orphan", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
            os._exit(70)
        if behaviour == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            marker = {"exit_code": 70, "time": time.time(), "rank": 1, "iteration": 3}
            with open(os.path.join(save, "FAILED"), "w") as file:
                json.dump(marker | {"message": "lost", "signal": None}, file)
    if behaviour == "done":
        return
    def stop(*_):
        if behaviour == "preempted":
            marker = {"exit_code": 75, "time": time.time(), "rank": 0, "iteration": 3}
            with open(os.path.join(save, "PREEMPTED"), "w") as file:
                json.dump(marker | {"message": "saved\\n3", "signal": "SIGTERM"}, file)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(100)

main()
"""


def start(tmp_path: Path, behaviour: str) -> tuple[subprocess.Popen, Path]:
    worker, log = tmp_path / "worker.py", tmp_path / "log"
    worker.write_text(WORKER)
    launch = ["--standalone", "--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs")]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_emo.launch.torchrun", *launch]
            + [str(worker), behaviour, "--save", str(tmp_path)],
            cwd=ROOT,
            env=clean_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, log


def failure_of(tmp_path: Path, rank: int, exitcode: int, message, timestamp: int):
    file = tmp_path / f"error_{rank}.json"
    if message is not None:
        content = {"message": message, "extraInfo": {"py_callstack": "", "timestamp": timestamp}}
        file.write_text(json.dumps({"message": content}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))


def last_line(monkeypatch, capsys, error: Exception, *argv: str) -> tuple[int, str]:
    def main(arguments):
        assert arguments == list(argv)
        raise error

    monkeypatch.setattr("torch.distributed.run.main", main)
    code = torchrun.main(list(argv))
    return code, capsys.readouterr().err.splitlines()[-1].partition(": ")[2]


@pytest.mark.parametrize(
    ("exitcode", "message", "code", "line"),
    [
        (70, "ValueError: a line\nthe last line\n", 70, "the last line; exit code 70"),
        (78, None, 78, "no error file; exit code 78"),
        (-9, None, 137, "killed by SIGKILL; exit code 137"),
    ],
)
def test_the_last_line_names_the_first_failing_rank(
    monkeypatch, capsys, tmp_path, exitcode, message, code, line
):
    failures = {
        4: failure_of(tmp_path, 0, 1, "a later one", 20_000_000_000),
        5: failure_of(tmp_path, 1, exitcode, message, 100),
    }
    error = ChildFailedError("pretrain_gpt_emo.py", failures)
    said = last_line(monkeypatch, capsys, error, "pretrain_gpt_emo.py")
    assert said == (code, f"rank 5 failed first on this node: {line}")


TERM = SignalException("got a signal", signal.SIGTERM)


@pytest.mark.parametrize("save", [["--save", "{}"], ["--save", "elsewhere", "--save={}"]])
@pytest.mark.parametrize("error", ["signal", "failure"])
def test_what_the_run_says_of_itself_counts(monkeypatch, capsys, tmp_path, save, error):
    argv = ["pretrain_gpt_emo.py", *(word.format(tmp_path) for word in save), "--lr", "1"]
    marker = Marker(State.PREEMPTED, 75, time.time() + 5, 0, 3, "saved\n3", "SIGTERM")
    write_marker(tmp_path, marker)
    if error == "signal":
        raised, line = TERM, "stopped by SIGTERM"
    else:
        raised = ChildFailedError("p", {1: failure_of(tmp_path, 1, 143, None, 0)})
        line = "rank 1 failed first on this node: no error file"
    said = last_line(monkeypatch, capsys, raised, *argv)
    assert said == (75, f"{line}; the run: PREEMPTED saved 3; exit code 75")


@pytest.mark.parametrize("state", [None, State.FINISHED, State.PREEMPTED])
def test_a_marker_of_an_earlier_start_does_not_count(monkeypatch, capsys, tmp_path, state):
    if state is not None:
        write_marker(tmp_path, Marker(state, 75, time.time() - 5, 0, 3, "saved"))
    said = last_line(monkeypatch, capsys, TERM, "p.py", "--save", str(tmp_path))
    assert said == (143, "stopped by SIGTERM; exit code 143")


def test_the_first_rank_of_all_nodes_is_named(monkeypatch, capsys, tmp_path):
    marker = Marker(State.FAILED, 70, time.time() + 5, 3, 8, "RuntimeError: a\n  reason")
    write_marker(tmp_path, marker)
    error = ChildFailedError("p", {0: failure_of(tmp_path, 0, 70, "a timeout", 0)})
    code, line = last_line(monkeypatch, capsys, error, "p.py", "--save", str(tmp_path))
    assert code == 70
    assert line == (
        "rank 0 failed first on this node: a timeout; "
        "the run: FAILED rank 3: RuntimeError: a reason; exit code 70"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "code", "line"),
    [
        ("raise", 1, "rank 1 failed first on this node: the last line; exit code 1"),
        ("killed", 137, "rank 1 failed first on this node: killed by SIGKILL; exit code 137"),
        ("code", 78, "rank 1 failed first on this node: no error file; exit code 78"),
    ],
)
def test_real_ranks_that_fail(tmp_path, behaviour, code, line):
    process, log = start(tmp_path, behaviour)
    assert process.wait(90) == code
    assert log.read_text().splitlines()[-1].endswith(f": {line}")


@pytest.mark.slow
def test_what_a_rank_leaves_behind_ends_with_it(tmp_path):
    process, log = start(tmp_path, "orphan")
    assert process.wait(90) == 70
    orphan = int(re.search(r"orphan (\d+)", text_of(log)).group(1))
    assert not Path(f"/proc/{orphan}").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_after_a_fault_is_ended(tmp_path):
    process, log = start(tmp_path, "hang")
    wait_for((tmp_path / "FAILED").exists, 90, "the fault")
    assert process.wait(torchrun.FAULT_GRACE_S + 10) == 137
    assert (
        log.read_text()
        .splitlines()[-1]
        .endswith("killed by SIGKILL; the run: FAILED rank 1: lost; exit code 137")
    )


@pytest.mark.slow
def test_a_run_that_ends_well_ends_with_0(tmp_path):
    assert start(tmp_path, "done")[0].wait(90) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "code", "line"),
    [
        ("preempted", 75, "stopped by SIGTERM; the run: PREEMPTED saved 3; exit code 75"),
        ("without a word", 143, "stopped by SIGTERM; exit code 143"),
    ],
)
def test_a_signal_to_the_agent_is_preempted_where_the_run_says_so(tmp_path, behaviour, code, line):
    stale = {"exit_code": 75, "time": 5.0, "rank": 0, "iteration": 1, "message": "", "signal": None}
    (tmp_path / "PREEMPTED").write_text(json.dumps(stale))
    process, log = start(tmp_path, behaviour)
    wait_for(lambda: text_of(log).count("ready") == 2, 90, "both ranks")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code
    assert log.read_text().splitlines()[-1].endswith(f": {line}")
