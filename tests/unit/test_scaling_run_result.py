"""A run's result: each finished step's seconds once, over restarts, and nothing without them."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from dataclasses import asdict, replace

import pytest

from megatron_emo.launch.events import EventLog
from megatron_emo.launch.exit_codes import ConfigError, NonFiniteError, VerdictError
from megatron_emo.launch.finished_steps import count_finished_steps
from megatron_emo.launch.run_result import ResultError, RunResult, read_result, write_result
from megatron_emo.training import result as trainer

RESULT = RunResult(
    name="mle",
    hash="2937cad162",
    iteration=8,
    samples=32,
    tokens=512,
    seconds=1.5,
    gpu_hours=0.5,
    starts=2,
    ranks=4,
    device="H100",
    objective="mle",
    lm_loss=2.5,
    versions={"torch": "2.13"},
    commit="",
)


class Log:
    """The records of one rank, and by itself what each step took."""

    def __init__(self, log_interval=1, kind="heartbeat"):
        self.records, self.took, self.ranks = [], {}, {}
        self.log_interval, self.kind = log_interval, kind

    def start(self, load, steps, world_size, random):
        """Train from checkpoint `load` for some steps, as Megatron's interval timer tells it."""
        self.records.append({"kind": "start", "iteration": 0, "world_size": world_size})
        self.records.append({"kind": "load", "iteration": load, "path": "", "seconds": 1.0})
        since_reset = []
        for number in range(1, steps + 1):
            iteration = load + number
            self.took[iteration], self.ranks[iteration] = random.uniform(0.1, 1), world_size
            since_reset.append(self.took[iteration])
            if iteration % self.log_interval == 0 or number == 1:
                mean = sum(since_reset) / len(since_reset)
                record = {"kind": self.kind, "iteration": iteration, "step_ms": 1e3 * mean}
                self.records.append(record | {"losses": {"lm loss": iteration / 7}})
                if number > 1:
                    since_reset = []


@pytest.mark.parametrize("log_interval", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_each_step_counts_once_as_it_was_done_last(seed, log_interval):
    rng = random.Random(seed)
    log, load, starts = Log(log_interval), 0, 0
    while True:
        steps = rng.randint(0, 30) // 10 * 10 if log_interval > 1 else rng.randint(0, 30)
        steps = min(steps, 60 - load)
        log.start(load, steps, rng.choice([1, 2, 8]), rng)
        starts += 1
        if load + steps == 60:
            break
        load = rng.randrange(0, load + steps + 1, 10)  # from a checkpoint every 10
    found = count_finished_steps(log.records, 60)
    assert found.seconds == pytest.approx(sum(log.took[i] for i in range(1, 61)), rel=1e-12)
    by_rank = sum(log.took[i] * log.ranks[i] for i in range(1, 61))
    assert found.rank_seconds == pytest.approx(by_rank, rel=1e-12) and found.starts == starts


def test_the_loss_is_that_of_the_last_step_and_steps_without_seconds_are_an_error():
    log, rng = Log(kind="step"), random.Random(1)
    log.start(0, 4, 2, rng)
    assert count_finished_steps(log.records, 4).losses == {"lm loss": 4 / 7}
    assert count_finished_steps(log.records, 3).losses == {"lm loss": 3 / 7}
    with pytest.raises(
        ValueError, match="seconds of 6 iterations .* none of 2 of them, iteration 5"
    ):
        count_finished_steps(log.records, 6)
    log.start(5, 1, 2, rng)
    with pytest.raises(ValueError, match="none of 1 of them, iteration 5"):
        count_finished_steps(log.records, 6)
    log.records[3]["step_ms"] = "NaN"
    with pytest.raises(ValueError, match="iteration 1 the first"):
        count_finished_steps(log.records[:4], 1 + 1)
    assert count_finished_steps([], 0).seconds == 0


def test_a_result_comes_back_and_only_where_it_is_the_one_expected(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(ResultError, match="expected the result of a finished run, found none"):
        read_result(path)
    write_result(path, RESULT)
    assert read_result(path, hash="2937cad162", iteration=8, tokens=512) == RESULT
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(ResultError, match="tokens: expected 513, found 512"):
        read_result(path, tokens=513)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ResultError, match="expected the result of a finished run"):
        read_result(path)
    path.write_text("[1]")
    with pytest.raises(ResultError, match="expected the result"):
        read_result(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_loss": float("nan")}, "lm_loss: expected a finite number"),
        ({"seconds": float("inf")}, "seconds: expected a finite number"),
        ({"seconds": None}, "seconds: expected float, found None"),
        ({"iteration": 7.5}, "iteration: expected int"),
        ({"tokens": True}, "tokens: expected int"),
        ({"format": 2}, "format: expected 1, found 2"),
        ({"seconds": 10**400}, "seconds: expected a finite number"),
    ],
)
def test_a_result_that_lacks_a_measurement_is_none(tmp_path, change, message):
    with pytest.raises(ResultError, match=message):
        replace(RESULT, **change)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(asdict(RESULT) | change))
    with pytest.raises(ResultError, match=message):
        read_result(path)


