"""The event log of a run's rank."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the event log."""
    return parser


def install(args: argparse.Namespace) -> None:
    """Open the log and follow the run, before `pretrain()`."""
