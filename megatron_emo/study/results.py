"""What the studies end with: all records, a summary of them, a table; and the command for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_emo.evaluation.records import Record, write_records


def write_results(
    output: Path, records: Sequence[Record], summary: Sequence[Record], table: str
) -> None:
    """Write records.json, summary.json and table.md to `output`, each whole or not at all."""
    write_records(output / "records.json", records)
    write_records(output / "summary.json", summary)
    part = output / ".table.md.part"
    part.write_text(table, encoding="utf-8")
    os.replace(part, output / "table.md")


def run_summary(
    description: str | None,
    write_summary: Callable[[Path, Path], str],
    argv: Sequence[str] | None = None,
) -> None:
    """Write and print the table that `write_summary(cells, output)` returns."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=Path, required=True, metavar="DIR", help="with records")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the results")
    args = parser.parse_args(argv)
    try:
        print(write_summary(args.cells, args.output))
    except (ValueError, OSError) as error:
        raise SystemExit(f"summary: {error}") from error
