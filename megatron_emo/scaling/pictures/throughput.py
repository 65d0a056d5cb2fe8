"""Picture of a throughput study: tokens a second of each GPU, and efficiency, against GPUs.

The file is JSON, a list of rows or {"rows": [...]}, each with label (layout or mode), gpus
(number), tokens_per_s_per_gpu, efficiency (1: as good as the reference of its label) and, where
known, objective and quartiles of the first (tokens_per_s_per_gpu_low, ..._high).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.scaling.pictures.picture import Axis, Mark, Panel, Picture, join

NEEDED = ("label", "gpus", "tokens_per_s_per_gpu", "efficiency")
_ENDS = ("tokens_per_s_per_gpu_low", "tokens_per_s_per_gpu_high")


@dataclass(frozen=True)
class Throughput:
    """Measured cells of a throughput study."""

    source: str
    """Name of the file."""
    rows: Sequence[Mapping]
    failed: Sequence[str] = ()
    """Names of cells that were not measured."""


def read_throughput(path: str | os.PathLike) -> Throughput:
    """Return the cells, numbers checked.

    Raises:
        ValueError: no rows, a row without a column, or a number that is not above 0.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--throughput {path}: expected JSON: {error}") from error
    rows = content.get("rows") if isinstance(content, dict) else content
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"--throughput {path}: expected rows with {', '.join(NEEDED)}, got none")
    for number, row in enumerate(rows, 1):
        for name in (*NEEDED, *(end for end in _ENDS if end in row)):
            value = row.get(name)
            is_good = bool(value) if name == "label" else _is_number(value)
            if not is_good:
                wanted = "a text" if name == "label" else "a number above 0"
                raise ValueError(
                    f"--throughput {path}: row {number}, {name!r}: expected {wanted}, got {value!r}"
                )
    failed = content.get("failed") or [] if isinstance(content, dict) else []
    if not isinstance(failed, list):
        raise ValueError(f"--throughput {path}: failed: expected a list, got {failed!r:.40}")
    return Throughput(path.name, rows, tuple(map(str, failed)))


def _is_number(value: object) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and 0 < value <= sys.float_info.max


def draw_throughput(found: Throughput) -> Picture:
    """Return tokens/s and efficiency against GPUs, a series a label and objective.

    Raises:
        ValueError: every series has one number of GPUs alone.
    """
    gpus = Axis("GPUs (on a CPU: ranks)", is_log=True, base=2)
    speed = Panel("throughput", gpus, Axis("tokens/s of each GPU"))
    share = Panel("efficiency", gpus, Axis("efficiency, 1 = ideal"))
    groups: dict[str, list[Mapping]] = {}
    rows = found.rows
    for row in rows:
        name = " · ".join(filter(None, [str(row["label"]), str(row.get("objective") or "")]))
        groups.setdefault(name, []).append(row)
    if all(len({row["gpus"] for row in own}) < 2 for own in groups.values()):
        raise ValueError(
            f"expected two numbers of GPUs of one label, got one each in {found.source}"
        )
    marks: list[Mark] = []
    for name, own in groups.items():
        own = sorted(own, key=lambda row: row["gpus"])
        x = [row["gpus"] for row in own]
        low, high = ([row.get(end, math.nan) for row in own] for end in _ENDS)
        y = [row["tokens_per_s_per_gpu"] for row in own]
        marks += speed.points(name, "law", x, y)
        marks += speed.points(name, "found", x, y, y_low=low, y_high=high)
        y = [row["efficiency"] for row in own]
        marks += share.points(name, "law", x, y)
        marks += share.points(name, "found", x, y)
    ends = [min(row["gpus"] for row in rows), max(row["gpus"] for row in rows)]
    marks += share.points("", "reference", ends, [1, 1])
    return Picture(
        name="throughput",
        title="Throughput and efficiency",
        caption=_caption(found),
        panels=(speed, share),
        marks=tuple(marks),
        kinds={},
    )


def _caption(found: Throughput) -> str:
    words = [
        f"{len(found.rows)} cells of {found.source}. Bars, where there are any: quartiles of steps."
    ]
    if found.failed:
        words.append(f"Not measured: {join(found.failed)}.")
    if any(row.get("device") == "CPU" for row in found.rows):
        words.append("On a CPU ranks share cores and caches: this says nothing of GPUs.")
    return " ".join(words)
