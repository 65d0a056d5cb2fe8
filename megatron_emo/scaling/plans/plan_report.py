"""A plan for readers and for programs: an aligned table, a CSV and one JSON file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from megatron_emo.evaluation.records import provenance
from megatron_emo.scaling.counts.devices import GIB, Device
from megatron_emo.scaling.plans.plan import Plan, Problem, Run
from megatron_emo.scaling.plans.plan_checks import USABLE_MEMORY
from megatron_emo.scaling.plans.run_arguments import megatron_arguments
from megatron_emo.whole_files import write_csv

SCHEMA = "megatron_emo.scaling_plan/1"


def describe_run(run: Run, plan: Plan, device: Device) -> dict:
    """Return a run's numbers by name: parameters, tokens, FLOPs, hours, GiB."""
    rates = plan.spec.rates
    gpu_hours = run.gpu_hours(device, rates.precision, rates.mfu)
    six, six_non_embedding = map(run.approximate_flops, ("6nd", "6nd_non_embedding"))
    return {
        "run": run.name,
        "objective": run.objective.label,
        "seed": run.seed,
        "size": run.size,
        "budget": run.budget,
        "tokens_per_param_asked": run.tokens_per_param,
        "layers": run.shape.num_layers,
        "hidden": run.shape.hidden_size,
        "heads": run.shape.num_attention_heads,
        "ffn": run.shape.ffn_hidden_size,
        "params": run.params.total,
        "params_active": run.params.active,
        "params_non_embedding": run.params.active_non_embedding,
        "batch": run.batch,
        "micro_batch": run.micro_batch,
        "steps": run.steps,
        "tokens": run.tokens,
        "tokens_per_param": run.tokens / run.params.active,
        "learning_rate": run.optimizer.learning_rate,
        "flops": run.flops,
        "flops_6nd": six,
        "flops_6nd_non_embedding": six_non_embedding,
        "flops_over_6nd": run.flops / six,
        "flops_emo": run.loss_flops.cost_products,
        "flops_repeated_logits": run.loss_flops.repeated_logits,
        "flops_all": run.all_flops,
        "emo_share": run.emo_share,
        "repeated_share": run.loss_flops.repeated_logits / run.flops,
        "loss_path": run.loss_path,
        "gpu_hours": gpu_hours,
        "hours": gpu_hours / plan.spec.layout.gpus,
        "memory_gib": run.memory.total / GIB,
    }


def total_by_goal(rows: Sequence[Mapping]) -> list[dict]:
    """Return sums over runs of each budget (or tokens per parameter) and objective, and of all."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        key = (row["budget"], row["tokens_per_param_asked"], row["objective"])
        groups.setdefault(key, []).append(row)
    groups[None, None, "all"] = list(rows)
    return [
        {
            "budget": budget,
            "tokens_per_param": ratio,
            "objective": objective,
            "runs": len(members),
            "tokens": sum(r["tokens"] for r in members),
            "flops": sum(r["flops_all"] for r in members),
            "gpu_hours": sum(r["gpu_hours"] for r in members),
            "longest_hours": max(r["hours"] for r in members),
        }
        for (budget, ratio, objective), members in groups.items()
    ]


def list_assumptions(plan: Plan, device: Device) -> list[str]:
    """Return what the numbers rest on."""
    rates, loss = plan.spec.rates, plan.spec.loss
    peak = device.peak_flops(rates.precision)
    return [
        f"hours: {device.name}, {rates.precision} peak {peak / 1e12:,.4g} TFLOP/s "
        f"({device.source}), MFU {rates.mfu:.0%} assumed, {plan.spec.layout.gpus} GPUs a run; no "
        "evaluation, checkpoints or restarts",
        "FLOPs: Megatron's count (causal attention, logits); beside it what the loss adds, as "
        "shares: EMO's cost products, and logits formed again on the path recompute",
        f"EMO's share: {loss.distinct_share:g} distinct targets a token assumed, "
        f"cost embedding of {loss.cost_dim or 'hidden size'} columns",
        f"memory: Megatron's theoretical formulas and the loss's own part; refused above "
        f"{USABLE_MEMORY:.0%} of {device.memory / GIB:.1f} GiB",
    ]


def make_result(plan: Plan, device: Device, warnings: Sequence[Problem]) -> dict:
    """Return what --json holds."""
    rows = [describe_run(run, plan, device) for run in plan.runs]
    for row, run in zip(rows, plan.runs, strict=True):
        row["config"] = run.config()
        row["arguments"] = megatron_arguments(run)
    return {
        "schema": SCHEMA,
        "name": plan.spec.name,
        "equal": plan.spec.equal,
        "flops_counted": plan.spec.flops,
        "device": device.name,
        "assumptions": list_assumptions(plan, device),
        "warnings": [vars(problem) for problem in warnings],
        "totals": total_by_goal(rows),
        "runs": rows,
        "provenance": dict(provenance()),
    }


def write_table(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """Write a row for each run, whole or not at all; `fit` and `compare` read it with a loss."""
    write_csv(path, [name for name in rows[0] if name not in ("config", "arguments")], rows)


_COLUMNS = (
    ("objective", "objective", "{}"),
    ("size", "size", "{}"),
    ("budget", "budget", "{:.2e}"),
    ("N", "params", "{:.3e}"),
    ("N non-emb", "params_non_embedding", "{:.3e}"),
    ("layers", "layers", "{}"),
    ("heads", "heads", "{}"),
    ("batch", "batch", "{}"),
    ("steps", "steps", "{}"),
    ("tokens", "tokens", "{:.3e}"),
    ("D/N", "tokens_per_param", "{:.1f}"),
    ("lr", "learning_rate", "{:.2e}"),
    ("FLOPs", "flops", "{:.3e}"),
    ("/6ND", "flops_over_6nd", "{:.3f}"),
    ("6ND", "flops_6nd", "{:.3e}"),
    ("EMO", "emo_share", "{:.2%}"),
    ("again", "repeated_share", "{:.2%}"),
    ("GPU-h", "gpu_hours", "{:.3g}"),
    ("GiB", "memory_gib", "{:.1f}"),
    ("run", "run", "{}"),
)
_TOTALS = (
    ("budget", "budget", "{:.2e}"),
    ("D/N", "tokens_per_param", "{:g}"),
    ("objective", "objective", "{}"),
    ("runs", "runs", "{}"),
    ("tokens", "tokens", "{:.3e}"),
    ("FLOPs", "flops", "{:.3e}"),
    ("GPU-h", "gpu_hours", "{:.3g}"),
    ("longest h", "longest_hours", "{:.3g}"),
)


def format_result(result: Mapping) -> list[str]:
    """Return lines for a reader: a row a run, totals, assumptions, warnings."""
    lines = [*align(_COLUMNS, result["runs"]), "", *align(_TOTALS, result["totals"]), ""]
    lines += [f"assumed    {text}" for text in result["assumptions"]]
    return lines + [f"WARNING    {p['name']}: {p['message']}" for p in result["warnings"]]


def align(columns: Sequence[tuple[str, str, str]], rows: Sequence[Mapping]) -> list[str]:
    """Return a head and a line for each row; numbers to the right, None as a dash."""
    cells = [[head for head, _, _ in columns]]
    for row in rows:
        cells.append(
            ["-" if row[key] is None else form.format(row[key]) for _, key, form in columns]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [all(isinstance(row[key], str) for row in rows) for _, key, _ in columns]
    return [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
