"""The Triton kernels, in a process of their own: see tests/triton_checks.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_match_the_reference():
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "triton_checks.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
