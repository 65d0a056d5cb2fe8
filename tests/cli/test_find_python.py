"""The Makefile's search for a Python: shims that do not run are passed over, none is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"


def find(path: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{path}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(path), **environment}
    return subprocess.run(["sh", str(SCRIPT)], env=env, capture_output=True, text=True)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def shims(tmp_path):
    """Every name the script tries stands on PATH and does not run, as pyenv's shims can."""
    for name in ("python3.12", "python3.13", "python3.14", "python3", "python"):
        put(tmp_path / name, "echo 'command not found in this version' >&2; exit 127")
    return tmp_path


def test_a_shim_that_does_not_run_is_passed_over(shims):
    put(
        shims / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", f'exec "{sys.executable}" "$@"'
    )
    result = find(shims)
    assert result.returncode == 0
    assert result.stdout.strip() == str(shims / ".pyenv/versions/3.12.9/bin/python")


def test_an_old_python_is_passed_over(shims):
    # Answers the version question as Python 3.11 would.
    put(shims / "python3.12", "exit 1")
    put(shims / "python3.13", f'exec "{sys.executable}" "$@"')
    assert find(shims).stdout.strip() == "python3.13"


def test_none_says_what_to_install(shims):
    result = find(shims)
    assert result.returncode == 1
    assert "apt-get install python3.12" in result.stderr
    assert str(shims / ".pyenv") in result.stderr


def test_the_users_choice_is_taken_or_refused(shims):
    assert find(shims, PYTHON=sys.executable).stdout.strip() == sys.executable
    refused = find(shims, PYTHON="python3")
    assert refused.returncode == 1
    assert "PYTHON=python3: expected a Python >= 3.12" in refused.stderr
