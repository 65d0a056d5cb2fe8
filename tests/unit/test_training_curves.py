"""Curves from event files: which value of an iteration counts, what is drawn and tabled."""

from __future__ import annotations

import pytest
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_emo.training_curves import (
    plot_training_curves,
    read_scalars,
    summarize,
    validation_drop,
)

MLE = {
    "lm loss": {1: 7.5, 2: 6.0, 3: 5.25},
    "lm loss validation": {2: 6.5, 3: 5.5},
    "objective weight": {1: 1.0, 3: 1.0},
}
EMO = {"lm loss": {1: 7.5, 3: 5.0}, "emo loss": {1: 1.0, 3: 0.75}, "emo loss max": {1: 2.0}}


def write_events(directory, events, suffix="") -> None:
    """Write (wall time, name, iteration, value) into one event file of its own."""
    writer = EventFileWriter(str(directory), filename_suffix=suffix)
    for wall_time, name, iteration, value in events:
        scalar = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        writer.add_event(Event(wall_time=wall_time, step=iteration, summary=scalar))
    writer.close()


def test_a_directory_gives_every_scalar_by_iteration(tmp_path):
    write_events(tmp_path, [(10.0, "lm loss", 1, 7.5), (11.0, "emo loss", 1, 1.0)])
    assert read_scalars(tmp_path) == {"lm loss": {1: 7.5}, "emo loss": {1: 1.0}}


def test_a_resumed_run_replaces_the_iterations_it_repeated(tmp_path):
    # File names sort against time here, so that only the wall time can tell which value is newer.
    write_events(tmp_path, [(20.0, "lm loss", 2, 60.0), (21.0, "lm loss", 3, 50.0)], suffix=".a")
    write_events(tmp_path, [(10.0 + i, "lm loss", i, float(i)) for i in (1, 2)], suffix=".b")
    assert list(read_scalars(tmp_path)["lm loss"].items()) == [(1, 1.0), (2, 60.0), (3, 50.0)]


def test_the_first_of_two_validations_of_one_iteration_counts(tmp_path):
    key = "lm loss validation"
    write_events(tmp_path, [(10.0, key, 4, 6.0), (11.0, key, 4, 5.0)])
    assert read_scalars(tmp_path)[key] == {4: 6.0}


def test_more_than_ten_thousand_iterations_are_kept(tmp_path):
    write_events(tmp_path, [(float(i), "lm loss", i, 1.0) for i in range(1, 10_051)])
    assert len(read_scalars(tmp_path)["lm loss"]) == 10_050


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_directory_without_events_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="expected TensorBoard event files .*found none"):
        read_scalars(tmp_path / name)


def test_the_table_holds_first_and_last_values_and_leaves_out_what_a_run_lacks():
    lines = summarize({"a": MLE, "b": EMO}, ["lm loss", "emo loss"]).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["a", "lm", "loss", "7.500", "1", "5.250", "3", "-2.250"],
        ["b", "lm", "loss", "7.500", "1", "5.000", "3", "-2.500"],
        ["a", "lm", "loss", "validation", "6.500", "2", "5.500", "3", "-1.000"],
        ["b", "emo", "loss", "1.000", "1", "0.750", "3", "-0.250"],
    ]
    assert [line.split(":")[0] for line in lines[5:]] == ["a"]
    assert "2.000 nats below" in lines[5]


def test_the_drop_is_from_the_first_training_to_the_last_validation_value():
    assert validation_drop(MLE) == 2.0


def test_the_image_shows_one_panel_per_scalar_and_every_run_in_it(tmp_path):
    plot_training_curves({"a": MLE}, tmp_path / "new" / "one.png", scalars=["lm loss"])
    plot_training_curves({"a": MLE, "b": EMO}, tmp_path / "two.png", title="both")
    one, two = Image.open(tmp_path / "new" / "one.png"), Image.open(tmp_path / "two.png")
    assert two.size == (3 * one.width, one.height)
    assert colours(one) & {"C0", "C1"} == {"C0"}
    assert colours(two) & {"C0", "C1"} == {"C0", "C1"}


def colours(image: Image.Image) -> set[str]:
    """Return which of matplotlib's first two colours are in the image."""
    from matplotlib.colors import to_rgb

    seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    wanted = {name: tuple(round(255 * x) for x in to_rgb(name)) for name in ("C0", "C1")}
    return {name for name, colour in wanted.items() if colour in seen}


@pytest.mark.parametrize("act", [plot_training_curves, summarize])
def test_a_scalar_that_no_run_logged_is_refused_with_those_there_are(tmp_path, act):
    arguments = [{"a": MLE, "b": EMO}] + [tmp_path / "x.png"] * (act is plot_training_curves)
    with pytest.raises(ValueError, match="no run logged 'loss'; logged are emo loss, emo loss max"):
        act(*arguments, scalars=["loss"])
    assert not (tmp_path / "x.png").exists()
