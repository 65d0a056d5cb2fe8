"""What the studies end with: all records, a summary of them, a table; and the command for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_emo.evaluation.records import Record, write_records
from megatron_emo.whole_files import write_whole


def write_results(
    output: Path, records: Sequence[Record], summary: Sequence[Record], table: str
) -> None:
    """Write records.json, summary.json and table.md to `output`, each whole or not at all."""
    write_records(output / "records.json", records)
    write_records(output / "summary.json", summary)
    write_whole(output / "table.md", table)


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
