"""One base model, then the same steps of each objective on five domains: who models them better?

python examples/language_modeling/run.py --output runs/language_modeling --jobs 2
python examples/language_modeling/run.py --output runs/lm-gpt2 --size paper --base gpt2/ --gpus 1 \\
    --data wikitext=wiki.train.tokens,wiki.valid.tokens,wiki.test.tokens

Goes on where it was stopped; --dry-run shows what is done. README.md says what you should see.
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path

from megatron_emo.study.language_modeling.corpora import DOMAINS, parse_files
from megatron_emo.study.language_modeling.plan import ROOT, Study, data_tasks, study_tasks
from megatron_emo.study.language_modeling.sizes import OBJECTIVES, SIZES, grow
from megatron_emo.study.language_modeling.summary import write_summary
from megatron_emo.study.tasks import TaskError, run_tasks


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="all files of the study")
    add("--size", choices=["laptop", "paper"], default="laptop", help="(default: %(default)s)")
    add("--smoke", action="store_true", help="every step at toy size, in place of --size")
    root, own = ROOT.parent / "shared" / "data", "NAME=TRAIN,VALID,TEST"
    add(
        "--data-root",
        type=Path,
        default=root,
        metavar="DIR",
        help="of the domains known by name (default: ../shared/data beside this repository)",
    )
    add(
        "--data",
        action="append",
        default=[],
        metavar=own,
        help="own files: .jsonl, .tokens "
        "(WikiText), .csv (AG News), else a document a line; can be repeated",
    )
    add("--base", type=Path, metavar="HF_DIR", help="GPT-2 or OPT-125M, for --size paper")
    add("--featurizer", type=Path, metavar="HF_DIR", help="of MAUVE (default: the base)")
    add(
        "--domains",
        metavar="A,B",
        help=f"of {', '.join(DOMAINS)}, or of --data: the base is trained on all of these "
        "(default: all, or with --size paper those of --data)",
    )
    add("--only", metavar="A,B", help="of the domains, run the cells of these (default: all)")
    add("--objectives", metavar="A,B", help=f"of {', '.join(OBJECTIVES)} (default: all)")
    add("--seeds", metavar="N,N", help="of data order and draws (default: 1,2,3)")
    add(
        "--grow",
        type=int,
        default=1,
        metavar="N",
        help="times the steps, prompts and documents (default: %(default)s)",
    )
    add("--gpus", type=int, default=0, metavar="N", help="of a training; 0: CPU (default: 0)")
    add("--megatron-args", default="", metavar="WORDS", help="for every training, as '--bf16'")
    add("--jobs", type=int, default=1, help="tasks at once (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of a task (default: the cores over --jobs)")
    add("--keep-going", action="store_true", help="when a task fails, run what does not need it")
    add("--dry-run", action="store_true", help="list the tasks and what is done")
    add("--summarize", action="store_true", help="a table of the cells that are there, and no more")
    return parser


def build_study(args: argparse.Namespace) -> Study:
    """Return the study that the flags ask for."""
    files = {name: tuple(p.absolute() for p in ps) for name, ps in parse_files(args.data).items()}
    name = "smoke" if args.smoke else args.size
    size = grow(SIZES[name], args.grow)
    known = tuple(files) if name == "paper" else tuple(dict.fromkeys((*size.domains, *files)))
    domains = tuple(args.domains.split(",")) if args.domains else known
    unknown = [domain for domain in domains if domain not in DOMAINS and domain not in files]
    if unknown or not domains:
        found = repr(unknown[0]) if unknown else "none, and no --data"
        raise ValueError(f"--domains: expected some of {', '.join({**DOMAINS, **files})}, {found}")
    size = replace(size, domains=domains)
    if args.objectives:
        size = replace(size, objectives=tuple(args.objectives.split(",")))
    if args.seeds:
        size = replace(size, seeds=_parse_seeds(args.seeds))
    place = [p and p.absolute() for p in (args.output, args.data_root, args.base, args.featurizer)]
    words = tuple(shlex.split(args.megatron_args))
    only = tuple(args.only.split(",")) if args.only else ()
    return Study(size, *place, files=files, only=only, gpus=args.gpus, megatron_args=words)


def _parse_seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError as error:
        raise ValueError(f"--seeds: expected numbers, got {text!r}") from error


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        study = build_study(args)
        if args.summarize:
            print(write_summary(study.output / "cells", study.output / "results"))
            return
        threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(1, args.jobs))
        # Not among a task's own settings: other threads are no reason to run it again.
        os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        how = {"log_dir": study.output / "log", "jobs": args.jobs, "dry_run": args.dry_run}
        if study.size.tuning.iters is None:
            # How many steps the epochs are is known once the tokens are counted.
            run_tasks(data_tasks(study), **how)
            if args.dry_run:
                return
        run_tasks(study_tasks(study), keep_going=args.keep_going, **how)
    except (ValueError, OSError, TaskError) as error:
        raise SystemExit(f"language_modeling: {error}") from error
    if not args.dry_run:
        print((study.output / "results" / "table.md").read_text())


if __name__ == "__main__":
    main()
