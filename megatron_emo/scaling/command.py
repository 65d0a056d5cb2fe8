"""The flags of tools/scaling_study.py: each subcommand is a module of this package."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "plan": ("plan_command", "the runs of a study with their FLOPs, hours and memory"),
    "compare": ("compare_command", "objectives on the runs of one study: losses and speedups"),
    "fit": ("fit_command", "a law from a table of runs, with intervals"),
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
