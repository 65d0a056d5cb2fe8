"""The runs of a study's folder as scoring sees them: those whose training is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_emo.launch.run_result import ResultError
from megatron_emo.scaling.running.run_states import find_result, read_state
from megatron_emo.scaling.running.study_files import checkpoints_of, result_file, run_folder

NUMBERS = ("params", "non_embedding", "flops", "loss_flops", "flops_6nd")
"""Of the plan, that go into runs.csv as they are."""


class Unfinished(ValueError):
    """A planned run without a result that counts."""


@dataclass(frozen=True)
class FinishedRun:
    """A run whose training wrote its result."""

    name: str
    folder: Path
    hash: str
    label: str
    objective: str
    seed: int
    size: int | str
    budget: float | None
    """Nominal FLOPs; None where tokens per parameter were asked for."""
    numbers: Mapping[str, int]
    """By NUMBERS."""
    tokens: int
    iteration: int
    """Of the last step, and of its checkpoint."""
    gpu_hours: float

    @property
    def checkpoints(self) -> Path:
        """What Megatron's --save was."""
        return checkpoints_of(self.folder)

    @property
    def documents(self) -> Path:
        """Where the sums of each held-out document go."""
        return self.folder / "documents.jsonl"

    @property
    def score(self) -> Path:
        """Where the records go."""
        return self.folder / "score.json"

    @property
    def exported(self) -> Path:
        """Where the checkpoint is exported to."""
        return self.folder / "hf"


def read_finished(output: Path, entry: Mapping[str, Any]) -> FinishedRun:
    """Return a run of the manifest with what its training measured.

    Raises:
        Unfinished: no result.json, or one of another configuration, of fewer steps or tokens, or
            without hours.
    """
    name = entry["name"]
    folder = run_folder(output, name)
    if not result_file(folder).exists():
        raise Unfinished(f"{name}: no {result_file(folder).name} ({read_state(folder).state})")
    try:
        result = find_result(output, entry)
    except ResultError as error:
        raise Unfinished(f"{name}: {error}") from error
    if not result.gpu_hours > 0:
        raise Unfinished(f"{name}: gpu_hours: expected above 0, got {result.gpu_hours}")
    same = ("name", "hash", "label", "objective", "seed", "size", "budget")
    return FinishedRun(
        **{key: entry[key] for key in same},
        folder=folder,
        numbers={number: entry[number] for number in NUMBERS},
        tokens=result.tokens,
        iteration=result.iteration,
        gpu_hours=result.gpu_hours,
    )
