"""Which checkpoint is loaded: the tracker's, or the newest whole one, and never without a word."""

from __future__ import annotations

import pytest

from megatron_emo.checkpoints import RELEASE, Findings, RunFolder, choose, read_tracker
from megatron_emo.torch_dist import TRACKER

DAMAGED = Findings(("a.distcp: altered",))
CUT_OFF = Findings((".metadata, metadata.json: missing, its save was cut off",), True)
WHOLE = Findings()


def choice_of(states, tracker=None, tracker_problem=None, **options):
    """choose() among folders {iteration: state}, and the folders whose bytes were read."""
    run = RunFolder("run", tracker, tracker_problem, tuple(sorted(states)))
    read = []

    def inspect(folder, *, reads_all=True):
        iteration = int(folder.name.removeprefix("iter_")) if folder.name != RELEASE else RELEASE
        read.append(iteration) if reads_all else None
        return states.get(iteration, Findings((f"{folder.name}: no such folder",)))

    return choose(run, inspect, **options), read


def test_the_trackers_is_taken_though_there_is_a_newer_one():
    choice, read = choice_of({5: WHOLE, 10: WHOLE, 15: WHOLE}, tracker=10, falls_back=True)
    assert (choice.latest, choice.notes, read) == (10, (), [10])


def test_ckpt_step_comes_before_the_tracker():
    choice, read = choice_of({5: WHOLE, 10: DAMAGED}, tracker=10, step=5)
    assert (choice.latest, choice.notes, read) == (5, (), [5])


def test_a_damaged_one_is_an_error_that_names_another():
    message = (
        r"checkpoint run/iter_0000010: a.distcp: altered\n"
        r".*add --fallback to go on from the newest that looks whole, iter_0000005"
    )
    with pytest.raises(ValueError, match=message):
        choice_of({3: WHOLE, 5: WHOLE, 7: CUT_OFF, 10: DAMAGED}, tracker=10)
    with pytest.raises(ValueError, match="no other checkpoint in run looks whole"):
        choice_of({5: CUT_OFF, 10: DAMAGED}, tracker=10)
    with pytest.raises(ValueError, match="iter_0000020: no such folder"):
        choice_of({10: WHOLE}, tracker=20)


def test_fallback_takes_the_newest_whole_one_and_says_what_it_passed_over():
    choice, _ = choice_of(
        {3: WHOLE, 5: WHOLE, 7: CUT_OFF, 10: DAMAGED}, tracker=10, falls_back=True
    )
    assert choice.latest == 5
    assert choice.notes == (
        "passed over: checkpoint run/iter_0000010: a.distcp: altered",
        "passed over: checkpoint run/iter_0000007: .metadata, metadata.json: missing, its save "
        "was cut off",
        "FALLING BACK to the newest whole one: run/iter_0000005",
    )


def test_fallback_without_a_whole_one_is_an_error_that_names_all():
    with pytest.raises(ValueError, match="--fallback: no whole .*\n.*0000010.*\n.*0000005"):
        choice_of({5: CUT_OFF, 10: DAMAGED}, tracker=10, falls_back=True)
    with pytest.raises(ValueError, match="--fallback: no whole .*\n.*0000010.*\n.*0000005"):
        choice_of({5: CUT_OFF, 10: DAMAGED}, falls_back=True)


def test_an_unreadable_tracker_is_an_error_or_a_fallback():
    problem = "run/latest: expected an iteration or 'release', found ''"
    with pytest.raises(ValueError, match="found ''\n.*newest that looks whole, iter_0000010"):
        choice_of({5: WHOLE, 10: WHOLE}, tracker_problem=problem)
    choice, _ = choice_of({5: WHOLE, 10: WHOLE}, tracker_problem=problem, falls_back=True)
    assert choice.latest == 10 and choice.notes[0] == f"passed over: {problem}"


def test_a_run_that_ended_in_its_first_save_starts_anew_or_from_what_was_whole():
    choice, _ = choice_of({})
    assert choice.latest is None and choice.notes == ()
    choice, _ = choice_of({5: CUT_OFF})
    assert choice.latest is None and "passed over: checkpoint run/iter_0000005" in choice.notes[0]
    choice, _ = choice_of({5: WHOLE, 10: CUT_OFF})
    assert choice.latest == 5 and "taking the newest whole checkpoint" in choice.notes[-1]


def test_a_damaged_one_without_a_tracker_is_no_first_start():
    with pytest.raises(ValueError, match="iter_0000010: a.distcp: altered\n.*0000005"):
        choice_of({5: WHOLE, 10: DAMAGED})
    choice, _ = choice_of({5: WHOLE, 10: DAMAGED}, falls_back=True)
    assert choice.latest == 5 and len(choice.notes) == 2


def test_release_is_taken_and_falls_back_to_iterations():
    run = RunFolder("run", RELEASE, None, (5,))
    assert choose(run, lambda folder, **_: WHOLE).latest == RELEASE
    choice = choose(
        run, lambda folder, **_: DAMAGED if folder.name == RELEASE else WHOLE, falls_back=True
    )
    assert choice.latest == 5


@pytest.mark.parametrize(
    ("text", "found"), [("12", 12), ("12\n", 12), ("0000012", 12), ("release\n", RELEASE)]
)
def test_trackers_are_read(tmp_path, text, found):
    (tmp_path / TRACKER).write_text(text)
    assert read_tracker(tmp_path) == found


@pytest.mark.parametrize(
    "data", [b"", b" \n", b"-1", b"1e3", b"12x", b"\xff\x00", b"1 2", "²".encode()]
)
def test_what_is_no_tracker_is_refused_with_what_it_says(tmp_path, data):
    (tmp_path / TRACKER).write_bytes(data)
    with pytest.raises(ValueError, match=f"{TRACKER}: expected an iteration or 'release', found"):
        read_tracker(tmp_path)
    assert "found" in RunFolder.read(tmp_path).tracker_problem


def test_a_runs_folder_is_read_with_what_is_no_iteration_left_out(tmp_path):
    assert RunFolder.read(tmp_path / "absent") == RunFolder(
        str(tmp_path / "absent"), None, None, ()
    )
    for name in ("iter_0000005", "iter_12345678", "iter_0000010.replaced", "iter_x", "events"):
        (tmp_path / name).mkdir()
    (tmp_path / TRACKER).write_text("5")
    assert RunFolder.read(tmp_path) == RunFolder(str(tmp_path), 5, None, (5, 12345678))
