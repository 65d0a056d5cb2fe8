"""Signals at every moment of a run that has begun to train: what is saved, logged and left."""

from __future__ import annotations

import json
import signal
from argparse import Namespace

import pytest
from pretraining import read_scalars
from recorded_runs import AN_HOUR, SMALL, run_recorded

from megatron_emo.launch.events import EventLog, event_file, read_events
from megatron_emo.launch.markers import State, read_marker

RUN = ("--train-iters", "6", "--eval-interval", "2", "--eval-iters", "3", "--save-interval", "4")
BOTH = [0, 1]


@pytest.fixture
def run(run_distributed, tmp_path):
    """Return run(world_size, *flags, **expected) -> scalars of one run that saves in `save`."""
    count = 0

    def run(world_size, *flags, save="save", **expected):
        nonlocal count
        count += 1
        logs = tmp_path / f"logs_{count}"
        logs.mkdir()
        argv = [*SMALL, *RUN, "--objective", "emo2", "--tensorboard-dir", str(logs)]
        if save:
            argv += ["--save", str(tmp_path / save)]
        run_distributed(world_size)(run_recorded, argv=[*argv, *flags], **expected)
        return read_scalars(logs)

    return run


def records(folder, rank, kind):
    path = event_file(folder / "events", rank)
    return [record for record in read_events(path) if record["kind"] == kind]


def saved_iterations(folder):
    assert (folder / "latest_checkpointed_iteration.txt").is_file()
    return sorted(int(path.name[5:]) for path in folder.glob("iter_*"))


def check_preempted(folder, iteration, saves, name="SIGTERM"):
    assert saved_iterations(folder) == saves
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(iteration)
    marker = read_marker(folder)
    assert (marker.state, marker.exit_code, marker.rank) == (State.PREEMPTED, 75, 0)
    assert (marker.iteration, marker.signal) == (iteration, name)
    assert json.loads((folder / "PREEMPTED").read_text())["iteration"] == iteration
    ends = [records(folder, rank, "end")[-1]["exit_code"] for rank in BOTH]
    assert ends == [75, 75]


def test_during_an_evaluation_and_what_a_resumed_run_sees(run, tmp_path):
    """The run is cut in the second batch of the first evaluation; then all goes on as if not."""
    whole = run(2, save="whole")
    trips = [("eval_batch", 2, [1], "SIGTERM")]
    cut = run(2, trips=trips, code=75, message="stopped by SIGTERM on rank 1: saved iteration 2 in")
    folder = tmp_path / "save"
    check_preempted(folder, 2, [2])
    assert "lm loss validation" not in cut
    for rank in BOTH:
        (evaluation,) = records(folder, rank, "eval")
        assert (evaluation["complete"], evaluation["losses"]) == (False, {})
        assert evaluation["num_steps"] in (1, 2)  # the batch under way is finished
    assert records(folder, 0, "signal") == []
    (received,) = records(folder, 1, "signal")
    assert (received["signal"], received["action"]) == ("SIGTERM", "save, then end")

    resumed = run(2, "--load", str(folder))
    assert read_marker(folder).state is State.FINISHED
    for name, values in whole.items():
        if name.endswith(("time", "samples")):
            continue
        later = {iteration: value for iteration, value in values.items() if iteration > 2}
        assert resumed[name] == later, name


def test_during_a_step_of_one_rank(run, tmp_path):
    run(2, trips=[("step", 3, [1], "SIGTERM")], code=75, message="SIGTERM on rank 1")
    check_preempted(tmp_path / "save", 3, [3])


def test_during_the_first_step_of_all_ranks_without_a_save_folder(run):
    trips = [("step", 1, BOTH, "SIGTERM")]
    message = "stopped by SIGTERM on ranks 0, 1: nothing was saved: no --save"
    scalars = run(2, save=None, trips=trips, code=75, message=message)
    assert sorted(scalars["lm loss"]) == [1]


def test_during_a_regular_save_there_is_no_second_one_and_a_second_signal_changes_nothing(
    run, tmp_path
):
    trips = [("save", 1, [0], "SIGTERM"), ("save", 1, BOTH, "SIGTERM")]
    run(2, trips=trips, code=75, message="saved iteration 4")
    check_preempted(tmp_path / "save", 4, [4])
    actions = [record["action"] for record in records(tmp_path / "save", 0, "signal")]
    assert actions[0] == "save, then end"
    assert set(actions[1:]) <= {"none"}  # the kernel may make one of two


@pytest.mark.slow
def test_another_exit_signal_serves_and_sigterm_too(run, tmp_path):
    flags = ("--exit-signal", "SIGUSR1")
    run(2, *flags, trips=[("step", 2, [0], "SIGUSR1")], code=75, message="SIGUSR1 on rank 0")
    check_preempted(tmp_path / "save", 2, [2], name="SIGUSR1")
    run(2, *flags, save="other", trips=[("step", 2, [0], "SIGTERM")], code=75)
    check_preempted(tmp_path / "other", 2, [2])


@pytest.mark.slow
def test_during_the_last_evaluation_training_is_done_and_a_restart_evaluates(run, tmp_path):
    # Evaluations of 3 batches, of a microbatch each, come at 2, 4 and 6, then the last one.
    trips = [("eval_batch", 3 * 3 + 2, BOTH, "SIGTERM")]
    run(2, trips=trips, code=75, message="saved iteration 6")
    check_preempted(tmp_path / "save", 6, [4, 6])
    again = run(2, "--load", str(tmp_path / "save"))
    assert sorted(again["lm loss validation"]) == [6]
    assert read_marker(tmp_path / "save").state is State.FINISHED


@pytest.mark.slow
def test_a_run_out_of_time_is_to_be_started_again_too(run, tmp_path):
    run(1, "--exit-duration-in-mins", "0", save="zero")  # 0 is Megatron's word for no limit
    assert read_marker(tmp_path / "zero").state is State.FINISHED
    message = "stopped by --exit-duration-in-mins is over: saved iteration 1"
    run(1, "--exit-duration-in-mins", "1", trips=[("step", 1, [0], AN_HOUR)], code=75)
    assert message in read_marker(tmp_path / "save").message


def test_upstreams_handler_that_saves_nothing_is_refused(run):
    run(
        1,
        "--exit-signal-handler-for-training",
        code=78,
        message="ends the run with code 0 and saves nothing",
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_it_can_be_turned_off(run, tmp_path):
    run(1, "--no-exit-signal-handler", "--train-iters", "1", "--eval-iters", "0")
    assert read_marker(tmp_path / "save").state is State.FINISHED


@pytest.mark.parametrize(("grace", "warns"), [(30.0, True), (60.0, False)])
def test_a_start_warns_where_the_last_save_took_longer_than_the_grace(
    tmp_path, capsys, grace, warns
):
    from megatron_emo.training import signals

    log = EventLog(tmp_path, rank=0)
    fields = {"path": "iter_0000004", "bytes": 1, "asynchronous": False}
    for seconds in (70.0, 45.0):
        log.write("save_end", 4, seconds=seconds, **fields)
    log.close()
    args = Namespace(rank=0, emo_event_dir=str(tmp_path), emo_grace_s=grace)
    signals._warn_of_short_grace(args)
    message = "the last save took 45 s, --emo-grace-s is 30: SIGKILL would come before"
    assert (message in capsys.readouterr().out) == warns
