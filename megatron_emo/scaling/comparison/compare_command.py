"""Compare training objectives on the runs of one study.

python tools/scaling_study.py compare --csv runs.csv --baseline mle --json compare.json \\
    --columns objective=objective,params=N,tokens=D,flops=flops_all,loss=loss,seed=seed

Runs of equal size, budget and seed are pairs. Differences are the other's loss minus the
baseline's, nats/token, at equal tokens, FLOPs and (with an hours column) GPU-hours; a speedup is
how many times the resource the baseline would need, on its own law, to reach the other's loss:
((L_base - F) / (L_other - F))^(1/beta) in tokens, F = E + A/N^alpha and beta of the baseline, for
both. FLOPs should include what the loss adds (flops_all of `plan --csv`). --joint tests whether one
law does for both objectives, or two laws with one E fit better than noise would have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_emo.evaluation.records import read_records
from megatron_emo.scaling.comparison.compare import CompareSettings, Comparison, compare_objectives
from megatron_emo.scaling.comparison.compare_report import (
    format_comparison,
    format_decisions,
    format_metrics,
    make_result,
)
from megatron_emo.scaling.comparison.decisions import decide
from megatron_emo.scaling.comparison.downstream import (
    MetricComparison,
    compare_metric,
    select_values,
)
from megatron_emo.scaling.comparison.joint_compare import (
    LawTest,
    check_pairs,
    compare_laws,
    describe_test,
    format_test,
)
from megatron_emo.scaling.comparison.pairs import (
    ROLES,
    Pairs,
    Runs,
    pair_runs,
    parse_roles,
    read_runs,
)
from megatron_emo.scaling.comparison.speedup import RESOURCES, pair_differences
from megatron_emo.scaling.plans.plan_command import read_law
from megatron_emo.whole_files import write_json

if TYPE_CHECKING:
    from megatron_emo.evaluation.models import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    default = CompareSettings()
    add("--csv", required=True, metavar="FILE", help="a row for each finished run")
    add(
        "--columns",
        required=True,
        metavar="ROLE=NAME,...",
        help="objective=, params=, tokens=, loss= and others. "
        + "; ".join(f"{role}: {meaning}" for role, meaning in ROLES.items()),
    )
    add("--baseline", default="mle", help="value of the objective column (default: %(default)s)")
    add("--others", metavar="A,B", help="objectives to compare with it (default: all others)")
    add("--law", metavar="FILE", help="the baseline's law, JSON of `fit` (default: fitted here)")
    add(
        "--approach",
        choices=("3", "vpnls"),
        default=default.approach,
        help="by which the baseline's law is fitted (default: %(default)s)",
    )
    add("--bootstrap", type=int, default=default.draws, metavar="N", help="(default: %(default)s)")
    add("--level", type=float, default=default.level, help="of intervals (default: %(default)s)")
    add("--seed", type=int, default=0, help="of resamples (default: 0)")
    add(
        "--at-flops",
        type=float,
        action="append",
        default=[],
        metavar="C",
        help="read the trend of speedups there; can be repeated (default: the largest C)",
    )
    add(
        "--decide-by",
        choices=RESOURCES,
        default="flops",
        help="what is equal where decisions are compared (default: %(default)s)",
    )
    add("--records", nargs="+", default=[], metavar="PATH", help="evaluation records of the runs")
    add("--metric", action="append", default=[], help="of the records; can be repeated")
    add(
        "--labels",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the records that count; can be repeated",
    )
    add(
        "--joint",
        type=int,
        default=0,
        metavar="N",
        help="draws of a test of one law for both objectives against two laws with one E, some 50 "
        "a second (default: 0, no test)",
    )
    add("--json", metavar="OUT", help="write everything, pair by pair too, here")


def run(args: argparse.Namespace) -> dict:
    """Compare, print, write --json and return what is written.

    Raises:
        ValueError: flags out of range, a table without pairs, runs without what is asked for.
        FileNotFoundError: no such file.
    """
    settings = CompareSettings(
        args.approach, args.bootstrap, args.level, args.seed, tuple(args.at_flops)
    )
    _check_flags(args)
    columns = parse_roles(args.columns)
    runs = read_runs(args.csv, columns)
    others = _choose_others(args, runs)
    law = read_law(args.law) if args.law else None
    base = runs[args.baseline]
    paired = {name: pair_runs(base, runs[name], name) for name in others}
    _check_pairs(args, paired)
    metrics = {name: _compare_metrics(args, pairs) for name, pairs in paired.items()}
    found = []
    for name, pairs in paired.items():
        progress = _progress(settings.draws, name)
        found.append(
            compare_objectives(pairs, base, runs[name], settings, law, progress=progress.add)
        )
    tests = _test_laws(args, paired)
    decisions, notes = _decide(args, found, columns)
    result = make_result(args, found, decisions, metrics, notes)
    result["joint"] = {name: describe_test(test) for name, test in tests.items()}
    if args.json:
        write_json(args.json, result)
    lines: list[str] = []
    for one in found:
        lines += [*format_comparison(one, args.baseline, args.level)]
        lines += format_metrics(metrics[one.name])
        if one.name in tests:
            lines += format_test(tests[one.name], args.baseline, one.name)
        lines.append("")
    if decisions:
        lines += format_decisions(*decisions)
    print("\n".join([*lines, *(f"note       {note}" for note in notes)]))
    return result


def _check_flags(args: argparse.Namespace) -> None:
    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    if args.joint < 0 or args.joint == 1:
        raise ValueError(f"--joint: expected 0 or at least 2 draws, got {args.joint}")
    for flops in args.at_flops:
        if not flops > 0:
            raise ValueError(f"--at-flops: expected above 0, got {flops}")
    if bool(args.records) != bool(args.metric):
        given, lacking = ("--records", "--metric") if args.records else ("--metric", "--records")
        raise ValueError(f"{lacking}: expected with {given}, got none")


def _check_pairs(args: argparse.Namespace, paired: dict[str, Pairs]) -> None:
    """Refuse before the bootstraps what the runs lack for what follows them."""
    for pairs in paired.values():
        has_hours = pairs.base.hours is not None and pairs.other.hours is not None
        if args.decide_by == "hours" and not has_hours:
            raise ValueError("--decide-by hours: expected an hours= column, got none")
        if args.joint:
            check_pairs(pairs)


def _choose_others(args: argparse.Namespace, runs: dict[str, Runs]) -> Sequence[str]:
    known = ", ".join(runs)
    if args.baseline not in runs:
        raise ValueError(f"--baseline: expected one of {known}, got {args.baseline!r}")
    others = args.others.split(",") if args.others else [n for n in runs if n != args.baseline]
    for name in others:
        if name not in runs or name == args.baseline:
            raise ValueError(
                f"--others: expected some of {known} beside the baseline: got {name!r}"
            )
    if not others:
        raise ValueError(f"--csv {args.csv}: expected two objectives, got {known}")
    return others


def _decide(
    args: argparse.Namespace, found: Sequence[Comparison], columns: dict[str, str]
) -> tuple[tuple | None, list[str]]:
    notes = []
    if "flops" not in columns:
        notes.append("no flops column: C = 6 N D, without what a loss adds")
    compared = [(one.pairs, pair_differences(one.pairs, one.law)) for one in found]
    chosen = [(pairs, by[args.decide_by]) for pairs, by in compared]
    try:
        return decide(chosen, args.level, args.bootstrap, args.seed), notes
    except ValueError as error:
        return None, [*notes, f"no {error}"]


def _compare_metrics(args: argparse.Namespace, pairs) -> list[MetricComparison]:
    if not args.records:
        return []
    labels = {}
    for text in args.labels:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--labels: expected NAME=VALUE, got {text!r}")
        labels[name] = value
    records = read_records(args.records)
    return [
        compare_metric(
            pairs,
            select_values(records, metric, labels),
            args.level,
            args.bootstrap,
            args.seed,
        )
        for metric in args.metric
    ]


def _test_laws(args: argparse.Namespace, paired: dict[str, Pairs]) -> dict[str, LawTest]:
    tests = {}
    for name, pairs in paired.items() if args.joint else ():
        progress = _progress(args.joint, f"joint laws of {name}")
        tests[name] = compare_laws(pairs, args.joint, args.level, args.seed, progress.add)
    return tests


def _progress(draws: int, name: str) -> Progress:
    from megatron_emo.evaluation.models import Progress

    return Progress(f"bootstrap of {name}", draws, "resamples")
