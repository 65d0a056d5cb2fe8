"""Saves that survive any cut, and loads that refuse what is not whole."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of checkpoints."""
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Check and install what the run's saves and loads go through, before `pretrain()`."""
