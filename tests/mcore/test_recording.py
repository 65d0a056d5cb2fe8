"""The event log of a real run: what every rank wrote, against TensorBoard and the files."""

from __future__ import annotations

import pytest
from pretraining import read_scalars
from recorded_runs import SMALL, run_recorded

from megatron_emo.launch.events import event_file, read_events
from megatron_emo.launch.markers import State, read_marker
from megatron_emo.launch.status import read_status

RUN = ("--train-iters", "6", "--eval-interval", "3", "--eval-iters", "2", "--save-interval", "3")


@pytest.fixture
def record(run_distributed, tmp_path):
    """Return record(world_size, *flags, **expected) -> rank -> records of one run in `save`."""

    def run(world_size, *flags, **expected):
        for name in ("logs", "save"):
            (tmp_path / name).mkdir(exist_ok=True)
        argv = [*SMALL, *RUN, "--save", str(tmp_path / "save"), "--objective", "emo2", *flags]
        argv += ["--tensorboard-dir", str(tmp_path / "logs")]
        run_distributed(world_size)(run_recorded, argv=argv, **expected)
        folder = tmp_path / "save" / "events"
        return {rank: list(read_events(event_file(folder, rank))) for rank in range(world_size)}

    return run


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


def test_a_run_of_two_ranks_from_start_to_end(record, tmp_path):
    found = record(2, "--log-interval", "2", "--tensorboard-log-interval", "1")
    save = [("save_begin", 3), ("save_end", 3)]
    kinds = [("start", 0), ("step", 1), ("step", 2), ("eval", 3), *save, ("step", 4), ("step", 6)]
    kinds += [("eval", 6), ("save_begin", 6), ("save_end", 6), ("eval", 6), ("eval", 6), ("end", 6)]
    assert [(r["kind"], r["iteration"]) for r in found[1]] == kinds
    beats = [("heartbeat" if kind == "step" else kind, iteration) for kind, iteration in kinds]
    assert [(r["kind"], r["iteration"]) for r in found[0]] == beats

    start = found[1][0]
    assert (start["world_size"], start["train_iters"], start["objective"]) == (2, 6, "emo2")
    assert start["layout"] == {"tp": 1, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "dp": 2}
    assert {"python", "torch", "megatron-core", "megatron_emo"} <= set(start["versions"])
    assert start["save"] == str(tmp_path / "save")

    scalars = read_scalars(tmp_path / "logs")
    _compare_steps(of_kind(found[1], "step"), scalars)
    evals = of_kind(found[1], "eval")
    assert [e["data"] for e in evals] == ["validation"] * 3 + ["test"]
    assert all(e["complete"] and e["num_steps"] == 2 for e in evals)
    logged = scalars["lm loss validation"][3]
    assert evals[0]["losses"]["lm loss"] == pytest.approx(logged, rel=1e-6)

    folder = tmp_path / "save" / "iter_0000006"
    last_save = of_kind(found[0], "save_end")[-1]
    assert last_save["path"] == str(folder)
    assert last_save["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert of_kind(found[1], "save_end")[-1]["bytes"] is None
    marker = read_marker(tmp_path / "save")
    assert (marker.state, marker.iteration, marker.rank) == (State.FINISHED, 6, 0)
    status = read_status(tmp_path / "save")
    assert (status.state, status.checkpoint["iteration"]) == ("finished", 6)


def _compare_steps(steps, scalars):
    """TensorBoard has every iteration, a record the mean since the last one (1 does not reset)."""
    for step, iterations in zip(steps, [[1], [1, 2], [3, 4], [5, 6]], strict=True):
        last = iterations[-1]
        for name, value in step["losses"].items():
            mean = sum(scalars[name][i] for i in iterations) / len(iterations)
            assert value == pytest.approx(mean, rel=1e-6, abs=1e-7), (name, step)
        assert step["learning_rate"] == pytest.approx(scalars["learning-rate"][last])
        assert step["grad_norm"] == pytest.approx(scalars["grad-norm"][last], rel=1e-5)
        assert step["consumed_samples"] == 4 * last
        assert step["tokens_per_s"] == pytest.approx(4 * 24 / (step["step_ms"] / 1e3), rel=1e-6)
        assert step["work_ms"] > 0
    assert set(steps[0]["losses"]) >= {"lm loss", "emo loss", "objective", "entropy"}


def test_a_resumed_run_appends_and_counts_on(record, tmp_path):
    record(1, "--train-iters", "3")
    tracker = tmp_path / "save" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "3"
    found = record(1, "--load", str(tmp_path / "save"), "--override-opt_param-scheduler")[0]
    second = found[[r["kind"] for r in found].index("end") + 1 :]
    assert [r["kind"] for r in second[:3]] == ["start", "load", "step"]
    assert (second[1]["iteration"], second[1]["path"]) == (3, str(tmp_path / "save"))
    step = second[2]
    assert (step["iteration"], step["consumed_samples"]) == (4, 16)
    assert step["tokens_per_s"] == pytest.approx(4 * 24 / (step["step_ms"] / 1e3), rel=1e-6)


def test_an_error_leaves_its_trace_and_the_marker(record, tmp_path):
    trips = [("step", 3, [0], "out of paper")]
    found = record(1, trips=trips, code=70, message="out of paper")[0]
    fault, end = found[-2:]
    assert (fault["kind"], fault["error"], fault["message"]) == (
        "fault",
        "RuntimeError",
        "out of paper",
    )
    assert (fault["iteration"], fault["exit_code"], end["exit_code"]) == (2, 70, 70)
    assert "RuntimeError: out of paper" in fault["traceback"]
    marker = read_marker(tmp_path / "save")
    assert (marker.state, marker.exit_code, marker.iteration) == (State.FAILED, 70, 2)
    assert marker.message == "RuntimeError: out of paper"
    status = read_status(tmp_path / "save")
    assert (status.state, status.failure.message) == ("failed", "out of paper")


def test_a_run_refused_before_its_log_is_open_does_not_leave_the_old_marker(record, tmp_path):
    record(1)
    assert read_marker(tmp_path / "save").state is State.FINISHED
    bad = str(tmp_path / "nothing")
    found = record(1, "--load", bad, code=78, message="nothing")[0]
    assert [r["kind"] for r in found[-2:]] == ["fault", "end"]
    marker = read_marker(tmp_path / "save")
    assert (marker.state, marker.exit_code) == (State.FAILED, 78)


def test_none_turns_the_log_off_and_a_folder_moves_it(record, tmp_path):
    assert not (tmp_path / "save" / "events").exists()
    with pytest.raises(FileNotFoundError):
        record(1, "--train-iters", "1", "--emo-event-dir", "none")
    assert not (tmp_path / "save" / "events").exists()
    with pytest.raises(FileNotFoundError):
        record(1, "--train-iters", "1", "--emo-event-dir", str(tmp_path / "elsewhere"))
    assert event_file(tmp_path / "elsewhere", 0).is_file()
