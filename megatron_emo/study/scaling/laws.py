"""Every law that a table of runs suffices for, and the objectives compared.

python -m megatron_emo.study.scaling.laws --csv study/runs.csv --output laws --objectives mle,emo1

Writes OBJECTIVE_APPROACH.json for approaches 1, 2, 3 and vpnls, and compare.json, as `fit` and
`compare` write them; where one of them refuses the table, {"refused": its words} instead.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_emo.study.scaling.columns import compare_columns, fit_columns

APPROACHES = ("1", "2", "3", "vpnls")
COMPARISON = "compare.json"
_TOOL = Path(__file__).resolve().parents[3] / "tools" / "scaling_study.py"


def law_name(objective: str, approach: str) -> str:
    """Return the file's name."""
    return f"{objective}_{approach}.json"


def list_commands(
    table: Path, objectives: Sequence[str], draws: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name of the JSON, flags of tools/scaling_study.py without --json).

    Raises:
        ValueError: a table without runs or without a column budget.
    """
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "budget" not in rows[0]:
        raise ValueError(f"--csv {table}: expected runs of `score`, got none")
    for objective in objectives:
        for approach in APPROACHES:
            flags = ("fit", "--csv", str(table), "--columns", fit_columns(rows))
            flags += ("--where", f"label={objective}", "--approach", approach)
            yield law_name(objective, approach), (*flags, "--bootstrap", str(draws))
    if len(objectives) > 1:
        flags = ("compare", "--csv", str(table), "--columns", compare_columns(rows))
        flags += ("--baseline", objectives[0], "--others", ",".join(objectives[1:]))
        yield COMPARISON, (*flags, "--bootstrap", str(draws))


def run_tool(flags: Sequence[str]) -> str:
    """Run tools/scaling_study.py and return "", or what it says where it refuses.

    Raises:
        RuntimeError: it failed in another way than by refusing.
    """
    command = (sys.executable, str(_TOOL), *flags)
    done = subprocess.run(command, capture_output=True, text=True)  # nosec B603
    print(done.stdout, flush=True)
    if done.returncode == 0:
        return ""
    # What the tool says at its end; warnings of libraries come before it.
    _, said, refusal = done.stderr.rpartition(f"scaling_study {flags[0]}: ")
    if not said:
        raise RuntimeError(f"{' '.join(flags)}: exit code {done.returncode}\n{done.stderr}")
    return refusal.strip()


def run_or_note(flags: Sequence[str], path: Path) -> str:
    """As `run_tool`, with --json `path`, which holds the refusal where there is one."""
    if refusal := run_tool((*flags, "--json", str(path))):
        path.write_text(json.dumps({"refused": refusal}, indent=1) + "\n", encoding="utf-8")
    return refusal


def main(argv: list[str] | None = None) -> None:
    """Fit and compare; the folder appears when all is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--csv", type=Path, required=True, metavar="FILE", help="of `scaling_study.py score`")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--objectives", required=True, metavar="A,B", help="labels, the baseline first")
    add("--bootstrap", type=int, default=200, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.csv.is_file():
        raise SystemExit(f"laws: --csv {args.csv}: no such file")
    try:
        commands = list(list_commands(args.csv, args.objectives.split(","), args.bootstrap))
    except ValueError as error:
        raise SystemExit(f"laws: {error}") from error
    part = args.output.with_name(f".{args.output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number, (name, flags) in enumerate(commands, 1):
        print(f"== [{number}/{len(commands)}] {name}", flush=True)
        try:
            refused = run_or_note(flags, part / name)
        except RuntimeError as error:
            raise SystemExit(f"laws: {error}") from error
        if refused:
            print(f"refused: {refused}", flush=True)
    shutil.rmtree(args.output, ignore_errors=True)
    os.replace(part, args.output)


if __name__ == "__main__":
    main()
