"""Fit a scaling law to a table of runs, with intervals.

python tools/scaling_study.py fit --csv runs.csv --columns params=N,tokens=D,loss=val_loss \\
    --approach 3 --bootstrap 500 --json law.json

Sizes are in parameters, losses in nats/token of the same held-out text for every run. A column
that is not given follows from C = 6 N D, and the output says so. Approaches 3 and vpnls fit the
surface E + A / N^alpha + B / D^beta; approaches 1 and 2 find the best size at each C, and E, A, B,
alpha, beta are then those of the surface with that frontier.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from megatron_emo.scaling.laws.bootstrap import LEVEL, UNITS, bootstrap_fit
from megatron_emo.scaling.laws.fit import (
    APPROACHES,
    MIN_BUDGETS,
    MIN_POINTS,
    FitSettings,
    check_table,
    fit_runs,
    leave_out_largest,
)
from megatron_emo.scaling.laws.fit_report import format_result, make_result
from megatron_emo.scaling.laws.huber import DELTA
from megatron_emo.scaling.laws.isoflop import VERTICES
from megatron_emo.scaling.laws.table import (
    BUDGET_TOLERANCE,
    ROLES,
    drop_highest,
    parse_columns,
    read_run_table,
)
from megatron_emo.whole_files import write_json

if TYPE_CHECKING:
    from megatron_emo.evaluation.models import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--csv", required=True, metavar="FILE", help="a row for each run or measured point")
    add(
        "--columns",
        required=True,
        metavar="ROLE=NAME,...",
        help="params=, loss= and flops= or tokens= or both; also curve=, budget=. "
        + "; ".join(f"{role}: {meaning}" for role, meaning in ROLES.items()),
    )
    add(
        "--where",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="read rows with this value alone, as objective=mle; can be repeated",
    )
    add(
        "--approach",
        required=True,
        choices=APPROACHES,
        help="; ".join(f"{name}: {what}" for name, what in APPROACHES.items()),
    )
    add("--vertex", choices=VERTICES, default="parabola", help="of approach 2 (default: parabola)")
    add(
        "--delta",
        type=float,
        default=DELTA,
        help="log-loss residual from which approach 3 penalises linearly (default: %(default)s)",
    )
    add(
        "--drop-highest",
        type=int,
        default=0,
        metavar="K",
        help="leave out the K points of highest loss (default: 0)",
    )
    add(
        "--drop-short-curves",
        action="store_true",
        help=f"leave out curves of fewer than {MIN_POINTS} points, instead of refusing the table; "
        f"fewer than {MIN_BUDGETS} budgets are always refused",
    )
    add(
        "--budget-tolerance",
        type=float,
        default=BUDGET_TOLERANCE,
        metavar="R",
        help="relative spread of FLOPs within one budget (default: %(default)s)",
    )
    add("--bootstrap", type=int, default=0, metavar="N", help="resamples (default: 0, none)")
    add(
        "--bootstrap-by",
        choices=UNITS,
        help="point: runs, within their budget or curve in approaches 1 and 2; curve: whole "
        "training curves, in approach 2 budgets (default: point, in approach 1 curve)",
    )
    add("--level", type=float, default=LEVEL, help="of intervals (default: %(default)s)")
    add("--seed", type=int, default=0, help="of resamples (default: 0)")
    add("--jobs", type=int, default=1, metavar="N", help="processes for resamples (default: 1)")
    add("--json", metavar="OUT", help="write parameters, intervals, residuals and draws here")


def run(args: argparse.Namespace) -> dict:
    """Fit, print, write --json and return what is written.

    Raises:
        ValueError: flags out of range, or a table that cannot be fitted.
        FileNotFoundError: no such CSV.
    """
    begun = time.monotonic()
    _check_flags(args)
    settings = FitSettings(args.approach, args.vertex, args.delta, args.drop_short_curves)
    where = dict(_parse_pair(pair) for pair in args.where)
    table = read_run_table(
        args.csv,
        parse_columns(args.columns),
        where=where,
        budget_tolerance=args.budget_tolerance,
    )
    table = check_table(drop_highest(table, args.drop_highest), settings)
    fit = fit_runs(table, settings)
    unit = args.bootstrap_by or ("curve" if args.approach == "1" else "point")
    bootstrap = None
    if args.bootstrap:
        bootstrap = bootstrap_fit(
            table,
            settings,
            fit,
            args.bootstrap,
            unit=unit,
            seed=args.seed,
            jobs=args.jobs,
            progress=_progress(args.bootstrap).add,
        )
    result = make_result(args, table, fit, bootstrap, leave_out_largest(table, settings))
    result["seconds"] = time.monotonic() - begun
    if args.json:
        write_json(args.json, result)
    print("\n".join(format_result(result)))
    return result


def _check_flags(args: argparse.Namespace) -> None:
    if args.bootstrap < 0:
        raise ValueError(f"--bootstrap: expected at least 0, got {args.bootstrap}")
    if args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    if not 0 < args.level < 1:
        raise ValueError(f"--level: expected between 0 and 1, got {args.level}")
    if not args.budget_tolerance >= 0:
        raise ValueError(f"--budget-tolerance: expected at least 0, got {args.budget_tolerance}")


def _parse_pair(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not (name and equals):
        raise ValueError(f"--where: expected NAME=VALUE, got {pair!r}")
    return name, value


def _progress(draws: int) -> Progress:
    from megatron_emo.evaluation.models import Progress

    return Progress("bootstrap", draws, "resamples")
