"""The flags of tools/scaling_study.py: each subcommand is a module of this package."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "plan": ("plans.plan_command", "the runs of a study with their FLOPs, hours and memory"),
    "run": ("running.run_command", "train the runs of a plan: stoppable, resumable, in shards"),
    "score": ("running.score_command", "held-out loss of every finished run, and runs.csv"),
    "fit": ("laws.fit_command", "a law from a table of runs, with intervals"),
    "compare": (
        "comparison.compare_command",
        "objectives on the runs of one study: losses and speedups",
    ),
    "pictures": (
        "pictures.pictures_command",
        "pictures of a study, each with the CSV of what it shows",
    ),
    "throughput": ("speed.throughput_command", "seconds of a step over layouts and objectives"),
    "estimate": ("speed.estimate_command", "layouts ranked by the step time that a model expects"),
}
"""Subcommand: (module with add_arguments(parser) and run(args), what it is for)."""


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        module = importlib.import_module(f"megatron_emo.scaling.{module_name}")
        task = tasks.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(task)
        task.set_defaults(run=module.run)
    return parser
