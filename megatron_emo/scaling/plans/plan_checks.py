"""What speaks against a plan before anything starts: what the fit would refuse, and the hardware.

Whether curves would do is asked of the fit itself, on the losses that the expected law gives to the
plan's runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_emo.scaling.counts.devices import GIB, Device
from megatron_emo.scaling.laws.fit import FitSettings, check_table
from megatron_emo.scaling.laws.isoflop import find_isoflop_optima
from megatron_emo.scaling.laws.table import RunTable, make_run_table
from megatron_emo.scaling.plans.plan import Plan, Problem, Run
from megatron_emo.scaling.plans.plan_file import PlanError, PlanSpec

USABLE_MEMORY = 0.9
"""Of a device: the rest is NCCL's, the allocator's and what no formula has."""
MIN_STEPS = 100
JUDGEMENTS = {
    "too-few-points": "fewer budgets or sizes than a fit takes",
    "one-line": "sizes and tokens that do not vary apart",
    "edge-optimum": "a budget whose expected optimum is not between two sizes",
    "isoflop-range": "a size further from the expected optimum than expect.range",
    "memory": "more than a device has",
    "few-steps": f"fewer than {MIN_STEPS} steps",
    "learning-rate": "above recipe.lr_max",
}
"""Refusals that `allow` turns into warnings."""


def check_plan(plan: Plan, device: Device) -> tuple[list[Problem], list[Problem]]:
    """Return (refusals, warnings) of a plan on a device.

    Raises:
        PlanError: `allow` names what cannot be allowed.
    """
    for name in plan.spec.allow:
        if name not in JUDGEMENTS:
            raise PlanError(f"allow: expected some of {', '.join(JUDGEMENTS)}, got {name!r}")
    found = list(plan.problems)
    if plan.runs:
        found += _all_problems(plan, device)
    refusals = [p for p in found if p.name not in plan.spec.allow]
    return refusals, [p for p in found if p.name in plan.spec.allow]


def _all_problems(plan: Plan, device: Device) -> Iterator[Problem]:
    yield from _find_duplicates(plan.runs)
    yield from _find_balance(plan)
    first = [run for run in plan.runs if run.seed == plan.spec.seeds[0]]
    for run in first:
        yield from _find_run_problems(run, device)
    for objective in plan.spec.objectives:
        runs = [run for run in first if run.objective == objective]
        if runs:
            yield from _find_curve_problems(plan.spec, objective.label, runs)
    if plan.spec.budgets:
        yield from _find_far_sizes(plan.spec, first)


def _find_duplicates(runs: Sequence[Run]) -> Iterator[Problem]:
    for config, count in Counter(run.hash for run in runs).items():
        if count > 1:
            names = ", ".join(run.name for run in runs if run.hash == config)
            yield Problem("duplicate", f"{count} runs are the same training: {names}")


def _find_balance(plan: Plan) -> Iterator[Problem]:
    """Every objective has the cells of the others: what one lacks cannot be compared."""
    cells = {
        objective.label: {
            (run.budget, run.tokens_per_param, run.size)
            for run in plan.runs
            if run.objective == objective
        }
        for objective in plan.spec.objectives
    }
    most = set().union(*cells.values())
    for label, there in cells.items():
        if missing := len(most - there):
            yield Problem("unbalanced", f"{label}: {missing} of {len(most)} cells have no run")


def _find_run_problems(run: Run, device: Device) -> Iterator[Problem]:
    if run.steps < MIN_STEPS:
        yield Problem("few-steps", f"{run.name}: {run.steps} steps, expected {MIN_STEPS} or more")
    usable = USABLE_MEMORY * device.memory
    if run.memory.total > usable:
        yield Problem(
            "memory",
            f"{run.name}: {run.memory.total / GIB:.1f} GiB a GPU, expected at most "
            f"{usable / GIB:.1f} ({USABLE_MEMORY:.0%} of {device.name})",
        )


def _find_curve_problems(spec: PlanSpec, label: str, runs: Sequence[Run]) -> Iterator[Problem]:
    table = _expected_table(spec, runs)
    for approach in ("2", "3") if spec.budgets else ("3",):
        try:
            check_table(table, FitSettings(approach=approach))
        except ValueError as error:
            name = "one-line" if "vary apart" in str(error) else "too-few-points"
            yield Problem(name, f"{label}: as fit {error}")
            break
    if not spec.budgets:
        return
    for refused in find_isoflop_optima(table)[1]:
        yield Problem("edge-optimum", f"{label}: {refused.name}: {refused.reason}")


def _expected_table(spec: PlanSpec, runs: Sequence[Run]) -> RunTable:
    """The table that these runs would give if the expected law held without noise."""
    params = np.array([run.params.active for run in runs], float)
    tokens = np.array([run.tokens for run in runs], float)
    flops = np.array([run.flops for run in runs], float)
    budgets = None
    if spec.budgets:
        budgets = np.array([run.budget for run in runs], float)
    return make_run_table(
        params, spec.expect.law.loss(params, tokens), tokens, flops, budgets=budgets
    )


def _find_far_sizes(spec: PlanSpec, runs: Sequence[Run]) -> Iterator[Problem]:
    said = set()
    for run in runs:
        optimum = float(spec.expect.law.optimum(run.flops)[0])
        ratio = run.params.active / optimum
        cell = (run.budget, run.size)
        if max(ratio, 1 / ratio) > spec.expect.range and cell not in said:
            said.add(cell)
            yield Problem(
                "isoflop-range",
                f"budget {run.budget:.3g}, size {run.size}: N {run.params.active:.3g} is "
                f"{ratio:.2g} of the expected optimum {optimum:.3g}, expected within a factor of "
                f"{spec.expect.range:g}",
            )
