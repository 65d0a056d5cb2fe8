"""One command of tools/evaluate.py, which goes on with its answers where it was cut off.

python -m megatron_emo.study.calibration.measure --output sst2.json --answers sst2.jsonl \\
    icl --model smollm2/ --task sst2 --data cls/

Answers of the same model under the same flags are kept, all others are dropped: the model's folder
may have been written anew since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_emo.evaluation.command import build_parser, run_command
from megatron_emo.evaluation.records import Record, hash_model

ANSWERS = {"icl": "--predictions", "perplexity": "--per-document"}
"""The flag of the file that holds what each question or document gave."""


def measure(words: Sequence[str], output: Path, answers: Path) -> list[Record]:
    """Run a subcommand; write its records to `output` and what is behind them to `answers`.

    Args:
        words: subcommand and flags, among them --model.

    Raises:
        ValueError: what the subcommand raises.
    """
    parser = build_parser("")
    made_of = json.dumps([list(words), hash_model(parser.parse_args(words).model)])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    begun = answers.with_name(f"{answers.stem}.{key}.begun")
    answers.parent.mkdir(parents=True, exist_ok=True)
    for other in answers.parent.glob(f"{answers.stem}.*.begun*"):
        if not other.name.startswith(begun.name):
            other.unlink()
    flags = [ANSWERS[words[0]], str(begun), "--resume", "--json", str(output)]
    records = run_command(parser.parse_args([*words, *flags]))
    for path in answers.parent.glob(f"{begun.name}*"):
        os.replace(path, answers.with_name(path.name.replace(begun.name, answers.name)))
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="for the records")
    add("--answers", type=Path, required=True, metavar="FILE", help="for what is behind them")
    add("words", nargs=argparse.REMAINDER, help="a subcommand of tools/evaluate.py, its flags")
    args = parser.parse_args(argv)
    if not args.words or args.words[0] not in ANSWERS:
        raise SystemExit(f"measure: expected one of {', '.join(ANSWERS)}, got {args.words[:1]}")
    try:
        measure(args.words, args.output, args.answers)
    except (ValueError, OSError) as error:
        raise SystemExit(f"measure: {error}") from error


if __name__ == "__main__":
    main()
