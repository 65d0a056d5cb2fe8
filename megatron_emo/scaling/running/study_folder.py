"""A study's folder: the plan, the manifest of its runs, and the scripts that start them.

The manifest says once which runs there are, in which order, on which data. Runs that a plan gains
later come behind those that are there, so that shards keep theirs; a plan that lost or changed a
run, or other data, is another study.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_emo.foreign_files import file_inside, read_json_object
from megatron_emo.scaling.plans.plan import Plan, Run
from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.running.run_scripts import (
    format_array,
    format_job,
    format_recipe,
    format_run,
    training_settings,
)
from megatron_emo.scaling.running.run_states import RunState, is_begun, write_state
from megatron_emo.scaling.running.study_data import describe_data, find_differences
from megatron_emo.scaling.running.study_files import run_folder, to_json, write_if_changed, writing

MANIFEST_FORMAT = 1
_SHOWN = 6


def make_manifest(plan: Plan, plan_path: Path) -> dict[str, Any]:
    """Return the manifest of a plan by itself.

    Raises:
        PlanError: no `data:`, or a file of it that is not there.
    """
    spec = plan.spec
    if spec.data is None:
        raise PlanError(f"--plan {plan_path}: data: missing: `run` trains on data.path")
    return {
        "format": MANIFEST_FORMAT,
        "name": spec.name,
        "plan": str(plan_path.resolve()),
        "plan_sha256": hashlib.sha256(plan_path.read_bytes()).hexdigest(),
        "data": describe_data(spec.data),
        "training": training_settings(spec),
        "runs": [{**describe_run(run), "index": i} for i, run in enumerate(plan.runs)],
    }


def describe_run(run: Run) -> dict[str, Any]:
    """Return a run's name, config and the plan's numbers."""
    return {
        "name": run.name,
        "hash": run.hash,
        "label": run.objective.label,
        "objective": run.objective.objective,
        "seed": run.seed,
        "size": run.size,
        "budget": run.budget,
        "tokens_per_param": run.tokens_per_param,
        "params": run.params.total,
        "params_active": run.params.active,
        "non_embedding": run.params.active_non_embedding,
        "tokens": run.tokens,
        "steps": run.steps,
        "flops": run.flops,
        "loss_flops": run.loss_flops.total,
        "flops_6nd": run.approximate_flops("6nd"),
        "config": run.config(),
    }


def write_study(plan: Plan, plan_path: Path, output: Path) -> dict[str, Any]:
    """Write plan, manifest and scripts into a study's folder, and return the manifest.

    Each file is written whole or not at all and only where it changes; the manifest comes last but
    for the array, so that every run it names has its scripts.

    Raises:
        PlanError: the folder is another study's; nothing is changed then.
    """
    manifest = make_manifest(plan, plan_path)
    with writing(output):
        manifest = join_manifests(read_manifest(output), manifest, output)
        runs = {run.name: run for run in plan.runs}
        for entry in manifest["runs"]:
            _write_run(plan, runs[entry["name"]], entry, run_folder(output, entry["name"]))
        write_if_changed(output / "plan.yaml", plan_path.read_text(encoding="utf-8"))
        write_if_changed(output / "manifest.json", to_json(manifest))
        names = [entry["name"] for entry in manifest["runs"]]
        array = format_array(plan.spec, names, plan_path.resolve(), output.resolve())
        write_if_changed(output / "array.sbatch", array, is_script=True)
    return manifest


def _write_run(plan: Plan, run: Run, entry: Mapping[str, Any], folder: Path) -> None:
    config = {key: value for key, value in entry.items() if key != "index"}
    write_if_changed(folder / "config.json", to_json(config))
    write_if_changed(folder / "recipe.sh", format_recipe(plan.spec, run))
    write_if_changed(folder / "run.sh", format_run(plan.spec, run), is_script=True)
    job = format_job(plan.spec, run, folder.resolve())
    write_if_changed(folder / "job.sbatch", job, is_script=True)
    if not (folder / "state.json").exists():
        write_state(folder, RunState())


def read_manifest(output: Path) -> dict[str, Any] | None:
    """Return a folder's manifest, None where there is none.

    Raises:
        PlanError: a manifest that cannot be read.
    """
    path = output / "manifest.json"
    if not path.exists():
        return None
    try:
        content = read_json_object(path)
        if content["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format: expected {MANIFEST_FORMAT}, found {content['format']!r:.60}")
        if not isinstance(content["data"], dict):
            raise ValueError("data: expected an object")
        for entry in content["runs"]:
            _check_entry(entry, path)
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path}: expected the manifest of a study: {error!r}") from error


def _check_entry(entry: Any, path: Path) -> None:
    file_inside(path.parent, entry["name"], path)
    kinds = {"hash": str, "tokens": int, "flops": int, "loss_flops": int, "config": dict}
    for name, kind in kinds.items():
        if not isinstance(entry[name], kind):
            raise ValueError(f"{entry['name']}, {name}: expected {kind.__name__}")
    if not isinstance(entry["config"]["steps"], int):
        raise ValueError(f"{entry['name']}, config.steps: expected int")


def join_manifests(
    old: Mapping[str, Any] | None, new: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Return the new manifest with the old one's runs first, in their order.

    A folder in which nothing was trained takes any plan.

    Raises:
        PlanError: the new plan lacks a run, or its data or settings train something else.
    """
    if old is None or not any(is_begun(run_folder(output, e["name"])) for e in old["runs"]):
        return new
    differences = find_differences(old["data"], new["data"])
    differences += _compare("training", old["training"], new["training"])
    entries = {entry["name"]: entry for entry in new["runs"]}
    lost = [entry for entry in old["runs"] if entry["name"] not in entries]
    if lost:
        differences.append(
            f"{len(lost)} runs are not in the plan any more, {lost[0]['name']} the first"
        )
        differences += _explain_loss(lost[0], new["runs"])
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise PlanError(
            f"--output {output}: expected the study that its runs are of, found another plan or "
            f"other data: {'; '.join(differences[:_SHOWN])}{more}"
        )
    ordered = [entries.pop(entry["name"]) for entry in old["runs"]] + list(entries.values())
    return {**new, "runs": [{**entry, "index": i} for i, entry in enumerate(ordered)]}


def _explain_loss(lost: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what differs in the run that has the lost one's place."""
    place = ("label", "size", "budget", "tokens_per_param", "seed")
    for entry in entries:
        if all(entry[key] == lost[key] for key in place):
            return _compare("config", lost["config"], entry["config"])
    return []


def _compare(where: str, old: Any, new: Any) -> list[str]:
    """Return the plain values that differ, by their place."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        parts = [_compare(f"{where}.{name}", old.get(name), new.get(name)) for name in names]
        return [text for part in parts for text in part]
    return [] if old == new else [f"{where}: {old!r}, now {new!r}"]
