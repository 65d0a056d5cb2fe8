"""Pretraining through the shipped sbatch, on a real two-node Slurm, against one node: losses equal
to the last bit, also over a preemption."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from clusters import ROOT, TRAIN, clean_environment, text_of, wait_for

from megatron_emo.training_curves import read_scalars

pytestmark = pytest.mark.slow

ITERATIONS = 60
SETTINGS = {
    "SMOKE": "1",
    "GPUS_PER_NODE": "0",
    "TRAIN_ITERS": str(ITERATIONS),
    "SAVE_INTERVAL": "10",
    "EVAL_INTERVAL": "1000",
    "NUM_WORKERS": "1",
}


def on_one_node(run_dir: Path, **settings: str) -> dict:
    """Scalars of the same two ranks on one node, uninterrupted."""
    process = subprocess.run(
        ["bash", TRAIN, "gpt_125m"],
        cwd=ROOT,
        env=clean_environment(**SETTINGS, RUN_DIR=str(run_dir), RANKS_PER_NODE="2", **settings),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return read_scalars(run_dir / "tensorboard")


@pytest.mark.parametrize("tp", ["2", "1"], ids=["TP=2 over two nodes", "DP=2 over two nodes"])
def test_a_preempted_run_of_two_nodes_equals_one_of_one_node(slurm, tmp_path, tp):
    output, run_dir = tmp_path / "out", tmp_path / "run"
    job = slurm.submit(output, "gpt_125m", **SETTINGS, TP=tp, RUN_DIR=str(run_dir))
    # After the first save, whose helper processes then get the signal too.
    reached = f"iteration       14/{ITERATIONS:8d}"
    wait_for(lambda: reached in text_of(output) or "srun ended" in text_of(output), 300, reached)
    slurm.run("scancel", "--signal=TERM", job)
    said = slurm.wait(job, 400)
    printed = text_of(output)
    assert (said["JobState"], said["Restarts"]) == ("COMPLETED", "1"), printed[-3000:]
    assert f"job {job}, start 1: PREEMPTED iteration " in printed
    assert f"job {job}, start 2: FINISHED iteration {ITERATIONS} code 0 " in printed

    expected = on_one_node(tmp_path / "one", TP=tp)
    scalars = read_scalars(run_dir / "tensorboard")
    for name in ("lm loss", "emo loss", "objective", "objective weight", "grad-norm"):
        assert list(scalars[name]) == list(range(1, ITERATIONS + 1)), name
        assert scalars[name] == expected[name], name
    logs = {
        path.parent.parent.parent.parent.name for path in run_dir.glob("logs/*/*/*/*/*/stdout.log")
    }
    assert logs == {"node_0000", "node_0001"}
