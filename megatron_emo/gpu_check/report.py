"""What the checks leave behind: JSON for machines, Markdown for people."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import megatron_emo
from megatron_emo.benchmark.report import checkout_commit
from megatron_emo.gpu_check.environment import installed_version
from megatron_emo.gpu_check.record import Figure, Settings
from megatron_emo.gpu_check.run import CheckResult


def describe_run(settings: Settings) -> dict[str, Any]:
    """Return when, where and of which code."""
    is_gpu = settings.device == "cuda"
    machine = torch.cuda.get_device_name() if is_gpu else f"{platform.machine()} CPU"
    return {
        "settings": asdict(settings),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": checkout_commit(),
        "machine": f"{machine}, {os.cpu_count()} CPU cores",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "megatron_emo": megatron_emo.__version__,
    }


def write_json(path: str, run: dict[str, Any], results: Sequence[CheckResult]) -> None:
    """Write {"run": ..., "checks": [...]}; makes the folder. Numbers that are none become text."""
    checks = [asdict(result) for result in results]
    for check in checks:
        check["seconds"] = round(check["seconds"], 2)
        for figure in check["figures"]:
            value = figure["value"]
            if isinstance(value, float) and not math.isfinite(value):
                figure["value"] = str(value)
    content = json.dumps({"run": run, "checks": checks}, indent=1, allow_nan=False)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n", encoding="utf-8")


def format_markdown(run: dict[str, Any], results: Sequence[CheckResult]) -> str:
    """Return a heading, a row per check, and a table of figures per check that has any."""
    size = ", small sizes" if run["settings"]["small"] else ""
    lines = [
        f"# GPU checks on {run['machine']}{size}",
        "",
        f"{run['date']}, commit {run['commit']}, torch {run['torch']}, triton {run['triton']}, "
        f"python {run['python']}, load {run['load_average']}",
        "",
        "| check | status | s | reason |",
        "|---|---|---|---|",
    ]
    for result in results:
        reason = _cell(result.summary)
        lines.append(f"| {result.name} | {result.status} | {result.seconds:.1f} | {reason} |")
    for result in results:
        if result.figures:
            lines += [
                "",
                f"## {result.name}",
                "",
                "| figure | value | bound | |",
                "|---|---|---|---|",
            ]
            lines += [_row(figure) for figure in result.figures]
    return "\n".join(lines)


def _row(figure: Figure) -> str:
    bound = "" if figure.at_most is None else f"<= {figure.at_most:g}"
    verdict = {None: "", True: "ok", False: "FAILED"}[figure.passed]
    return f"| {_cell(figure.name)} | {_cell(_text(figure.value))} | {bound} | {verdict} |"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Text as it may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")
