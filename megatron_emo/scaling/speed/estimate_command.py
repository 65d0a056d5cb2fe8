"""Expect the step time of layouts by a cost model, and rank them.

python tools/scaling_study.py estimate --plan examples/scaling/throughput_8b.yaml \\
    --device h100 --gpus 1024

Products by roofline, collectives by latency and bandwidth, the pipeline's bubble, EMO's own terms
and memory, for every layout of the model on so many GPUs; those that do not fit are dropped by
name. Prints the fastest with their terms, and all that is assumed. --against puts the model beside
a throughput study; --measure takes rates from this machine instead of a datasheet.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_emo.foreign_files import read_json_object
from megatron_emo.scaling.counts.devices import DEVICES
from megatron_emo.scaling.counts.memory import MOST_GPUS
from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.speed.cluster import Cluster, cluster_of
from megatron_emo.scaling.speed.cluster_measure import cluster_from_entry, measure_machine
from megatron_emo.scaling.speed.estimate import find_layouts, rank_layouts
from megatron_emo.scaling.speed.estimate_against import compare_measured, summarise_comparison
from megatron_emo.scaling.speed.estimate_report import describe_ranking, format_result, make_result
from megatron_emo.scaling.speed.throughput_command import read_result
from megatron_emo.scaling.speed.throughput_file import StudySpec, read_study_file
from megatron_emo.whole_files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--plan", required=True, metavar="FILE", help="YAML, as examples/scaling/throughput_*.yaml")
    add(
        "--device",
        default="h100",
        metavar="NAME|FILE",
        help=f"{', '.join(DEVICES)}, or a JSON that --save-device wrote (default: %(default)s)",
    )
    add("--gpus", type=int, metavar="N", help="GPUs (default: all of the plan's `launch`)")
    add("--nodes", type=int, metavar="N", help="nodes, instead of --gpus")
    add("--top", type=int, default=20, help="layouts that are shown (default: %(default)s)")
    add(
        "--against",
        metavar="DIR|JSON",
        help="a throughput study: its layouts beside their estimates, instead of a ranking",
    )
    add(
        "--measure",
        action="store_true",
        help="time this machine's products, passes and collectives of two ranks for the device, "
        "about half a minute; --device is not looked at",
    )
    add("--save-device", metavar="OUT", help="write what --measure found here, for --device")
    add("--json", metavar="OUT", help="write layouts, terms and assumptions here")


def run(args: argparse.Namespace) -> dict:
    """Print and write estimates, and return what --json holds.

    Raises:
        ValueError: a file that is refused, no layout, flags out of range.
        FileNotFoundError: no such file.
    """
    spec = read_study_file(args.plan)
    if args.top < 1:
        raise PlanError(f"--top: expected at least 1, got {args.top}")
    if args.save_device and not args.measure:
        raise PlanError("--save-device: expected --measure with it")
    measured = read_result(args.against, "--against") if args.against else None
    cluster, peak = _find_cluster(args, spec)
    against, rankings = [], []
    if measured:
        against = compare_measured(spec, measured["rows"], cluster)
    else:
        rankings = _rank_all(args, spec, cluster, peak)
    summary = summarise_comparison(against)
    result = make_result(spec, cluster, rankings, against, summary)
    if args.json:
        write_json(args.json, result)
    print("\n".join(format_result(result)))
    return result


def _find_cluster(args: argparse.Namespace, spec: StudySpec) -> tuple[Cluster, float | None]:
    """Return the machine, and the peak that MFU is taken of, None where none is known."""
    if args.measure:
        entry = measure_machine(spec.launch.threads, spec.launch.node_ranks, print)
        if args.save_device:
            write_json(args.save_device, entry)
        return cluster_from_entry(entry), None
    if args.device in DEVICES:
        precision = "bf16" if spec.precision == "fp32" else spec.precision
        device = DEVICES[args.device]
        if spec.launch.gpus_per_node:
            device = replace(device, gpus_per_node=spec.launch.gpus_per_node)
        return cluster_of(device, precision, spec.assume), device.peak_flops(precision)
    if not Path(args.device).is_file():
        raise PlanError(
            f"--device: expected one of {', '.join(DEVICES)}, or a file of --save-device, got "
            f"{args.device!r}; --measure takes this machine"
        )
    try:
        return cluster_from_entry(read_json_object(args.device)), None
    except ValueError as error:
        raise PlanError(f"--device {args.device}: {error}") from error


def _rank_all(
    args: argparse.Namespace, spec: StudySpec, cluster: Cluster, peak: float | None
) -> list[dict]:
    gpus = _num_gpus(args, spec, cluster)
    rankings = []
    for size in spec.sizes:
        layouts = find_layouts(spec, size, gpus, cluster)
        for objective in spec.objectives:
            ranking = rank_layouts(spec, size, objective, cluster, layouts)
            rankings.append(
                {
                    "size": size,
                    "objective": objective.label,
                    "gpus": gpus,
                    **describe_ranking(ranking, args.top, peak),
                }
            )
    return rankings


def _num_gpus(args: argparse.Namespace, spec: StudySpec, cluster: Cluster) -> int:
    if args.gpus is not None and args.nodes is not None:
        raise PlanError(f"--nodes: expected --gpus or --nodes, got both, {args.gpus}, {args.nodes}")
    nodes = spec.launch.nodes if args.nodes is None else args.nodes
    gpus = nodes * cluster.ranks_per_node if args.gpus is None else args.gpus
    if not 1 <= gpus <= MOST_GPUS:
        flag = "--gpus" if args.nodes is None else "--nodes"
        raise PlanError(f"{flag}: expected 1 to {MOST_GPUS:,} GPUs, got {gpus}")
    return gpus