def test_a_write_that_fails_leaves_the_former_result(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_result(path, RESULT)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_result(path, replace(RESULT, seconds=2.0))
    assert read_result(path) == RESULT and len(list(tmp_path.iterdir())) == 1


START = {
    **{"world_size": 1, "train_iters": 4, "host": "h", "pid": 1, "restart": 0, "objective": "emo1"},
    **{"cost_embedding": None, "save": None, "command": [], "environment": {}, "versions": {}},
    "layout": {},
}
STEP = {
    **{"train_iters": 4, "learning_rate": 1e-3, "grad_norm": 1.0, "loss_scale": 1.0},
    **{"work_ms": None, "tokens_per_s": 1.0, "consumed_samples": 8, "skipped": 0, "nan": 0},
}


@pytest.fixture
def args(tmp_path, monkeypatch):
    """Of a run of 4 iterations whose event log says what they took."""
    monkeypatch.setattr(trainer, "_finished", None)
    log = EventLog(tmp_path / "save" / "events", 0)
    log.write("start", 0, **START)
    for iteration, loss in enumerate((5.0, 4.0, 3.5, 3.25), 1):
        log.write("step", iteration, losses={"lm loss": loss}, step_ms=500.0, **STEP)
    log.close()
    return Namespace(
        emo_result_file=str(tmp_path / "result.json"),
        emo_result_run=["emo1_a", "0a1b"],
        emo_result_vocab_size=None,
        emo_event_dir=None,
        save=str(tmp_path / "save"),
        tensorboard_dir=None,
        rank=0,
        world_size=1,
        train_iters=4,
        iteration=0,
        seq_length=16,
        consumed_train_samples=32,
        objective="emo1",
        padded_vocab_size=128,
        emo_vocab_size=127,
    )


def finish(args, monkeypatch, iteration):
    monkeypatch.setattr(trainer, "_run_args", lambda: args)
    trainer._train(lambda: (iteration, 0))
    trainer.write_at_end(args)


def test_the_trainer_writes_what_its_event_log_says(args, monkeypatch):
    finish(args, monkeypatch, 4)
    found = read_result(args.emo_result_file, name="emo1_a", hash="0a1b", iteration=4, tokens=512)
    assert (found.samples, found.seconds, found.gpu_hours) == (32, 2.0, 2.0 / 3600)
    assert (found.lm_loss, found.starts, found.ranks, found.objective) == (3.25, 1, 1, "emo1")


def test_a_run_that_is_not_over_leaves_no_result(args, monkeypatch, tmp_path):
    finish(args, monkeypatch, 3)
    trainer._finished = (Namespace(), 4)  # of another run in this process
    trainer.write_at_end(args)
    assert not (tmp_path / "result.json").exists()


def test_a_result_without_its_measurements_is_refused(args, monkeypatch, tmp_path):
    args.train_iters = 5
    with pytest.raises(VerdictError, match="expected the seconds of 5 iterations"):
        finish(args, monkeypatch, 5)
    log = EventLog(tmp_path / "save" / "events", 0)
    log.write("step", 5, losses={"lm loss": float("nan")}, step_ms=1.0, **STEP)
    with pytest.raises(NonFiniteError, match="the last lm loss is NaN"):
        finish(args, monkeypatch, 5)
    log.write("step", 6, losses={}, step_ms=1.0, **STEP)
    log.close()
    args.train_iters = 6
    with pytest.raises(VerdictError, match="no rank's event log has iteration 6's loss"):
        finish(args, monkeypatch, 6)
    assert not (tmp_path / "result.json").exists()


def test_what_the_trainer_refuses_before_it_trains(args):
    args.emo_result_vocab_size = 256
    with pytest.raises(ConfigError, match="expected 256 rows, padding included, found 128, of a"):
        trainer.install(args)
    args.save = None
    with pytest.raises(ConfigError, match="expected an event log"):
        trainer.install(args)


def test_a_finished_run_gets_a_loader_where_nothing_is_left(args, monkeypatch):
    """Megatron asserts that there is something to load."""
    monkeypatch.setattr(trainer, "_run_args", lambda: args)

    def build(dataset, consumed_samples):
        return consumed_samples

    loader = trainer._build_pretraining_data_loader
    dataset = range(32)
    assert loader(build, dataset, 32) == 32
    args.iteration = 4
    assert [loader(build, dataset, n) for n in (32, 31)] == [0, 31]
    assert loader(build, None, 32) == 32
    args.emo_result_file = None
    assert loader(build, dataset, 32) == 32
