"""The flags of examples/calibration/run.py, and the run that they ask for."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_emo.study.calibration.cost import Cost, count_parameters
from megatron_emo.study.calibration.plan import (
    ROOT,
    Measures,
    Study,
    Training,
    count_iters,
    count_tokens,
    data_tasks,
    study_tasks,
)
from megatron_emo.study.calibration.summary import write_summary
from megatron_emo.study.calibration.texts import parse_named_files
from megatron_emo.study.tasks import Task, format_seconds, run_tasks

DATA = ROOT.parent / "shared" / "data"
TEXTS = {
    "wikitext": DATA / "text" / "wikitext103" / "wiki.test.tokens",
    "tinystories": DATA / "text" / "tinystories_944k.txt",
}
"""On the training's kind of text, and on another, which may be forgotten."""
TASKS = "sst2,trec,mr,ag_news,tweet_emotion,mmlu"


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_study(parser)
    _add_training(parser.add_argument_group("training"))
    _add_measures(parser.add_argument_group("measures"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_study(parser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="all files of the study")
    add(
        "--model",
        type=Path,
        default=ROOT / ".venv" / "models" / "smollm2",
        metavar="HF_DIR",
        help="(default: what `make smollm2` writes)",
    )
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[DATA / "text" / "wikitext103" / "wiki.valid.tokens"],
        metavar="FILE",
        help="to train on: .tokens (WikiText), .jsonl, else a document a line (default: "
        "WikiText-103's validation set in ../shared/data)",
    )
    add(
        "--sentences",
        type=int,
        default=25000,
        metavar="N",
        help="of --text, the first ones (default: %(default)s)",
    )
    add("--objectives", default="mle,emo1", metavar="A,B", help="(default: %(default)s)")
    add("--seeds", default="100", metavar="N,N", help="of the data's order (default: %(default)s)")


def _add_training(parser) -> None:
    add, usual = parser.add_argument, Training()
    add("--lr", type=float, default=usual.lr, help="at its highest (default: %(default)s)")
    add(
        "--warmup",
        type=float,
        default=usual.warmup_share,
        help="share of iterations (default: %(default)s)",
    )
    add("--weight-decay", type=float, default=usual.weight_decay, help="(default: %(default)s)")
    add("--batch", type=int, default=usual.batch_size, help="sequences (default: %(default)s)")
    add("--block", type=int, default=usual.block, help="tokens of one (default: %(default)s)")
    add(
        "--micro-batch",
        type=int,
        metavar="N",
        help=f"sequences at once on a rank (default: {usual.micro_batch_size}, or a rank's share)",
    )
    add(
        "--save-interval",
        type=int,
        default=usual.save_interval,
        metavar="N",
        help="iterations between checkpoints (default: %(default)s)",
    )
    add("--gpus", type=int, metavar="N", help="0: CPU (default: all there are)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="(default: %(default)s)")
    add("--megatron-args", default="", metavar="WORDS", help="for every training")


def _add_measures(parser) -> None:
    add = parser.add_argument
    add("--tasks", default=TASKS, metavar="A,B", help="names or YAML files (default: %(default)s)")
    add(
        "--task-data",
        type=Path,
        default=DATA / "cls",
        metavar="DIR",
        help="of --tasks (default: ../shared/data/cls)",
    )
    for flag, what in (("--limit", "questions (default: all)"), ("--shots", "default: 8, MMLU 5")):
        add(flag, action="append", default=[], metavar="[TASK=]N", help=f"{what}; can be repeated")
    add(
        "--eval",
        action="append",
        metavar="NAME=FILE",
        help="texts for perplexity, can be repeated (default: WikiText-103's test set and Tiny "
        "Stories in ../shared/data)",
    )
    add("--documents", type=int, metavar="N", help="of each --eval (default: all)")
    add(
        "--dtype",
        default=Measures.dtype,
        choices=["float32", "bfloat16", "float16"],
        help="models are measured in; exported models are float32 (default: %(default)s)",
    )


def _add_running(parser) -> None:
    add = parser.add_argument
    add("--jobs", type=int, default=1, help="tasks at once (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of a task (default: the cores over --jobs)")
    add("--keep-going", action="store_true", help="when a task fails, run what does not need it")
    add("--dry-run", action="store_true", help="list the tasks and what is done")
    add("--summarize", action="store_true", help="a table of what is measured, and no more")


def parse_numbers(flag: str, texts: list[str]) -> dict[str, int]:
    """Return {task: number} of [TASK=]N; without a task it is ''."""
    numbers = {}
    for text in texts:
        task, _, value = text.rpartition("=")
        if not value.isdigit():
            raise ValueError(f"{flag}: expected [TASK=]N, got {text!r}")
        numbers[task] = int(value)
    return numbers


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def build_study(args: argparse.Namespace) -> Study:
    """Return the study that the flags ask for."""
    texts = parse_named_files("--eval", args.eval or [f"{k}={v}" for k, v in TEXTS.items()])
    measures = Measures(
        tasks=_split(args.tasks),
        task_data=args.task_data.absolute(),
        texts={name: path.absolute() for name, path in texts.items()},
        documents=args.documents,
        limits=parse_numbers("--limit", args.limit),
        shots=parse_numbers("--shots", args.shots),
        dtype=args.dtype,
    )
    gpus = _count_gpus() if args.gpus is None else args.gpus
    training = _training(args, max(1, gpus // max(1, args.tensor_parallel)))
    seeds = _split(args.seeds)
    if not all(seed.isdigit() for seed in seeds):
        raise ValueError(f"--seeds: expected numbers, got {args.seeds!r}")
    model = args.model.absolute()
    parameters = None if gpus or not model.is_dir() else count_parameters(model)
    return Study(
        model,
        args.output.absolute(),
        tuple(path.absolute() for path in args.text),
        args.sentences,
        measures,
        training,
        objectives=_split(args.objectives),
        seeds=tuple(map(int, seeds)),
        gpus=gpus,
        tensor_parallel=args.tensor_parallel,
        megatron_args=tuple(shlex.split(args.megatron_args)),
        cost=parameters and Cost(parameters),
    )


def _training(args: argparse.Namespace, data_parallel: int) -> Training:
    usual = min(Training().micro_batch_size, max(1, args.batch // data_parallel))
    return Training(
        batch_size=args.batch,
        micro_batch_size=usual if args.micro_batch is None else args.micro_batch,
        block=args.block,
        lr=args.lr,
        warmup_share=args.warmup,
        weight_decay=args.weight_decay,
        save_interval=args.save_interval,
    )


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run_study(args: argparse.Namespace) -> str | None:
    """Run what is not done yet; return the table, None with --dry-run.

    Raises:
        ValueError: flags that do not fit together.
        TaskError: a task failed.
    """
    study = build_study(args)
    results = study.output / "results"
    if args.summarize:
        return write_summary(study.output / "cells", results)
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(1, args.jobs))
    # Not among a task's own settings: other threads are no reason to run it again.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    how = {"log_dir": study.output / "log", "jobs": args.jobs, "dry_run": args.dry_run}
    # How many iterations an epoch has is known once the tokens are counted.
    if not args.dry_run or not study.prefix.with_suffix(".idx").exists():
        run_tasks(data_tasks(study), **how)
        if args.dry_run:
            print("what follows depends on the number of tokens, and is known after these two")
            return None
    tasks = study_tasks(study)
    if not args.dry_run:
        print(describe(study, tasks, threads * args.jobs), flush=True)
    run_tasks(tasks, keep_going=args.keep_going, **how)
    return None if args.dry_run else (results / "table.md").read_text()


def describe(study: Study, tasks: Sequence[Task], threads: int) -> str:
    """Return a line on what is trained and one on how long all takes on so many threads."""
    tokens, iters = count_tokens(study.prefix), count_iters(study)
    line = (
        f"{study.sentences:,} sentences, {tokens:,} tokens: {iters} iterations of "
        f"{study.training.batch_size} x {study.training.block} for each of "
        f"{len(study.objectives) * len(study.seeds)} trainings"
    )
    known = [task.seconds for task in tasks if task.seconds]
    if not known or study.cost is None:
        return f"{line}\nhow long this takes here is known once the first tasks are done"
    return (
        f"{line}\nabout {format_seconds(sum(known) / threads)} for all of it on {threads} free "
        "cores, by what SmolLM2-135M took; not counted is what has no --limit or --documents"
    )
