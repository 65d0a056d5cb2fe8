"""runs.csv: a row for each scored run, as `fit`, `compare` and `pictures` read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_emo.evaluation.records import Record
from megatron_emo.scaling.running.finished_runs import NUMBERS, FinishedRun
from megatron_emo.scaling.running.score import BITS, LOSS
from megatron_emo.whole_files import write_csv

COLUMNS = (
    *("name", "label", "objective", "seed", "size", "budget"),
    *(NUMBERS[0], NUMBERS[1], "tokens", *NUMBERS[2:], "flops_all"),
    *("gpu_hours", "loss", "bits_per_byte", "documents"),
)


def make_row(run: FinishedRun, records: Sequence[Record], output: Path) -> dict:
    """Return a run's row by COLUMNS; flops_all has what the loss adds.

    Args:
        output: the study's folder, from which the documents' path is.
    """
    values = {record.metric: record.value for record in records}
    return {
        "name": run.name,
        "label": run.label,
        "objective": run.objective,
        "seed": run.seed,
        "size": run.size,
        "budget": "" if run.budget is None else run.budget,
        **run.numbers,
        "tokens": run.tokens,
        "flops_all": run.numbers["flops"] + run.numbers["loss_flops"],
        "gpu_hours": run.gpu_hours,
        "loss": values[LOSS],
        "bits_per_byte": values[BITS],
        "documents": run.documents.relative_to(output).as_posix(),
    }


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Write the rows, whole or not at all."""
    write_csv(path, COLUMNS, rows)
