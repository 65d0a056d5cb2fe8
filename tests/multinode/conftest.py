"""Two Slurm nodes, or two hosts with a cable between them, on this machine; skipped where they
cannot be had. Both need root and Debian packages: slurm-wlm and munge, or iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from clusters import HERE, Hosts, Slurm, clean_environment, ip, two_hosts  # noqa: E402


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A cluster of two nodes."""
    missing = [
        tool for tool in ("munged", "slurmctld", "slurmd") if not Path("/usr/sbin", tool).exists()
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for a socket's name
    script = [str(HERE / "slurm_cluster.sh")]
    try:
        subprocess.run(
            [*script, "up", str(folder)], env=clean_environment(), check=True, timeout=90
        )
        yield Slurm(folder / "slurm.conf")
    finally:
        subprocess.run([*script, "down", str(folder)], env=clean_environment(), timeout=90)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("ip not installed: apt-get install iproute2")
    name = f"emo{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=20)
    if probe.returncode:
        pytest.skip(f"no right to make network namespaces: {probe.stderr.strip()}")
    ip("netns", "delete", name)
    two_hosts("up", name)
    hosts = Hosts(name)
    try:
        yield hosts
    finally:
        two_hosts("down", name)
        for process in hosts.started:
            process.wait(20)
