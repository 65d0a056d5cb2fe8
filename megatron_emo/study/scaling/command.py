"""The flags of examples/scaling/run.py, and the study that they ask for."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_emo.study.scaling.corpora import CORPORA, DEMO, HELD_OUT_BYTES
from megatron_emo.study.scaling.plan import (
    ROOT,
    Study,
    analysis_tasks,
    data_tasks,
    training_commands,
)
from megatron_emo.study.tasks import TaskError, format_status, run_tasks

DATA = ROOT.parent / "shared" / "data"
PLANS = ROOT / "examples" / "scaling"
INTERRUPTED = 75
"""Exit code of `run` where a signal stopped its runs: the same command goes on."""


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="all files of the study")
    add(
        "--corpora",
        default=f"{DEMO},wikitext",
        metavar="A,B",
        help=f"of {', '.join(CORPORA)}, {DEMO} (docstrings: every Python has it), or of --data "
        "(default: %(default)s)",
    )
    add(
        "--data-root",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="of corpora known by name (default: ../shared/data beside this repository)",
    )
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FILE,...",
        help="own texts: .jsonl, .tokens (WikiText), else a document a line; can be repeated, "
        "for one name too",
    )
    add(
        "--held-out-bytes",
        type=int,
        default=HELD_OUT_BYTES,
        metavar="N",
        help="of each corpus, not trained on (default: %(default)s)",
    )
    add(
        "--stories",
        type=Path,
        metavar="DIR",
        help="with stories260K.bin and tok512.bin, whose tokenizer and output layer serve "
        "(default: models/stories260K of --data-root)",
    )
    add("--model", type=Path, metavar="HF_DIR", help="tokenizer and output layer instead of those")
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help="YAML without data: (default: examples/scaling/plan_laptop.yaml)",
    )
    add("--smoke", action="store_true", help="every step at toy size, on the first corpus alone")
    add("--jobs", type=int, default=1, help="trainings at once (default: %(default)s)")
    add(
        "--bootstrap",
        type=int,
        metavar="N",
        help="resamples of fits and comparisons (default: 200; 20 with --smoke)",
    )
    add("--dry-run", action="store_true", help="list what is done and what is to do")
    return parser


def build_study(args: argparse.Namespace) -> Study:
    """Return the study that the flags ask for.

    Raises:
        ValueError: flags out of range, or a plan that is none.
        FileNotFoundError: no such file.
    """
    draws = args.bootstrap if args.bootstrap is not None else (20 if args.smoke else 200)
    # A comparison takes no fewer than two draws.
    least = {"jobs": (args.jobs, 1), "bootstrap": (draws, 2)}
    least["held-out-bytes"] = (args.held_out_bytes, 1)
    for flag, (value, low) in least.items():
        if value < low:
            raise ValueError(f"--{flag}: expected at least {low}, got {value}")
    default = "plan_laptop_smoke.yaml" if args.smoke else "plan_laptop.yaml"
    plan = (args.plan or PLANS / default).absolute()
    corpora = tuple(filter(None, args.corpora.split(",")))
    files = parse_files(args.data)
    for name in files:
        if name not in corpora:
            raise ValueError(f"--data {name}: expected one of --corpora {args.corpora}, got none")
    root = args.data_root.absolute()
    stories = (args.stories or root / "models" / "stories260K").absolute()
    study = Study(
        args.output.absolute(),
        plan,
        root,
        stories,
        corpora,
        read_objectives(plan),
        model=args.model and args.model.absolute(),
        files=files,
        held_out_bytes=args.held_out_bytes,
        draws=draws,
    )
    return replace(study, corpora=corpora[:1]) if args.smoke else study


def read_objectives(plan: Path) -> tuple[str, ...]:
    """Return the labels of a plan's objectives, mle first where it is among them."""
    content = yaml.safe_load(plan.read_text(encoding="utf-8"))
    entries = content.get("objectives") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--plan {plan}: objectives: expected a list, got {entries!r}")
    labels = [
        str(entry.get("label", entry.get("objective"))) if isinstance(entry, Mapping) else entry
        for entry in entries
    ]
    return tuple(sorted(labels, key=lambda label: label != "mle"))


def parse_files(texts: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return {corpus: files} of NAME=FILE,..., all those of a name that is given twice.

    Raises:
        ValueError: another form, or a file that does not exist.
    """
    files: dict[str, tuple[Path, ...]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        paths = tuple(Path(part).absolute() for part in value.split(",") if part)
        if not name.replace("-", "").replace("_", "").isalnum() or not paths:
            raise ValueError(f"--data: expected NAME=FILE,..., got {text!r}")
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--data {name}: {path}: no such file")
        files[name] = (*files.get(name, ()), *paths)
    return files


def run_study(args: argparse.Namespace) -> str:
    """Run what is not done and return the pages, or "" of a dry run.

    Raises:
        ValueError, OSError: flags, plan or files.
        TaskError: a step failed, or was stopped.
    """
    study = build_study(args)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    log = study.output / "log"
    if args.dry_run:
        _list_steps(study)
        return ""
    run_tasks(data_tasks(study), log / "data", jobs=args.jobs)
    for corpus in study.corpora:
        for command in training_commands(study, corpus, args.jobs):
            _show_command(corpus, command)
    run_tasks(analysis_tasks(study), log / "analysis", jobs=args.jobs)
    return "\n".join((study.results(c) / "table.md").read_text() for c in study.corpora)


def _list_steps(study: Study) -> None:
    print(format_status(data_tasks(study), study.output / "log" / "data"))
    for corpus in study.corpora:
        if study.plan_of(corpus).exists():
            run = training_commands(study, corpus, 1)[0]
            _show_command(corpus, (*run[: run.index("--jobs")], "--dry-run"))
    tables = [study.folder(corpus) / "runs.csv" for corpus in study.corpora]
    if all(table.exists() for table in tables):
        print(format_status(analysis_tasks(study), study.output / "log" / "analysis"))
    else:
        print("laws, tables and pictures: to run, after the scores")


def _show_command(corpus: str, command: Sequence[str]) -> None:
    """Run a command that says itself how far it is.

    Its signals are its own business: Ctrl-C reaches it too, and it ends its trainings first.

    Raises:
        TaskError: it failed or was stopped.
    """
    what = f"{corpus} {command[2]}"
    print(f"== {what}", flush=True)
    process = subprocess.Popen(command)  # nosec B603
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait() or 130
    if code:
        stopped = code in (INTERRUPTED, 130, 143) or code < 0
        again = "; the same command goes on from there" if stopped else ""
        print(f"== {what}: exit code {code}", file=sys.stderr, flush=True)
        raise TaskError(f"{what}: ended with exit code {code}{again}")
