"""What a rank runs on: versions, environment variables, host and devices.

Environment variables are taken by an allow-list: secrets live in the environment, too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

_PACKAGES = {
    "megatron-core": "megatron-core",
    "transformer-engine": "transformer-engine",
    "apex": "apex",
    "triton": "triton",
    "flash-attn": "flash-attn",
    "nvidia-resiliency-ext": "nvidia-resiliency-ext",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "sentencepiece": "sentencepiece",
}

_VARIABLES = re.compile(
    r"(NCCL|CUDA|CUBLAS|CUDNN|NVTE|OMP|MKL|OPENBLAS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|GLOO|UCX|UB)_"
    r".*|PYTHONHASHSEED|PYTHONOPTIMIZE|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|TP_SOCKET_.*"
)
# Places and devices of a host, or of a rank; and what could be a secret whatever its prefix.
_PER_HOST = re.compile(
    r".*(_DIR|_DIRECTORY|_FILE|_PATH|_HOME|_IFNAME|_HCA|_ADDR|_PORT|_PID|_ID|_HOSTID|VISIBLE_DEVICES)"
)
_SECRET = re.compile(
    r"(^|.*_)(KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH|(API|AUTH|ACCESS|HF|HUB)_TOKEN)(_.*|$)",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a flag's or a variable's name says that its value must not be shown."""
    return _SECRET.fullmatch(name.strip("-").replace("-", "_")) is not None


def versions() -> dict[str, str]:
    """Return name -> version of what computes a run's numbers; "absent" for what is not there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["torch commit"] = (torch.version.git_version or "")[:12]
    found["CUDA"] = str(torch.version.cuda or "absent")
    if torch.cuda.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for label, package in _PACKAGES.items():
        try:
            found[label] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[label] = "absent"
    found["megatron_emo"] = _version_of_this_package()
    return found


@cache
def _version_of_this_package() -> str:
    """The version, git's commit where known, and a hash of the sources as they are."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    try:
        version = importlib.metadata.version("megatron_emo")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    commit = commit_of(root.parent)
    parts = [version, f"commit {commit}" if commit else "", f"sources {digest.hexdigest()[:12]}"]
    return ", ".join(part for part in parts if part)


def commit_of(folder: Path) -> str:
    """Return the commit a folder's checkout stands at, "" where there is none or no git."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that decide numbers or communication and have to be alike on all ranks.

    Left out are those that name places, interfaces and devices of one host.
    """
    return {
        name: environment[name]
        for name in sorted(environment)
        if _VARIABLES.fullmatch(name) and not _PER_HOST.fullmatch(name) and not is_secret_name(name)
    }


def machine() -> dict[str, str]:
    """Return host, processors, memory, limits and GPUs: may differ between ranks."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    found = {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "processors": str(len(os.sched_getaffinity(0))),
        "threads of torch": str(torch.get_num_threads()),
        "memory": format_bytes(pages * page_size),
        "open files at most": str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    }
    for label, folder in (("shared memory", Path("/dev", "shm")), ("working folder", Path("."))):
        if folder.is_dir():
            status = os.statvfs(folder)
            found[f"{label} free"] = format_bytes(status.f_bavail * status.f_frsize)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = f"{device.name}, {format_bytes(device.total_memory)}"
    if not torch.cuda.is_available():
        found["GPU"] = "none"
    return found


def format_bytes(count: float) -> str:
    """Return a size in binary units with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"
