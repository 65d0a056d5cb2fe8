"""Train the runs of a plan, each in a folder of its own, so that they can be stopped and taken up.

python tools/scaling_study.py run --plan plan.yaml --output runs/study --jobs 2
python tools/scaling_study.py run --plan plan.yaml --output runs/study --resume
python tools/scaling_study.py run --status --output runs/study

OUTPUT/runs/NAME has a run's config.json, run.sh (here), job.sbatch (Slurm), state.json, run.log,
checkpoints and, once it is done, result.json; OUTPUT/array.sbatch is a Slurm array over all runs. A
run is done when its result.json is there, of its configuration, steps and tokens. `--resume` goes
on after Ctrl-C, SIGTERM, a kill or a crash: done runs stay, others go on from their last
checkpoint. Exit codes: 0 all done; 75 runs were stopped by a signal and go on with --resume; 1
otherwise.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_emo.scaling.counts.devices import find_device
from megatron_emo.scaling.plans.plan import Plan, make_plan
from megatron_emo.scaling.plans.plan_checks import check_plan
from megatron_emo.scaling.plans.plan_file import PlanError, read_plan_file
from megatron_emo.scaling.plans.plan_report import align
from megatron_emo.scaling.plans.study_settings import LaunchSettings
from megatron_emo.scaling.running.run_processes import StudyRunner
from megatron_emo.scaling.running.run_states import Standing, is_begun, observe
from megatron_emo.scaling.running.study_files import run_folder
from megatron_emo.scaling.running.study_folder import (
    join_manifests,
    make_manifest,
    read_manifest,
    write_study,
)
from megatron_emo.study.tasks import TaskError

_ALWAYS_CHECKED = "h100"
"""A device for the checks of a plan that need none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--plan", type=Path, metavar="FILE", help="YAML with a section data:; not for --status")
    add("--output", type=Path, required=True, metavar="DIR", help="the study's folder")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    add(
        "--shard",
        type=_parse_shard,
        default=(0, 1),
        metavar="i/n",
        help="the runs i, i + n, i + 2n, ... of the manifest, i from 0 on (default: 0/1, all)",
    )
    add("--resume", action="store_true", help="go on in a folder in which training was begun")
    add(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="further starts of a run that failed, from its last checkpoint; none after exit code "
        "65 (not finite) or 78 (flags, files), which would come again (default: %(default)s)",
    )
    add("--keep-going", action="store_true", help="after a run that failed, train the others")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="runs of these names, which may have * and ? (default: all)",
    )
    add("--dry-run", action="store_true", help="list what would be trained; write nothing")
    add("--write-only", action="store_true", help="write the folder and its scripts; train nothing")
    add("--status", action="store_true", help="list the runs of --output as they stand")


def run(args: argparse.Namespace) -> list[Standing]:
    """Train, or list, as the flags say, and return how the runs stand.

    Raises:
        ValueError: flags out of range, a plan that is refused or another study's, a folder with
            runs without --resume, another runner at work.
        SystemExit: with words where a run failed; 75 where runs were stopped; 128 + n where signal
            n stopped this process.
    """
    if args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
    if args.retries < 0:
        raise ValueError(f"--retries: expected at least 0, got {args.retries}")
    if args.status:
        return _show(args.output, _select(_need_manifest(args.output)["runs"], args))
    if args.plan is None:
        raise ValueError("--plan: expected a file, got none; only --status goes without")
    plan = _read_plan(args.plan)
    launch = plan.spec.launch.resolved(plan.spec.layout)
    if args.dry_run:
        manifest = make_manifest(plan, args.plan)
        manifest = join_manifests(read_manifest(args.output), manifest, args.output)
        return _show(args.output, _select(manifest["runs"], args))
    _check_jobs(args.jobs, launch)
    begun = [] if args.resume else _find_begun(args)
    if begun and not args.write_only:
        raise ValueError(
            f"--output {args.output}: training was begun here ({begun[0]}"
            f"{f' and {len(begun) - 1} more' if len(begun) > 1 else ''}); --resume goes on with it"
        )
    manifest = write_study(plan, args.plan, args.output)
    entries = _select(manifest["runs"], args)
    if args.write_only:
        print(f"{len(entries)} runs written to {args.output}")
        return []
    if launch.nodes > 1:
        raise ValueError(
            f"launch.nodes {launch.nodes}: expected 1 here; submit {args.output}/array.sbatch, or "
            "a run's job.sbatch, to Slurm"
        )
    return _train(args, entries, launch)


