"""List the runs of a scaling study before anything starts.

python tools/scaling_study.py plan --plan examples/scaling/plan_isoflop.yaml --device h100

Each run with its parameters, tokens, exact FLOPs (Megatron's count), 6 N D, EMO's own share,
GPU-hours and GiB per GPU, and the sums by budget. A plan that cannot be run, or that no fit would
take, is refused with all its reasons; `allow:` in the file turns a judgement into a warning. Hours
rest on an assumed MFU, memory on Megatron's theoretical formulas: both are estimates.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace

from megatron_emo.scaling.counts.devices import DEVICES, Device, find_device
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.plans.plan import Plan, make_plan
from megatron_emo.scaling.plans.plan_checks import JUDGEMENTS, check_plan
from megatron_emo.scaling.plans.plan_file import (
    Expectation,
    PlanError,
    PlanSpec,
    Rates,
    read_plan_file,
)
from megatron_emo.scaling.plans.plan_report import format_result, make_result, write_table
from megatron_emo.whole_files import write_json

MAX_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--plan", required=True, metavar="FILE", help="YAML, as examples/scaling/plan_*.yaml")
    add(
        "--device",
        default="h100",
        choices=DEVICES,
        help="whose peak and memory estimates rest on (default: %(default)s)",
    )
    add(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="peak of a device that is not listed, as a CPU; memory remains that of --device",
    )
    add("--mfu", type=float, help=f"assumed share of peak (default: the plan's, else {Rates.mfu})")
    add(
        "--gpus", type=int, metavar="N", help="GPUs a run (default: the plan's layout.gpus, else 1)"
    )
    add("--law", metavar="FILE", help="JSON of `fit`: where optima are expected")
    add(
        "--allow",
        action="append",
        default=[],
        choices=JUDGEMENTS,
        help="warn instead of refusing; can be repeated. "
        + "; ".join(f"{name}: {meaning}" for name, meaning in JUDGEMENTS.items()),
    )
    add("--json", metavar="OUT", help="write runs with their settings and Megatron's flags here")
    add("--csv", metavar="OUT", help="write a row for each run here")


def run(args: argparse.Namespace) -> dict:
    """Print the plan, write --json and --csv, and return what --json holds.

    Raises:
        ValueError: a plan that cannot be read or is refused, flags out of range.
        FileNotFoundError: no such file.
    """
    device = _find_device(args)
    spec = _apply_flags(read_plan_file(args.plan), args)
    plan = make_plan(spec)
    refusals, warnings = check_plan(plan, device)
    if refusals:
        raise PlanError(_format_refusals(args.plan, plan, refusals))
    device.peak_flops(spec.rates.precision)
    result = make_result(plan, device, warnings)
    if args.json:
        write_json(args.json, result)
    if args.csv:
        write_table(args.csv, result["runs"])
    print("\n".join(format_result(result)))
    return result


def _find_device(args: argparse.Namespace) -> Device:
    device = find_device(args.device)
    if args.peak_tflops is None:
        return device
    if not args.peak_tflops > 0:
        raise PlanError(f"--peak-tflops: expected above 0, got {args.peak_tflops}")
    peak = args.peak_tflops * 1e12
    return replace(
        device, name="given peak", bf16_flops=peak, fp8_flops=peak, source="--peak-tflops"
    )


def _apply_flags(spec: PlanSpec, args: argparse.Namespace) -> PlanSpec:
    if args.mfu is not None:
        if not 0 < args.mfu <= 1:
            raise PlanError(f"--mfu: expected above 0, to 1, got {args.mfu}")
        spec = replace(spec, rates=replace(spec.rates, mfu=args.mfu))
    if args.gpus is not None:
        spec = replace(spec, layout=replace(spec.layout, gpus=args.gpus))
    if args.law:
        law = read_law(args.law)
        spec = replace(spec, expect=Expectation(law, spec.expect.range))
    return replace(spec, allow=(*spec.allow, *args.allow))


def read_law(path: str) -> Surface:
    """Return the surface of a JSON file that `fit` wrote.

    Raises:
        ValueError: another file, or a fit whose surface has no optimum.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        values = [float(content[f.name]) for f in fields(Surface)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"--law {path}: expected a JSON file of `fit`: {error!r}") from error
    law = Surface(*values)
    if not min(law.A, law.B, law.alpha, law.beta) > 0:
        raise PlanError(f"--law {path}: expected A, B, alpha, beta above 0, got {law}")
    return law


def _format_refusals(path: str, plan: Plan, refusals: list) -> str:
    lines = [f"--plan {path}: {len(refusals)} reasons against it, {len(plan.runs)} runs possible"]
    lines += [f"  {problem.name}: {problem.message}" for problem in refusals[:MAX_SHOWN]]
    if len(refusals) > MAX_SHOWN:
        lines.append(f"  and {len(refusals) - MAX_SHOWN} more")
    allowed = sorted({problem.name for problem in refusals} & set(JUDGEMENTS))
    if allowed:
        lines.append(
            f"  `allow: [{', '.join(allowed)}]` in the plan would warn instead of refusing"
        )
    return "\n".join(lines)
