"""What a fit leaves behind: one JSON file, and lines for a reader."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_emo.evaluation.records import hash_file, provenance
from megatron_emo.scaling.laws.bootstrap import Bootstrap
from megatron_emo.scaling.laws.fit import PARAMETERS, Fit, describe_doubts
from megatron_emo.scaling.laws.table import RunTable

SCHEMA = "megatron_emo.scaling_fit/1"
_FLAT = "A and B are flat directions: compare E, alpha, beta and the objective"
_NOTES = {
    "1": ("E, A, B, alpha, beta: of the surface with the frontier found",),
    "2": (
        "E, A, B, alpha, beta: of the surface with the frontier found",
        "N* is biased where alpha differs from beta or sizes are not centred on the optimum",
    ),
    "3": (_FLAT,),
    "vpnls": (_FLAT,),
}


def make_result(
    args: argparse.Namespace,
    table: RunTable,
    fit: Fit,
    bootstrap: Bootstrap | None,
    held_out: dict,
) -> dict:
    """Return what --json holds: plain values, null for what the approach does not say.

    Args:
        args: the flags of `fit_command`, of which it reads approach, level, csv, columns, where,
            bootstrap and seed.
        held_out: as `leave_out_largest`.
    """
    intervals = bootstrap.intervals(args.level) if bootstrap else {}
    result = {
        "schema": SCHEMA,
        "approach": args.approach,
        **fit.parameters,
        "objective": fit.objective,
        "objective_name": fit.loss_name,
        "n": len(table),
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "converged": fit.converged,
        "at_bound": fit.at_bound,
        "notes": table.notes + _NOTES.get(args.approach, ()),
        "num_budgets": len(np.unique(table.budgets)),
        "num_curves": len(np.unique(table.curves)),
        "dropped": [asdict(point) for point in table.dropped],
        "refused": [asdict(refused) for refused in fit.refused],
        "leave_largest_out": held_out,
        "details": fit.details,
        "frontier": _frontier_json(fit),
        "residual_unit": fit.residual_unit,
        **_residuals_json(table, fit),
        "bootstrap": None,
        "csv": {Path(args.csv).name: hash_file(args.csv)},
        "columns": args.columns,
        "where": args.where,
        "provenance": dict(provenance()),
    }
    if bootstrap:
        result["bootstrap"] = {
            "draws": args.bootstrap,
            "seed": args.seed,
            "unit": bootstrap.unit,
            "failures": bootstrap.failures,
            "values": {name: values.tolist() for name, values in bootstrap.draws.items()},
        }
    return _without_nan(result)


def _frontier_json(fit: Fit) -> dict | None:
    if fit.frontier is None:
        return None
    found = fit.frontier
    numbers = {name: getattr(found, name) for name in ("log_n0", "log_d0", "gamma")}
    optima = {name: values.tolist() for name, values in asdict(fit.optima).items()}
    return {**numbers, "optima": optima, "residuals": found.residuals.tolist()}


def _residuals_json(table: RunTable, fit: Fit) -> dict:
    """Points with their residuals; those of approach 1 belong to its grid, in `frontier`."""
    names = ("lines", "params", "tokens", "flops", "loss")
    points = {name: getattr(table, name).tolist() for name in names}
    if len(fit.residuals) == len(table):
        points["residuals"] = fit.residuals.tolist()
    return {"points": points}


def _without_nan(value):
    """JSON has no NaN: what an approach does not say is null."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_result(result: dict) -> list[str]:
    """Return lines for a reader: parameters with intervals, then what speaks for and against."""
    lines = []
    for name in PARAMETERS:
        if result[name] is None:
            continue
        interval = result["intervals"].get(name)
        spread = f"  [{interval['low']:.5g}, {interval['high']:.5g}]" if interval else ""
        lines.append(f"{name:<10} {result[name]:.6g}{spread}")
    lines.append(f"{'objective':<10} {result['objective']:.6g}  ({result['objective_name']})")
    lines.append(
        f"{'points':<10} {result['n']} in {result['num_budgets']} budgets, "
        f"{result['num_curves']} curves, {len(result['dropped'])} dropped"
    )
    lines += [f"dropped    line {point['line']}: {point['reason']}" for point in result["dropped"]]
    lines += [
        f"refused    {r['name']} ({r['num_points']} points): {r['reason']}"
        for r in result["refused"]
    ]
    held = result["leave_largest_out"]
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in held.items()
    )
    lines.append(f"held out   {shown}")
    lines += [f"note       {note}" for note in result["notes"]]
    doubts = describe_doubts(result["converged"], result["at_bound"])
    lines += [f"WARNING    {doubt}" for doubt in doubts]
    if result["bootstrap"] and result["bootstrap"]["failures"]:
        lines.append(f"WARNING    resamples without a fit: {result['bootstrap']['failures']}")
    return lines
