"""The flags of tools/evaluate.py: subcommands return records, which are written and printed."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from megatron_emo.evaluation.records import Record, write_records

COMMANDS = {
    "text": "diversity, repetition and rank statistics of texts",
    "mauve": "how near two sets of texts lie, in the features of a model",
    "perplexity": "perplexity of a model on texts, per token, word and byte",
    "distribution": "cross-entropies, total variation and reverse KL against a reference model",
    "generate": "continue prompts with a model, resumable",
    "temperature": "the temperature at which a model's entropy equals another's",
    "icl": "few-shot classification",
}
"""Subcommand: what it is for. Each is a module of `evaluation.commands`."""


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of all subcommands, each with --json and --label."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"megatron_emo.evaluation.commands.{name}")
        task = tasks.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(task)
        task.add_argument("--json", metavar="FILE", help="write the records here")
        task.add_argument(
            "--label",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="kept with every record, as objective=emo1; can be repeated",
        )
        task.set_defaults(run=module.run)
    return parser


def parse_labels(labels: Sequence[str]) -> dict[str, str]:
    """Return {name: value}.

    Raises:
        ValueError: a label without "=" or without a name.
    """
    pairs = {}
    for label in labels:
        name, equals, value = label.partition("=")
        if not (name and equals):
            raise ValueError(f"--label: expected NAME=VALUE, got {label!r}")
        pairs[name] = value
    return pairs


def run_command(args: argparse.Namespace) -> list[Record]:
    """Run the chosen subcommand, write --json, print the records and return them."""
    args.labels = parse_labels(args.label)
    records = args.run(args)
    if args.json and records:
        write_records(args.json, records)
    for record in records:
        print(format_record(record))
    return records


def format_record(record: Record) -> str:
    """Return one line: metric, value, interval, unit, n, definition."""
    interval = record.interval
    spread = f" [{interval.low:.6g}, {interval.high:.6g}]" if interval else ""
    unit = "" if record.unit == "1" else f" {record.unit}"
    head = f"{record.metric:<20} {record.value:.6g}{unit}{spread}"
    return f"{head}  (n={record.n} {record.n_unit}, {record.definition})"
