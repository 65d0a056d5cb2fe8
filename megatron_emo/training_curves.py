"""Curves of training runs, from the event files that Megatron writes to --tensorboard-dir."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scalars = Mapping[str, Mapping[int, float]]
"""Name -> iteration -> value, of one run."""

DEFAULT_SCALARS = ("lm loss", "emo loss", "objective weight")

# What is drawn in the panel of a scalar besides it, and how.
_COMPANIONS = {
    "": {"linewidth": 1.0},
    " max": {"linewidth": 1.0, "linestyle": ":"},
    " validation": {"linestyle": "none", "marker": "o", "markeredgecolor": "black"},
}


def read_scalars(directory: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Return name -> iteration -> value of all scalars in `directory`, iterations ascending.

    A resumed run leaves several event files: where they overlap, the newest value counts. Within
    one file the first counts: after its last iteration Megatron (0.19) validates once in the loop
    and once behind it, on other batches, and the second may be missing, since nothing flushes it.

    Raises:
        FileNotFoundError: no such directory, or no event file in it.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(Path(directory).glob("*tfevents*"))
    if not files:
        raise FileNotFoundError(
            f"{directory}: expected TensorBoard event files (*tfevents*), found none; "
            "is it what the run had as --tensorboard-dir?"
        )
    events = []
    for file in files:
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        for name in accumulator.Tags()["scalars"]:
            first = {e.step: e for e in reversed(accumulator.Scalars(name))}
            events += [(e.wall_time, name, e.step, e.value) for e in first.values()]
    scalars: dict[str, dict[int, float]] = {}
    for _, name, iteration, value in sorted(events, key=lambda event: event[0]):
        scalars.setdefault(name, {})[iteration] = value
    return {name: dict(sorted(values.items())) for name, values in scalars.items()}


def plot_training_curves(
    runs: Mapping[str, Scalars],
    output: str | os.PathLike[str],
    *,
    scalars: Sequence[str] = DEFAULT_SCALARS,
    title: str = "",
) -> None:
    """Draw one panel per scalar with all runs in it, into the image file `output`.

    Training values are lines, those of '<scalar> max' dotted lines, those of '<scalar> validation'
    points. A run that did not log a scalar is not in its panel.

    Raises:
        ValueError: a scalar that no run logged.
    """
    check_scalars(runs, scalars)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(scalars), 4.4), layout="constrained")
    panels = figure.subplots(1, len(scalars), squeeze=False)[0]
    for panel, scalar in zip(panels, scalars, strict=True):
        _draw_panel(panel, runs, scalar)
    if title:
        figure.suptitle(title, fontsize=10)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


def check_scalars(runs: Mapping[str, Scalars], scalars: Sequence[str]) -> None:
    """Raise ValueError for a scalar that no run logged, naming those there are."""
    logged = {name for run in runs.values() for name in run}
    for scalar in scalars:
        if scalar not in logged:
            known = sorted(name for name in logged if not name.endswith(" vs samples"))
            raise ValueError(f"no run logged {scalar!r}; logged are {', '.join(known)}")


def _draw_panel(panel: Axes, runs: Mapping[str, Scalars], scalar: str) -> None:
    for index, (name, run) in enumerate(runs.items()):
        for suffix, style in _COMPANIONS.items():
            values = run.get(scalar + suffix)
            if values:
                label = name + suffix
                panel.plot(list(values), list(values.values()), f"C{index}", label=label, **style)
    panel.set_title(scalar)
    panel.set_xlabel("iteration")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def summarize(runs: Mapping[str, Scalars], scalars: Sequence[str] = DEFAULT_SCALARS) -> str:
    """Return a table of every scalar's first and last value, in training and in validation.

    Below it, for runs that validated: how far the last validation 'lm loss' lies below the 'lm
    loss' of the first iteration, in nats.

    Raises:
        ValueError: a scalar that no run logged.
    """
    check_scalars(runs, scalars)
    rows = [("run", "scalar", "first", "at", "last", "at", "change")]
    for scalar in scalars:
        for key in (scalar, f"{scalar} validation"):
            rows += [_summary_row(name, key, run[key]) for name, run in runs.items() if key in run]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True))
        for row in rows
    ]
    lines += [
        f"{name}: the last validation 'lm loss' is {validation_drop(run):.3f} nats below the first "
        "iteration's 'lm loss'"
        for name, run in runs.items()
        if "lm loss" in run and "lm loss validation" in run
    ]
    return "\n".join(lines)


def _summary_row(name: str, key: str, values: Mapping[int, float]) -> tuple[str, ...]:
    (first_at, first), (last_at, last) = _ends(values)
    numbers = (f"{first:.3f}", str(first_at), f"{last:.3f}", str(last_at), f"{last - first:+.3f}")
    return (name, key, *numbers)


def validation_drop(run: Scalars) -> float:
    """Return by how much the last validation 'lm loss' lies below the first training one, in nats.

    Raises:
        KeyError: the run logged no 'lm loss', or did not validate.
    """
    (_, first), _ = _ends(run["lm loss"])
    _, (_, last) = _ends(run["lm loss validation"])
    return first - last


def _ends(values: Mapping[int, float]) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return (iteration, value) of the first and of the last iteration."""
    first, last = min(values), max(values)
    return (first, values[first]), (last, values[last])
