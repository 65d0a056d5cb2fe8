"""Signals to real processes: before the first step, and by way of torchrun's agent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emo.launch.events import event_file, read_events
from megatron_emo.launch.markers import State, read_marker

ROOT = Path(__file__).resolve().parents[2]
FLAGS = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8
    --max-position-embeddings 8 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3
    --train-iters 5000 --eval-interval 1000 --eval-iters 2 --log-interval 1 --mock-data
    --split 90,5,5 --tokenizer-type NullTokenizer --vocab-size 50 --num-workers 0
    --objective emo2 --emo-weight-max 2 --save-interval 10000
""".split()


def launch(num_ranks: int, when: str, *flags: str) -> subprocess.CompletedProcess:
    script = [str(ROOT / "tests" / "cli" / "signal_at.py"), when]
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(module if num_ranks > 1 else []), *script, *FLAGS, *flags]
    launch_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: os.environ[key] for key in os.environ if key not in launch_variables}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def records(folder: Path, rank: int) -> list[dict]:
    return list(read_events(event_file(folder / "events", rank)))


@pytest.mark.parametrize("point", ["datasets", pytest.param("preflight", marks=pytest.mark.slow)])
def test_before_the_first_step_a_run_ends_at_once_and_says_so(tmp_path, point):
    result = launch(1, f"{point}:1:0:SIGTERM:self", "--save", str(tmp_path))
    assert result.returncode == 75, result.stderr[-2000:]
    assert "> SIGTERM before the first step: nothing to save, ending at once" in result.stdout
    marker = read_marker(tmp_path)
    assert (marker.state, marker.iteration, marker.signal) == (State.PREEMPTED, None, "SIGTERM")
    assert [record["kind"] for record in records(tmp_path, 0)] == ["start", "signal", "end"]
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.slow
def test_after_another_rank_failed_a_rank_that_waits_for_it_ends(tmp_path):
    result = launch(1, "step:3:0:SIGTERM:stuck", "--save", str(tmp_path))
    assert result.returncode == 70, result.stderr[-2000:]
    *_, received, end = records(tmp_path, 0)
    assert (received["action"], end["exit_code"]) == ("end", 70)
    marker = read_marker(tmp_path)
    assert (marker.state, marker.rank) == (State.FAILED, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "flags"),
    [
        ("step:3:0:SIGTERM:agent", ()),
        ("step:1:0:SIGTERM:agent", ()),
        ("save:1:0+1:SIGTERM:step", ("--save-interval", "4")),
        ("eval_batch:2:1:SIGTERM:step", ("--eval-interval", "3", "--eval-iters", "4000")),
        ("step:3:1:SIGTERM:self", ()),
    ],
    ids=["step", "first-step", "save-as-slurm", "evaluation-as-slurm", "one-rank"],
)
def test_under_torchrun_all_ranks_save_after_the_step_that_the_signal_came_in(
    tmp_path, when, flags
):
    result = launch(2, when, "--save", str(tmp_path), *flags)
    assert result.returncode == 1, result.stderr[-2000:]  # torchrun's only code
    marker = read_marker(tmp_path)
    assert (marker.state, marker.exit_code) == (State.PREEMPTED, 75), result.stderr[-2000:]
    tracker = (tmp_path / "latest_checkpointed_iteration.txt").read_text()
    assert tracker == str(marker.iteration)
    for rank in (0, 1):
        found = records(tmp_path, rank)
        assert (found[-1]["kind"], found[-1]["exit_code"]) == ("end", 75)
        steps = [r["iteration"] for r in found if r["kind"] in ("step", "heartbeat")]
        assert steps[-1] == marker.iteration
        arrivals = [r for r in found if r["kind"] == "signal" and r["action"] != "none"]
        assert all(marker.iteration <= r["iteration"] + 1 for r in arrivals)
    assert "error: stopped by SIGTERM" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["self", "agent"])
def test_under_torchrun_before_the_first_step_ranks_that_wait_end_too(tmp_path, target):
    result = launch(2, f"datasets:1:1:SIGTERM:{target}", "--save", str(tmp_path))
    assert result.returncode == 1
    marker = read_marker(tmp_path)
    assert (marker.state, marker.iteration) == (State.PREEMPTED, None), result.stderr[-2000:]
    assert "SIGTERM before the first step: nothing to save" in result.stdout
    assert not list(tmp_path.glob("iter_*"))
