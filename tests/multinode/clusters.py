"""Handles on the two-node Slurm and on the two hosts, and what tests of both need."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRAIN = "examples/multinode/train.sh"
SBATCH = "examples/multinode/train.sbatch"

# What the scripts must not get from the shell that started pytest.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def clean_environment(**settings: str) -> dict[str, str]:
    """The environment of a login shell, and `settings`."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings}


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Return the first true value of `condition()`, asked ten times a second."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return value


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@dataclass(frozen=True)
class Slurm:
    """Nodes n1 and n2."""

    configuration: Path

    def run(self, *command: str, **settings: str) -> str:
        """Run a Slurm command in the repository and return what it prints."""
        process = subprocess.run(
            command,
            cwd=ROOT,
            env=clean_environment(SLURM_CONF=str(self.configuration), **settings),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    def submit(
        self, output: Path, *words: str, flags: tuple[str, ...] = (), **settings: str
    ) -> str:
        """Submit the shipped sbatch on both nodes with `words`; returns the job's number."""
        arguments = ("--nodes", "2", "--time", "20", "--output", str(output), *flags, SBATCH)
        return self.run("sbatch", "--parsable", *arguments, *words, **settings).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """Return what is said of a job once it has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def job_if_ended():
            job = self.job(number)
            return job if job["JobState"] in ended else None

        return wait_for(job_if_ended, seconds, f"end of job {number}")


@dataclass(frozen=True)
class Hosts:
    """Namespaces NAME-1 at 10.77.0.1 and NAME-2 at 10.77.0.2, both on the interface emo0."""

    name: str
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, host: int, log: Path, *command: str, **settings: str) -> subprocess.Popen:
        """Start a command on a host, its output in `log`."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.name}-{host}", *command],
                cwd=ROOT,
                env=clean_environment(**settings),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def processes(self) -> list[int]:
        """What runs on either host."""
        listed = [ip("netns", "pids", f"{self.name}-{host}") for host in (1, 2)]
        return [int(number) for text in listed for number in text.split()]

    def cut(self) -> None:
        two_hosts("cut", self.name)

    def mend(self) -> None:
        two_hosts("mend", self.name)


def ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def two_hosts(verb: str, name: str) -> None:
    subprocess.run([str(HERE / "two_hosts.sh"), verb, name], check=True, timeout=20)
