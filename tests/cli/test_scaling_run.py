"""`tools/scaling_study.py run` with real training: a study that is killed at every place is, once
resumed, the study that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pretraining import read_scalars

from megatron_emo.launch.events import event_file, read_events
from megatron_emo.torch_dist import TensorReader

ROOT = Path(__file__).parents[2]
SEED = 20
PLAN = """
name: toy
tokens_per_param: [0.6]
tolerance: 0.2
sizes: [a, b]
objectives: [mle, emo1]
model: {vocab_size: 127, seq_length: 16}
recipe:
  bundle: cosine
  batch: 4
  lr_max: 1
  table:
    a: {layers: 1, hidden: 16, heads: 2, ffn: 32, learning_rate: 1e-2}
    b: {layers: 1, hidden: 24, heads: 2, ffn: 48, learning_rate: 1e-2}
data:
  path: [0.5, one_text_document, 0.5, two_text_document]
  tokenizer_type: NullTokenizer
  tokenizer_model: none
launch: {gpus_per_node: 0, save_interval: 4, shutdown_s: 60, num_workers: 0}
allow: [too-few-points, one-line, few-steps, learning-rate]
"""


def write_documents(prefix: Path, generator: np.random.Generator) -> None:
    """Write Megatron's indexed form: 16-bit tokens, one sequence a document."""
    documents = [generator.integers(0, 126, generator.integers(20, 60)) for _ in range(60)]
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 2
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    index = np.arange(len(lengths) + 1, dtype=np.int64)
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype(np.uint16).tobytes())
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + index.tobytes())


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    generator = np.random.default_rng(1)
    for name in ("one", "two"):
        write_documents(folder / f"{name}_text_document", generator)
    (folder / "plan.yaml").write_text(PLAN)
    return folder / "plan.yaml"


class Study:
    """A study in a folder, and the runner that trains it."""

    def __init__(self, plan: Path, output: Path) -> None:
        self.plan, self.output = plan, output

    def start(self, *flags: str) -> subprocess.Popen:
        tool = [sys.executable, str(ROOT / "tools" / "scaling_study.py"), "run"]
        words = ["--plan", str(self.plan), "--output", str(self.output), "--jobs", "2", *flags]
        with open(f"{self.output}.log", "ab") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen([*tool, *words], stdout=log, stderr=log, env=env)

    def finish(self, *flags: str) -> None:
        code = self.start(*flags).wait(900)
        assert code == 0, Path(f"{self.output}.log").read_text()[-3000:]

    @property
    def entries(self) -> list[dict]:
        return json.loads((self.output / "manifest.json").read_text())["runs"]

    def folder(self, entry: dict) -> Path:
        return self.output / "runs" / entry["name"]

    def events(self, entry: dict) -> list[dict]:
        log = event_file(self.folder(entry) / "train" / "checkpoints" / "events", 0)
        return list(read_events(log)) if log.exists() else []

    def wait_for_step(self, index: int, iteration: int) -> dict:
        """Wait until the newest start of a run has trained that far; return its start record."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            is_written = (self.output / "manifest.json").exists()
            events = self.events(self.entries[index]) if is_written else []
            steps = [event["iteration"] for event in events if event["kind"] == "step"]
            if steps and steps[-1] >= iteration:
                return [event for event in events if event["kind"] == "start"][-1]
            time.sleep(0.01)
        raise AssertionError(f"run {index}: not at step {iteration} in time")


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """Of a rank: torchrun."""
    return psutil.Process(pid).ppid()


def wait_for_end(pid: int) -> None:
    """Of a rank whose torchrun was killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(20)


def steps_each_once(events: list[dict]) -> dict[int, float]:
    """Milliseconds by iteration; a start's second record is the mean of its first two steps."""
    found: dict[int, float] = {}
    for event in events:
        if event["kind"] == "start":
            of_start: list[float] = []
        if event["kind"] == "step":
            took = event["step_ms"]
            if len(of_start) == 1:
                took = 2 * took - of_start[0]
            of_start.append(took)
            found[event["iteration"]] = took
    return found


@pytest.mark.slow
def test_a_study_killed_everywhere_is_the_study_left_alone(plan, tmp_path, capsys):
    rng = random.Random(SEED)
    killed, straight = Study(plan, tmp_path / "killed"), Study(plan, tmp_path / "straight")
    runner = killed.start("--retries", "2")
    try:
        # A rank, then torchrun alone: the runner lives, and starts both runs again.
        first = killed.wait_for_step(0, rng.randint(2, 14))
        kill(first["pid"])
        second = killed.wait_for_step(1, rng.randint(2, 14))
        kill(parent_of(second["pid"]))
        wait_for_end(second["pid"])
        # The runner and a rank at once, then the runner alone, whose runs save and end.
        third = killed.wait_for_step(2, rng.randint(2, 20))
        kill(runner.pid)
        kill(third["pid"])
        runner.wait()
        runner = killed.start("--resume")
        fourth = killed.wait_for_step(3, rng.randint(12, 30))
        kill(runner.pid)
        runner.wait()
        assert fourth["pid"] != runner.pid
    finally:
        kill(runner.pid)
    killed.finish("--resume")
    straight.finish()
    for entry in straight.entries:
        check_same(entry, killed, straight)
    starts = [len([e for e in killed.events(x) if e["kind"] == "start"]) for x in killed.entries]
    assert min(starts) >= 2
    with capsys.disabled():
        print(f"\nstarts of the runs: {starts}", flush=True)


def check_same(entry: dict, killed: Study, straight: Study) -> None:
    results = [
        json.loads((study.folder(entry) / "result.json").read_text())
        for study in (killed, straight)
    ]
    for name in ("name", "hash", "iteration", "samples", "tokens", "objective", "ranks"):
        assert results[0][name] == results[1][name], name
    assert results[0]["iteration"] == entry["steps"]
    wanted = list(range(1, entry["steps"] + 1))
    for study, result in zip((killed, straight), results, strict=True):
        took = steps_each_once(study.events(entry))
        assert sorted(took) == wanted
        assert result["seconds"] == pytest.approx(sum(took.values()) / 1e3, rel=1e-6)
        assert result["gpu_hours"] == pytest.approx(result["seconds"] / 3600)
    losses = [read_scalars(s.folder(entry) / "train" / "tensorboard") for s in (killed, straight)]
    for name in ("lm loss", "objective"):
        assert losses[0][name] == losses[1][name] and sorted(losses[1][name]) == wanted
    last = f"train/checkpoints/iter_{entry['steps']:07d}"
    ours, theirs = (TensorReader(study.folder(entry) / last) for study in (killed, straight))
    assert ours.shapes == theirs.shapes and len(ours.shapes) >= 8
    for name in ours.shapes:
        assert torch.equal(ours.read(name), theirs.read(name)), name
