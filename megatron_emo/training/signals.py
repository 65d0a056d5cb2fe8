"""What a signal does to a run."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of signals."""
    return parser


def install(args: argparse.Namespace) -> None:
    """Install it, before `pretrain()`."""
