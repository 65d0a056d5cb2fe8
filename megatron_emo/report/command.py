"""The flags of tools/report.py, and what they do."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_emo.evaluation.records import Record, read_records
from megatron_emo.report.html import format_page
from megatron_emo.report.layout import select
from megatron_emo.report.markdown import format_markdown, format_table
from megatron_emo.report.metrics import BETTER, parse_better
from megatron_emo.report.plots import make_plots, write_plots
from megatron_emo.report.study import Study, read_study
from megatron_emo.report.tables import Table, make_tables
from megatron_emo.report.trace import check_document, update_document
from megatron_emo.whole_files import write_whole

TITLE = "Measurements"


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--records", nargs="+", metavar="FILE|DIR", help="record files, or folders of them")
    add(
        "--study",
        nargs="+",
        default=[],
        type=Path,
        metavar="DIR",
        help="scaling studies, or folders of their pictures, for the page; without --records too",
    )
    add_choices(parser)
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    add("--html", type=Path, metavar="FILE", help="write one self-contained page")
    add("--png", type=Path, metavar="DIR", help="write a picture METRIC.png for each metric")
    add("--title", default=TITLE, help="of the Markdown and the page (default: %(default)s)")
    add("--notes", type=Path, metavar="FILE", help="UTF-8 text that the page shows as it is")
    add("--check", type=Path, metavar="FILE.md", help="check a document's numbers on its records")
    add("--strict", action="store_true", help="--check fails at decimals without a reference too")
    add("--update", type=Path, metavar="FILE.md", help="write a document's tables anew")
    return parser


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose records and lay out tables."""
    add = parser.add_argument
    names = "labels, or metric, or model"
    add("--rows", type=_split, metavar="NAME,...", help=f"{names} (default: labels that vary)")
    add("--columns", type=_split, metavar="NAME,...", help=f"{names} (default: metric)")
    add("--metric", nargs="+", default=[], metavar="NAME", help="these alone, in this order")
    add("--where", action="append", default=[], metavar="NAME=VALUE", help="records of this label")
    add(
        "--compare",
        type=_split,
        metavar="NAME,...",
        help="rows compete for bold if they differ in these alone (default: objective, or model)",
    )
    known = ", ".join(f"{metric}={end}" for metric, end in list(BETTER.items())[:3])
    add(
        "--better",
        action="append",
        default=[],
        metavar="METRIC=high|low",
        help=f"which end is the good one; known are {known}... (megatron_emo/report/metrics.py)",
    )


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_where(words: Sequence[str]) -> dict[str, list[str]]:
    """Return {name: values}; a name given twice takes either value.

    Raises:
        ValueError: a word that is not NAME=VALUE.
    """
    where: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"--where: expected NAME=VALUE, got {word!r}")
        where.setdefault(name, []).append(value)
    return where


def lay_out(
    args: argparse.Namespace, records: Sequence[Record]
) -> tuple[list[Record], list[Table]]:
    """Return the records that the flags choose, and their tables."""
    chosen = select(records, args.metric, parse_where(args.where))
    better = parse_better(args.better)
    return chosen, make_tables(chosen, better, args.rows, args.columns, args.compare)


def run_command(args: argparse.Namespace) -> list[str]:
    """Do what the flags say and return a line for each thing done.

    Raises:
        ValueError: flags or records that do not fit, or a document that --check does not pass.
        OSError: a file that cannot be read or written.
    """
    if args.check or args.update:
        lines = [_update(args.update)] if args.update else []
        return [*lines, *(_check(args.check, args.strict) if args.check else [])]
    if args.study and not args.html:
        raise ValueError("--study: expected --html FILE with it, got none")
    if not (args.records or args.study):
        raise ValueError("--records: expected files or folders, got none")
    notes = args.notes.read_text(encoding="utf-8") if args.notes else ""
    studies = [read_study(folder) for folder in args.study]
    if not args.records:
        return _write_studies(args, studies, notes)
    records, tables = lay_out(args, read_records(args.records))
    better = parse_better(args.better)
    # All is made before anything is written.
    plots = make_plots(records, better) if args.html or args.png else []
    markdown = format_markdown(tables, records, better, args.title)
    page = (
        format_page(records, tables, plots, better, args.title, notes, studies) if args.html else ""
    )
    if not (args.markdown or args.html or args.png):
        return [markdown.rstrip()]
    lines = []
    for path, content in ((args.markdown, markdown), (args.html, page)):
        if path:
            write_whole(path, content)
            lines.append(f"{path}: {len(records)} records, {len(tables)} tables")
    if args.png:
        lines += [str(path) for path in write_plots(plots, args.png)] or [
            f"{args.png}: no pictures, no metric has two values"
        ]
    return lines


def _write_studies(args: argparse.Namespace, studies: Sequence[Study], notes: str) -> list[str]:
    """The page of studies alone: other outputs are made of records."""
    for flag in ("markdown", "png", "metric", "where"):
        if getattr(args, flag):
            raise ValueError(f"--{flag}: expected --records with it, got none")
    write_whole(args.html, format_page([], [], [], {}, args.title, notes, studies))
    return [f"{args.html}: {len(study.pictures)} pictures of {study.folder}" for study in studies]


def render_block(flags: str, folder: Path) -> str:
    """Return the table of a document's block: record files, then flags as on the command line.

    Raises:
        ValueError: unknown flags, or flags that give no or more than one table.
    """
    parser = _BlockParser(add_help=False, allow_abbrev=False)
    parser.add_argument("records", nargs="+")
    add_choices(parser)
    try:
        args = parser.parse_intermixed_args(shlex.split(flags))
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error
    _, tables = lay_out(args, read_records(folder / name for name in args.records))
    if len(tables) != 1:
        raise ValueError(f"expected flags that give one table, got {len(tables)}: see --rows")
    return format_table(tables[0])


class _BlockParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """A mistake in a document is told with its line."""
        raise ValueError(message)


def _update(path: Path) -> str:
    return f"{path}: {update_document(path, render_block)} tables written"


def _check(path: Path, is_strict: bool) -> list[str]:
    trace = check_document(path, render_block)
    wrong = [f"{path}:{finding.line}: {finding.message}" for finding in trace.findings]
    loose = [f"{path}:{line}: a decimal without a reference" for line in trace.loose]
    if is_strict:
        wrong += loose
    if wrong:
        raise ValueError("\n".join([f"{len(wrong)} findings", *wrong]))
    said = f"{path}: {trace.num_numbers} numbers and {trace.num_tables} tables agree with records"
    return [said, *loose]
