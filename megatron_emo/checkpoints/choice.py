"""Which checkpoint of a run's folder is loaded, and what is said where it is not the one named."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_emo.checkpoints.tracker import folder_of, read_tracker
from megatron_emo.checkpoints.whole import Findings
from megatron_emo.torch_dist import TRACKER

_ITERATION = re.compile(r"iter_(\d{7,})")
_SHOWN = 8
"""Problems of one checkpoint that a message names."""


class Inspect(Protocol):
    """`whole.inspect` for one run: what is wrong with the checkpoint in a folder.

    It may have collectives inside: every rank calls it for the same folders in the same order.
    """

    def __call__(self, folder: Path, *, reads_all: bool = True) -> Findings: ...


@dataclass(frozen=True)
class RunFolder:
    """What lies in a folder of checkpoints, as one rank sees it and all use it."""

    root: str
    tracker: int | str | None
    """What the tracker names; None without a tracker, or where `tracker_problem` says why."""
    tracker_problem: str | None
    iterations: tuple[int, ...]
    """Of its folders iter_*, whole or not, ascending."""

    @classmethod
    def read(cls, root: str | Path) -> RunFolder:
        """Look; a folder that is not there is an empty one. No collective."""
        tracker, problem, names = None, None, []
        try:
            if os.path.isdir(root):
                names = os.listdir(root)
                tracker = read_tracker(root)
        except (ValueError, OSError) as error:
            problem = str(error)
        matches = [m for m in map(_ITERATION.fullmatch, names) if m]
        return cls(str(root), tracker, problem, tuple(sorted(int(m[1]) for m in matches)))


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load."""

    latest: int | str | None
    """Its iteration, RELEASE, or None where there is nothing to load."""
    notes: tuple[str, ...] = ()
    """What has to be said before it is loaded: what was passed over, and why."""


def choose(
    run: RunFolder,
    inspect: Inspect,
    *,
    step: int | None = None,
    falls_back: bool = False,
) -> Choice:
    """Return the checkpoint that the tracker (or `step`) names, if it is whole.

    Otherwise, with `falls_back`, the newest whole one, and a note on each that was passed over.
    Without a tracker the newest whole one is taken too: a run can end between its first
    checkpoint's last byte and its name in the tracker. Folders of saves that were cut off count
    for nothing then.

    Args:
        step: the iteration asked for by --ckpt-step, before the tracker's.

    Raises:
        ValueError: naming the checkpoint, its files, what is wrong with them, and what could be
            loaded instead.
    """
    wanted = step or run.tracker
    if wanted is not None:
        folder = folder_of(run.root, wanted)
        problems = inspect(folder).problems
        if not problems:
            return Choice(wanted)
        problem = f"checkpoint {folder}: {describe(problems)}"
    elif run.tracker_problem is not None:
        problem = run.tracker_problem
    else:
        return _choose_without_tracker(run, inspect, falls_back)
    others = [i for i in reversed(run.iterations) if i != wanted]
    if not falls_back:
        raise ValueError(f"{problem}\n  {_advice(run, others, inspect)}")
    return _newest_whole(run, others, inspect, [problem])


def describe(problems: Sequence[str]) -> str:
    """Return the first problems in one line."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "; ".join([*problems[:_SHOWN], *more])


def _newest_whole(
    run: RunFolder, iterations: Sequence[int], inspect: Inspect, passed_over: list[str]
) -> Choice:
    for iteration in iterations:
        folder = folder_of(run.root, iteration)
        problems = inspect(folder).problems
        if not problems:
            notes = [f"passed over: {problem}" for problem in passed_over]
            return Choice(iteration, (*notes, f"FALLING BACK to the newest whole one: {folder}"))
        passed_over.append(f"checkpoint {folder}: {describe(problems)}")
    raise ValueError("\n  ".join(["--fallback: no whole checkpoint is left", *passed_over]))


def _choose_without_tracker(run: RunFolder, inspect: Inspect, falls_back: bool) -> Choice:
    passed_over, are_cut_off = [], True
    for iteration in reversed(run.iterations):
        folder = folder_of(run.root, iteration)
        found = inspect(folder)
        if not found.problems:
            why = f"no {TRACKER} in {run.root}: taking the newest whole checkpoint, {folder.name}"
            return Choice(iteration, (*passed_over, why))
        problem = f"checkpoint {folder}: {describe(found.problems)}"
        if not (falls_back or found.is_cut_off):
            older = [i for i in run.iterations if i < iteration]
            raise ValueError(
                f"no {TRACKER} in {run.root}, and {problem}\n  {_advice(run, older, inspect)}"
            )
        passed_over.append(f"passed over: {problem}")
        are_cut_off = are_cut_off and found.is_cut_off
    if not are_cut_off:
        raise ValueError("\n  ".join(["--fallback: no whole checkpoint is left", *passed_over]))
    return Choice(None, tuple(passed_over))


def _advice(run: RunFolder, iterations: Sequence[int], inspect: Inspect) -> str:
    """What else could be loaded, at a glance: hashes are compared when it is."""
    for iteration in sorted(iterations, reverse=True):
        folder = folder_of(run.root, iteration)
        if not inspect(folder, reads_all=False).problems:
            return f"add --fallback to go on from the newest that looks whole, {folder.name}"
    return f"no other checkpoint in {run.root} looks whole"
