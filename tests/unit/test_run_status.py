"""A run's status from its files: each state, who failed first, and a thousand ranks."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime, timedelta

import pytest

from megatron_emo.launch.events import event_file
from megatron_emo.launch.markers import Marker, State, write_marker
from megatron_emo.launch.status import read_status
from megatron_emo.launch.status_text import format_duration, format_status

T0 = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
START = {
    "train_iters": 100,
    "host": "node1",
    "pid": 1,
    "restart": 0,
    "objective": "emo1",
    "cost_embedding": None,
    "save": None,
    "command": [],
    "environment": {},
    "versions": {},
    "layout": {"tp": 1, "dp": 2},
}
STEP = {
    "train_iters": 100,
    "losses": {"lm loss": 2.5, "objective": "NaN"},
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "loss_scale": 1.0,
    "step_ms": 500.0,
    "work_ms": 30.0,
    "tokens_per_s": 2048.0,
    "consumed_samples": 8,
    "skipped": 0,
    "nan": 0,
}
BEAT = {"train_iters": 100, "step_ms": 500.0, "work_ms": 20.0}


class Run:
    """Logs written as ranks would, at times that the test says."""

    def __init__(self, folder, world_size=2):
        self.folder, self.world_size = folder, world_size
        (folder / "events").mkdir(parents=True)

    def write(self, rank, second, kind, iteration, **fields):
        when = (T0 + timedelta(seconds=second)).isoformat(timespec="milliseconds")
        record = {"time": when, "monotonic": second, "rank": rank, "kind": kind}
        record |= {"iteration": iteration, **fields}
        with open(event_file(self.folder / "events", rank), "a") as file:
            file.write(json.dumps(record) + "\n")

    def start(self, second=0.0):
        for rank in range(self.world_size):
            self.write(rank, second, "start", 0, world_size=self.world_size, **START)

    def step(self, second, iteration, ranks=None):
        for rank in range(self.world_size) if ranks is None else ranks:
            if rank == self.world_size - 1:
                self.write(rank, second, "step", iteration, **STEP)
            else:
                self.write(rank, second, "heartbeat", iteration, **BEAT)

    def fault(self, rank, second, message, iteration=7, error="RuntimeError"):
        fields = {"error": error, "message": message, "traceback": "", "exit_code": 70}
        self.write(rank, second, "fault", iteration, **fields)
        self.write(rank, second, "end", iteration, exit_code=70)

    def status(self, second):
        return read_status(self.folder, now=T0 + timedelta(seconds=second))

    def mark(self, state, second, code, iteration, message=""):
        when = (T0 + timedelta(seconds=second)).timestamp()
        write_marker(self.folder, Marker(state, code, when, 0, iteration, message))


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run")
    made.start()
    made.step(10, 7)
    return made


def test_a_running_run(run):
    status = run.status(second=12)
    assert (status.state, status.detail) == ("running", "")
    assert (status.iteration, status.train_iters) == (7, 100)
    assert status.losses == {"lm loss": 2.5, "objective": "NaN"}
    assert (status.tokens_per_s, status.step_ms) == (2048.0, 500.0)
    assert status.eta_s == pytest.approx(93 * 0.5)
    assert (status.world_size, status.layout, status.objective) == (2, {"tp": 1, "dp": 2}, "emo1")
    assert [(r.rank, r.host, r.iteration, r.kind, r.age_s) for r in status.ranks] == [
        (0, "node1", 7, "heartbeat", 2.0),
        (1, "node1", 7, "step", 2.0),
    ]
    assert status.slowest == {"rank": 1, "work_ms": 30.0, "median_ms": 25.0}
    assert status.checkpoint is None


def test_silence_counts_from_the_newest_word_of_any_rank(run):
    run.step(100, 8, ranks=[0])
    assert run.status(second=219).state == "running"
    silent = run.status(second=221)
    assert (silent.state, silent.detail) == ("silent", "since 2026-01-02T03:05:45.000+00:00")
    run.write(0, 101, "save_begin", 8, path="iter_0000008")
    assert run.status(second=300).detail.endswith(", in a save")


def test_markers_say_how_it_ended(run):
    run.mark(State.PREEMPTED, 20, 75, 8)
    assert (run.status(500).state, run.status(500).detail) == ("preempted", "saved iteration 8")
    run.start(second=30)  # the next start has not removed it yet
    assert run.status(31).state == "running"


def test_a_finished_run(run):
    run.mark(State.FINISHED, 40, 0, 100)
    status = run.status(50)
    assert (status.state, status.eta_s) == ("finished", None)


@pytest.mark.parametrize(
    ("codes", "state"), [((0, 0), "finished"), ((75, 75), "preempted"), ((0, 78), "failed")]
)
def test_without_markers_exit_codes_say_it(run, codes, state):
    for rank, code in enumerate(codes):
        run.write(rank, 20, "end", 7, exit_code=code)
    assert run.status(21).state == state


def test_the_first_failure_is_not_a_rank_that_lost_its_peer(run):
    run.fault(0, 20.0, "[gloo/pair.cc] Connection closed by peer [127.0.0.1]:3")
    run.fault(1, 20.1, "out of paper", error="PaperError", iteration=7)
    run.mark(State.FAILED, 20, 70, 7, "RuntimeError: Connection closed by peer")
    status = run.status(21)
    assert (status.state, status.detail) == ("failed", "code 70")
    failure = status.failure
    assert (failure.rank, failure.error, failure.message) == (1, "PaperError", "out of paper")
    assert status.wordless == []


def test_a_killed_rank_is_the_first_failure_where_the_others_lost_it(tmp_path):
    run = Run(tmp_path / "run", world_size=3)
    run.start()
    run.step(10, 7)
    run.fault(0, 20.0, "Connection closed by peer")
    run.fault(2, 20.1, "Connection reset by peer")
    status = run.status(21)
    assert (status.state, status.wordless) == ("failed", [1])
    assert (status.failure.rank, status.failure.error) == (1, "gone")
    assert "killed" in format_status(status)


def test_failures_of_earlier_starts_and_ranks_of_a_larger_layout_are_forgotten(run):
    run.fault(0, 20.0, "out of paper")
    run.mark(State.FAILED, 20, 70, 7, "PaperError: out of paper")
    run.write(2, 5, "fault", 7, error="E", message="m", traceback="", exit_code=70)
    run.start(second=60)
    run.step(70, 9)
    status = run.status(71)
    assert (status.state, status.failure, status.iteration) == ("running", None, 9)
    assert [rank.rank for rank in status.ranks] == [0, 1]


def test_a_failure_before_the_log_was_open_is_known_from_the_marker(tmp_path):
    folder = tmp_path / "run"
    write_marker(folder, Marker(State.FAILED, 78, 5.0, 3, 0, "VerdictError: --lr differs"))
    status = read_status(folder)
    assert (status.state, status.failure.rank, status.failure.error) == (
        "failed",
        3,
        "VerdictError",
    )
    assert status.failure.message == "--lr differs"


def test_the_newest_whole_checkpoint_is_looked_for_in_the_folder(run, monkeypatch):
    from megatron_emo import checkpoints

    for iteration in (3, 5, 7):
        (run.folder / f"iter_{iteration:07d}").mkdir()
    (run.folder / "latest_checkpointed_iteration.txt").write_text("5")
    cut = checkpoints.Glance(problems=["metadata.json: missing"])
    found = {"iter_0000007": cut, "iter_0000005": checkpoints.Glance()}
    monkeypatch.setattr(checkpoints, "glance", lambda folder: found[folder.name])
    status = run.status(12)
    assert status.checkpoint == {
        "iteration": 5,
        "path": str(run.folder / "iter_0000005"),
        "named": True,
        "newer": ["iter_0000007: metadata.json: missing"],
    }
    text = format_status(status)
    assert f"checkpoint  iteration 5: {run.folder / 'iter_0000005'}\n" in text
    assert "newer, not whole: iter_0000007: metadata.json: missing" in text


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="found neither log nor marker"):
        read_status(tmp_path)


def test_the_event_folder_itself_serves(run):
    assert read_status(run.folder / "events", now=T0).iteration == 7


def test_text_is_aligned_and_json_is_strict(run):
    status = run.status(second=12)
    text = format_status(status)
    assert "state       running" in text
    assert "step        7 of 100 (7.0%), 46.5 s left" in text
    assert "loss        lm loss    2.5\n            objective  NaN" in text
    assert "speed       2,048 tokens/s, 500.0 ms a step" in text
    content = json.loads(json.dumps(status.as_json(), allow_nan=False))
    assert content["ranks"][1]["rank"] == 1
    assert content["losses"]["lm loss"] == 2.5


def test_ends_of_long_logs_are_enough_for_a_thousand_ranks(tmp_path):
    run = Run(tmp_path / "run", world_size=1000)
    run.start()
    for rank in range(1000):
        run.step(10, 7 if rank != 617 else 5, ranks=[rank])
    # The start of the last rank lies a megabyte back, and is not read.
    with open(event_file(run.folder / "events", 999), "rb+") as file:
        lines = file.read().splitlines(keepends=True)
        file.write(lines[1] * (2_000_000 // len(lines[1])))
    begun = time.process_time()
    status = run.status(12)
    assert time.process_time() - begun < 5
    assert len(status.ranks) == 1000
    assert status.iteration == 7
    text = format_status(status)
    assert "\n617   node1  5 " in text
    assert "and 992 ranks not further behind" in text


def test_values_nobody_expects_do_not_break_it(run):
    odd = STEP | {"losses": {"x": None, "y": [1]}, "step_ms": "Infinity", "tokens_per_s": "NaN"}
    run.write(1, 11, "step", (1 << 62), **odd)
    status = run.status(12)
    assert (status.losses, status.step_ms, status.eta_s) == ({}, None, None)
    assert format_status(status)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.25, "4.2 s"),
        (200, "3 min 20 s"),
        (59.99, "60.0 s"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 d 04 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
    assert math.isfinite(seconds)
