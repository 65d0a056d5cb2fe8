"""Which objective learns what of a language that is known: exact divergences, leaked mass, spread.

python examples/oracle/run.py --output runs/oracle --jobs 2
python examples/oracle/run.py --output runs/oracle --jobs 2 --language corpus:50@8 --text book.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_emo.evaluation.oracle.languages import LanguageSpec
from megatron_emo.evaluation.oracle.model import STOP_BY, TrainingConfig
from megatron_emo.evaluation.oracle.report import write_report
from megatron_emo.evaluation.oracle.study import SEEDS, StudyConfig, run_study
from megatron_emo.evaluation.oracle.variants import COSTS, GRID

LANGUAGES = ("random50:20", "random0:20")
"""Half of all entries zero, and none, where reverse KL is finite."""


def build_parser() -> argparse.ArgumentParser:
    study, recipe = StudyConfig(), TrainingConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="runs, records, table, figure")
    add(
        "--language",
        action="append",
        metavar="NAME:V[@H]",
        help="random50:20 is random rows over 20 tokens with half of all entries zero, corpus:50 "
        "the bigrams of --text's 49 most frequent words; @H sets the model's width (50); can be "
        f"repeated (default: {' and '.join(LANGUAGES)})",
    )
    add("--text", metavar="FILE", help="UTF-8 text of the corpus languages")
    names = ",".join(GRID)
    add("--objectives", default=names, metavar="A,B", help=f"MLE always runs (default: {names})")
    costs = ",".join(COSTS)
    add("--costs", default=costs, metavar="A,B", help=f"of the EMO family (default: {costs})")
    seeds = ",".join(map(str, SEEDS))
    add("--seeds", default=seeds, metavar="N,N", help=f"(default: {seeds})")
    add("--num-train", type=int, default=study.num_train, help="sequences (default: %(default)s)")
    add("--num-dev", type=int, default=study.num_dev, help="sequences (default: %(default)s)")
    add(
        "--max-epochs",
        type=int,
        default=recipe.max_epochs,
        help="passes over the training sequences (default: %(default)s)",
    )
    add(
        "--batch-size", type=int, default=recipe.batch_size, help="sequences (default: %(default)s)"
    )
    add(
        "--patience",
        type=int,
        default=recipe.patience,
        help="epochs without a better dev loss before a model stops (default: %(default)s)",
    )
    add(
        "--stop-by",
        choices=STOP_BY,
        default=recipe.stop_by,
        help="the dev loss: the objective's own, or Jensen-Shannon (default: %(default)s)",
    )
    add("--jobs", type=int, default=1, help="processes, a thread each (default: %(default)s)")
    add("--resume", action="store_true", help="keep the runs that --output holds, add the rest")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        recipe = TrainingConfig(
            batch_size=args.batch_size,
            max_epochs=args.max_epochs,
            patience=args.patience,
            stop_by=args.stop_by,
        )
        config = StudyConfig(args.text, args.num_train, args.num_dev, recipe)
        runs = run_study(
            [LanguageSpec.parse(name) for name in args.language or LANGUAGES],
            args.objectives.split(","),
            _parse_seeds(args.seeds),
            config,
            args.output / "runs.jsonl",
            costs=args.costs.split(","),
            resume=args.resume,
            jobs=args.jobs,
        )
        print(write_report(runs, config, args.output))
    except (ValueError, OSError) as error:
        raise SystemExit(f"oracle: {error}") from error


def _parse_seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds: expected numbers, got {text!r}") from error


if __name__ == "__main__":
    main()
