"""Time training steps over layouts and objectives, by strong or weak scaling.

python tools/scaling_study.py throughput --plan examples/scaling/throughput_cpu.yaml \\
    --output runs/throughput_cpu

Every size, layout and objective of the file is a run of examples/multinode/train.sh on mock data,
whose event log says what each step took. Objectives of a layout follow each other, so that what
else the machine does hits both. A layout that cannot be is named before anything starts, and a run
that fails at the end; neither has a row. Prints and writes median and quartiles of the step, tokens
a second, TFLOP/s and MFU of each GPU by exact FLOPs, the share of the output layer with its loss,
efficiency, and the step's time over that of the first objective.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from megatron_emo.foreign_files import read_json_object
from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.plans.plan_report import write_table
from megatron_emo.scaling.speed.throughput import Measured, read_cell, run_cells
from megatron_emo.scaling.speed.throughput_cells import Cell, Timing, make_cells
from megatron_emo.scaling.speed.throughput_file import read_study_file
from megatron_emo.scaling.speed.throughput_report import format_result, make_result, make_rows
from megatron_emo.whole_files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--plan", required=True, metavar="FILE", help="YAML, as examples/scaling/throughput_*.yaml")
    add("--output", required=True, metavar="DIR", help="the study's folder")
    add("--resume", action="store_true", help="go on in DIR: runs that are done are not repeated")
    add(
        "--steps",
        type=int,
        default=Timing.steps,
        help="timed steps of a run (default: %(default)s)",
    )
    add(
        "--warmup",
        type=int,
        default=Timing.warmup,
        help="steps before them that are dropped (default: %(default)s)",
    )
    add(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="TFLOP/s that MFU is taken of (default: the GPU's datasheet, of a CPU or fp32 none)",
    )
    add(
        "--skip-impossible",
        action="store_true",
        help="leave out layouts that cannot be instead of refusing the study",
    )
    add("--json", metavar="OUT", help="write rows here too (default: DIR/throughput.json alone)")
    add("--csv", metavar="OUT", help="write a table here too (default: DIR/throughput.csv alone)")


def run(args: argparse.Namespace) -> dict:
    """Run the study, print and write its rows, and return what --json holds.

    Raises:
        ValueError: a file or layouts that are refused; afterwards, runs that failed.
        FileNotFoundError: no such file.
    """
    spec, output = read_study_file(args.plan), Path(args.output)
    timing = Timing(args.steps, args.warmup)
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise PlanError(f"--peak-tflops: expected above 0, got {args.peak_tflops}")
    cells, skipped = make_cells(spec, args.skip_impossible)
    for text in skipped:
        print(f"skipped {text}")
    done, failure = run_cells(cells, spec, timing, output, Path(args.plan), args.resume)
    measured, failed = _read_cells(cells, done, timing, output)
    peak = None if args.peak_tflops is None else args.peak_tflops * 1e12
    rows = make_rows(cells, measured, spec, peak)
    result = make_result(spec, timing, rows, failed, skipped)
    for path in filter(None, (output / "throughput.json", args.json)):
        write_json(path, result)
    for path in filter(None, (output / "throughput.csv", args.csv)):
        if rows:
            write_table(path, rows)
    print("\n".join(format_result(result)))
    if failed or failure:
        raise PlanError(failure or f"failed: {'; '.join(failed)}")
    return result


def _read_cells(
    cells: list[Cell], done: set[str], timing: Timing, output: Path
) -> tuple[dict[str, Measured], list[str]]:
    """Return (what was measured by cell, why others were not)."""
    measured, failed = {}, []
    for cell in cells:
        if cell.name not in done:
            failed.append(f"{cell.name}: the run failed; see {output / 'logs' / cell.name}.log")
            continue
        try:
            measured[cell.name] = read_cell(cell, timing, output)
        except PlanError as error:
            failed.append(str(error))
    return measured, failed


def read_result(path: str | os.PathLike, flag: str) -> dict:
    """Return a study's rows from its folder or its JSON.

    Raises:
        PlanError: another file, or no rows.
        FileNotFoundError: no such file.
    """
    from megatron_emo.scaling.speed.throughput_report import SCHEMA

    path = Path(path)
    path = path / "throughput.json" if path.is_dir() else path
    try:
        content = read_json_object(path)
    except ValueError as error:
        raise PlanError(f"{flag} {error}") from error
    found = content.get("schema")
    if found != SCHEMA:
        raise PlanError(f"{flag} {path}: schema: expected {SCHEMA!r}, got {found!r}")
    if not content.get("rows"):
        raise PlanError(f"{flag} {path}: expected rows, got none")
    return content
