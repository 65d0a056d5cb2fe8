"""train.sbatch on a real two-node Slurm, with a stand-in for torchrun: what starts where, who gets
signals, what is requeued and how often, what an array's tasks run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from clusters import HERE, text_of, wait_for

STAND_IN = """#!/bin/sh
if [ "$3" = megatron_emo.launch.torchrun ]; then
    exec {python} {stand_in} "$@"
fi
exec {python} "$@"
"""


@pytest.fixture
def python(tmp_path) -> str:
    """A Python whose torchrun is stand_in.py."""
    file = tmp_path / "python"
    file.write_text(STAND_IN.format(python=sys.executable, stand_in=HERE / "stand_in.py"))
    file.chmod(0o755)
    return str(file)


def started(run_dir: Path, start: int, node: int) -> dict:
    """How the stand-in was started."""
    return json.loads((run_dir / "checkpoints" / f"start_{start}_node_{node}.json").read_text())


def both_are_ready(output: Path):
    return lambda: text_of(output).count("ready\n") == 2


def argument(call: dict, flag: str) -> str:
    return call["argv"][call["argv"].index(flag) + 1]


def test_a_preempted_job_starts_again_and_finishes(slurm, python, tmp_path):
    output, run_dir = tmp_path / "out", tmp_path / "run"
    settings = {"PYTHON": python, "RUN_DIR": str(run_dir), "BEHAVIOUR": "preempt"}
    job = slurm.submit(output, "gpt_125m", "--lr", "1", **settings)
    wait_for(both_are_ready(output), 60, "both nodes")
    slurm.run("scancel", "--signal=TERM", job)
    said = slurm.wait(job, 90)
    assert (said["JobState"], said["Restarts"]) == ("COMPLETED", "1"), text_of(output)
    lines = [line for line in text_of(output).splitlines() if line.startswith("train.sbatch: ")]
    assert lines[0].startswith(f"train.sbatch: job {job}, start 1: PREEMPTED iteration 7 code 75 ")
    assert lines[0].endswith("by a test; requeued")
    assert lines[1].startswith(f"train.sbatch: job {job}, start 2: FINISHED iteration 7 code 0 ")
    for start in (0, 1):
        calls = [started(run_dir, start, node) for node in (0, 1)]
        for node, call in enumerate(calls):
            assert call["NNODES"] == "2" and argument(call, "--nnodes") == "2"
            assert argument(call, "--node-rank") == str(node)
            assert argument(call, "--rdzv-id") == f"{job}-{start}"
            assert call["argv"][-2:] == ["--lr", "1"]
        endpoint = argument(calls[0], "--rdzv-endpoint")
        assert endpoint == argument(calls[1], "--rdzv-endpoint")
        host, port = endpoint.split(":")
        # n1 is a name that only Slurm knows; the port comes of the job's number.
        assert host == "127.0.0.1" and int(port) == 10000 + 2 * int(job)


def test_requeues_end_at_the_limit(slurm, python, tmp_path):
    output = tmp_path / "out"
    settings = {"PYTHON": python, "RUN_DIR": str(tmp_path), "BEHAVIOUR": "preempted"}
    job = slurm.submit(output, "gpt_125m", MAX_REQUEUES="0", **settings)
    wait_for(both_are_ready(output), 60, "both nodes")
    slurm.run("scancel", "--signal=TERM", job)
    said = slurm.wait(job, 60)
    assert (said["JobState"], said["Restarts"]) == ("FAILED", "0")
    assert said["ExitCode"] == "75:0"
    assert "not requeued: MAX_REQUEUES=0 is reached" in text_of(output)


def test_a_cancelled_job_stays_away(slurm, python, tmp_path):
    output = tmp_path / "out"
    settings = {"PYTHON": python, "RUN_DIR": str(tmp_path), "BEHAVIOUR": "preempted"}
    job = slurm.submit(output, "gpt_125m", **settings)
    wait_for(both_are_ready(output), 60, "both nodes")
    slurm.run("scancel", job)
    said = slurm.wait(job, 60)
    assert (said["JobState"], said["Restarts"]) == ("CANCELLED", "0")
    assert (tmp_path / "checkpoints" / "PREEMPTED").exists()
    assert "; requeued" not in text_of(output)


def test_a_marker_of_an_earlier_start_does_not_count(slurm, python, tmp_path):
    """A configuration error after a preemption would start again until the limit."""
    output = tmp_path / "out"
    (tmp_path / "checkpoints").mkdir()
    marker = {
        "exit_code": 75,
        "time": 1.0,
        "rank": 0,
        "iteration": 3,
        "message": "",
        "signal": None,
    }
    (tmp_path / "checkpoints" / "PREEMPTED").write_text(json.dumps(marker))
    settings = {"PYTHON": python, "RUN_DIR": str(tmp_path), "BEHAVIOUR": "fail"}
    job = slurm.submit(output, "gpt_125m", **settings)
    said = slurm.wait(job, 90)
    # Node 0 would have waited: --kill-on-bad-exit ended it.
    assert (said["JobState"], said["Restarts"]) == ("FAILED", "0")
    assert "srun: error: n2: task 1: Exited with exit code 78" in text_of(output)
    assert "no marker in" in text_of(output)


def test_array_tasks_share_a_list(slurm, python, tmp_path):
    output, tasks = tmp_path / "out", tmp_path / "tasks"
    tasks.write_text(
        "# three runs\n"
        f"RUN_DIR={tmp_path}/a OBJECTIVE=mle SEED=5 gpt_125m --lr 1\n"
        "\n"
        f"RUN_DIR={tmp_path}/b gpt_125m\n"
        f"RUN_DIR={tmp_path}/c moe\n"
    )
    flags = ("--array", "1-2", "--nodes", "1")
    job = slurm.submit(output, flags=flags, PYTHON=python, TASKS=str(tasks))
    for number in slurm.run("squeue", "--noheader", "--array", "-j", job, "-o", "%A").split():
        slurm.wait(number, 90)
    wait_for(lambda: (tmp_path / "c" / "checkpoints" / "FINISHED").exists(), 60, "the third run")
    a, b, c = (started(tmp_path / name, 0, 0) for name in "abc")
    assert (a["OBJECTIVE"], a["SEED"], a["argv"][-2:]) == ("mle", "5", ["--lr", "1"])
    # Settings of one line end with it.
    assert (b["OBJECTIVE"], b["SEED"], c["OBJECTIVE"]) == (None, None, None)
    assert "--num-experts" in c["argv"] and "--num-experts" not in b["argv"]
    assert a["argv"][a["argv"].index("pretrain_gpt_emo.py") - 1] != b["argv"]


@pytest.mark.slow
def test_the_signal_before_the_time_limit_reaches_the_steps_alone(slurm, python, tmp_path):
    output, run_dir = tmp_path / "out", tmp_path / "run"
    settings = {"PYTHON": python, "RUN_DIR": str(run_dir), "BEHAVIOUR": "preempt"}
    flags = ("--time", "2", "--signal", "TERM@60")
    job = slurm.submit(output, "gpt_125m", flags=flags, **settings)
    said = slurm.wait(job, 300)
    assert (said["JobState"], said["Restarts"]) == ("COMPLETED", "1"), text_of(output)
    assert "start 1: PREEMPTED" in text_of(output)
