"""Two hosts with addresses of their own: torchrun's rendezvous across them, a cable that is taken
out in the middle of a step, and the start after it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from clusters import TRAIN, text_of, wait_for

from megatron_emo.training_curves import read_scalars

pytestmark = pytest.mark.slow

TIMEOUT_S = 15
SETTINGS = {
    "SMOKE": "1",
    "GPUS_PER_NODE": "0",
    "TP": "2",
    "NNODES": "2",
    "MASTER_ADDR": "10.77.0.1",
    "NETWORK_INTERFACE": "emo0",
    "NUM_WORKERS": "0",
    "SAVE_INTERVAL": "10",
    "EVAL_INTERVAL": "1000000",
    "DISTRIBUTED_TIMEOUT_MINUTES": "3",
    "DISTRIBUTED_TIMEOUT_SECONDS_AFTER_INIT": str(TIMEOUT_S),
}


def start(hosts, tmp_path: Path, name: str, **settings: str) -> tuple[list, list[Path]]:
    """Start one node on each host; returns the processes and their logs."""
    logs = [tmp_path / f"{name}_{rank}" for rank in (0, 1)]
    settings = {**SETTINGS, "RUN_DIR": str(tmp_path / "run"), **settings}
    command = ("bash", TRAIN, "gpt_125m")
    return [
        hosts.start(rank + 1, logs[rank], *command, NODE_RANK=str(rank), **settings)
        for rank in (0, 1)
    ], logs


def iterations(logs: list[Path]) -> int:
    return max(text_of(log).count(" | lm loss: ") for log in logs)


def test_a_cut_cable_ends_every_process_in_time_and_a_restart_resumes(hosts, tmp_path):
    nodes, logs = start(hosts, tmp_path, "first", TRAIN_ITERS="100000")
    running = lambda: iterations(logs) >= 25 or any(node.poll() for node in nodes)  # noqa: E731
    wait_for(running, 300, "25 iterations")
    assert [node.poll() for node in nodes] == [None, None], text_of(logs[0])[-3000:]
    hosts.cut()
    cut = time.monotonic()
    wait_for(lambda: not hosts.processes(), TIMEOUT_S + 10, "end of every process")
    print(f"every process gone {time.monotonic() - cut:.1f} s after the cut")
    for rank, (node, log) in enumerate(zip(nodes, logs, strict=True)):
        assert node.wait(10) != 0
        assert f": rank {rank} failed first on this node: " in text_of(log).splitlines()[-1]

    saved = int(text_of(tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"))
    assert saved % 10 == 0 and saved > 0
    hosts.mend()
    nodes, logs = start(hosts, tmp_path, "second", TRAIN_ITERS="100000")
    wait_for(lambda: iterations(logs) >= 5 or any(node.poll() for node in nodes), 300, "resume")
    for node in nodes:
        node.terminate()
    assert [node.wait(120) for node in nodes] == [75, 75], text_of(logs[0])[-3000:]
    scalars = read_scalars(tmp_path / "run" / "tensorboard")
    assert list(scalars["lm loss"])[: saved + 5] == list(range(1, saved + 6))
    assert f"successfully loaded checkpoint from {tmp_path}/run/checkpoints" in text_of(logs[0])
    assert f"at iteration {saved}" in text_of(logs[0])
