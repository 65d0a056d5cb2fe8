"""What the figures were measured on: device, driver, versions, clocks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from megatron_emo.gpu_check.record import Record, Settings

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")
_QUERIES = (
    "driver_version power.limit power.draw clocks.sm clocks.max.sm temperature.gpu "
    "utilization.gpu mig.mode.current"
).split()


def check_environment(settings: Settings, record: Record) -> None:
    """Device, memory, driver, versions of what takes part, power and clocks."""
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        record.note("device", properties.name)
        record.note("compute capability", f"{properties.major}.{properties.minor}")
        record.note("multiprocessors", properties.multi_processor_count)
        record.note("memory, GiB", round(total / 2**30, 2))
        record.note("free memory, GiB", round(free / 2**30, 2))
        record.note("CUDA of torch", torch.version.cuda)
        for name, value in query_nvidia_smi().items():
            record.note(name, value)
    else:
        record.note("device", f"{platform.machine()} CPU, {os.cpu_count()} cores")
    record.note("python", platform.python_version())
    for name in _PACKAGES:
        record.note(name, installed_version(name))


def installed_version(package: str) -> str:
    """Return a distribution's version, or that it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def query_nvidia_smi() -> dict[str, str]:
    """Return what nvidia-smi says of the device in use, or why it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "absent"}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader"]
    command += [f"--id={_device_id()}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    values = [value.strip() for value in result.stdout.split("\n")[0].split(",")]
    if len(values) != len(_QUERIES):
        return {"nvidia-smi": f"answered {result.stdout!r}"}
    return dict(zip(_QUERIES, values, strict=True))


def _device_id() -> str:
    """nvidia-smi counts all devices of the machine, whatever CUDA_VISIBLE_DEVICES hides."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return first or "0"