def _train(
    args: argparse.Namespace, entries: Sequence[Mapping[str, Any]], launch: LaunchSettings
) -> list[Standing]:
    runner = StudyRunner(
        args.output, entries, launch, args.jobs, args.keep_going, args.retries, args.shard
    )
    try:
        runner.run()
    except TaskError as error:
        raise SystemExit(f"scaling_study run: {error}") from error
    return [observe(args.output, entry) for entry in entries]


def _read_plan(path: Path) -> Plan:
    plan = make_plan(read_plan_file(path))
    refusals, _ = check_plan(plan, find_device(_ALWAYS_CHECKED))
    # Of the device that trains, nobody told; it will say itself when it is out of memory.
    refusals = [problem for problem in refusals if problem.name != "memory"]
    if refusals:
        first = refusals[0]
        raise PlanError(
            f"--plan {path}: {len(refusals)} reasons against it, the first: {first.name}: "
            f"{first.message}; `plan` lists all"
        )
    return plan


def _check_jobs(jobs: int, launch: LaunchSettings) -> None:
    gpus = launch.gpus_per_node
    if gpus and jobs * launch.ranks_per_node > gpus:
        raise ValueError(
            f"--jobs {jobs}: expected at most launch.gpus_per_node {gpus} over ranks_per_node "
            f"{launch.ranks_per_node}, so that no two runs share a GPU"
        )


def _find_begun(args: argparse.Namespace) -> list[str]:
    """Return the runs of this shard that training was begun of."""
    manifest = read_manifest(args.output)
    entries = [] if manifest is None else _take_shard(manifest["runs"], args.shard)
    names = [entry["name"] for entry in entries]
    return [name for name in names if is_begun(run_folder(args.output, name))]


def _need_manifest(output: Path) -> dict[str, Any]:
    manifest = read_manifest(output)
    if manifest is None:
        raise ValueError(f"--output {output}: expected the folder of a study, found no manifest")
    return manifest


def _take_shard(entries: Sequence[Mapping[str, Any]], shard: tuple[int, int]) -> list:
    return [entry for entry in entries if entry["index"] % shard[1] == shard[0]]


def _select(entries: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> list:
    """Return the entries of the shard that --only names.

    Raises:
        ValueError: a name that no run of the study has.
    """
    names = [entry["name"] for entry in entries]
    for pattern in args.only:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"--only {pattern}: expected a run's name, found none such in the plan"
            )
    chosen = {name for pattern in args.only or ["*"] for name in fnmatch.filter(names, pattern)}
    return [entry for entry in _take_shard(entries, args.shard) if entry["name"] in chosen]


_COLUMNS = (
    ("run", "name", "{}"),
    ("state", "state", "{}"),
    ("steps", "steps", "{}"),
    ("of", "planned_steps", "{}"),
    ("starts", "attempts", "{}"),
    ("seconds", "seconds", "{:.1f}"),
    ("", "note", "{}"),
)


def _show(output: Path, entries: Sequence[Mapping[str, Any]]) -> list[Standing]:
    standing = [observe(output, entry) for entry in entries]
    print("\n".join(align(_COLUMNS, [vars(one) for one in standing])))
    counts = {state: sum(one.state == state for one in standing) for state in _in_order(standing)}
    print(", ".join(f"{count} {state}" for state, count in counts.items()) or "no runs")
    return standing


def _in_order(standing: Sequence[Standing]) -> list[str]:
    return list(dict.fromkeys(one.state for one in standing))


def _parse_shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"expected i/n with i from 0 to n - 1, got {text!r}")
    return index, count
