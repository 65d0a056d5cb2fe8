"""What tells a study's data from other data: sizes and hashes of the files that training reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.plans.study_settings import OUTPUT_LAYER, DataSettings

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Of a model that lies beside a tokenizer."""


def describe_data(data: DataSettings) -> dict[str, Any]:
    """Return the settings, and for each file its size and sha256; of .bin files the size alone.

    The .idx beside a .bin has the length of every document.

    Raises:
        PlanError: a file that is not there.
    """
    return {
        "path": list(data.path),
        "tokenizer_type": data.tokenizer_type,
        "tokenizer_model": data.tokenizer_model,
        "split": data.split,
        "held_out": data.held_out,
        "cost_embedding": data.cost_embedding,
        "files": {label: _describe(label, path) for label, path in _list_files(data)},
    }


def _list_files(data: DataSettings) -> Iterator[tuple[str, Path]]:
    for index, prefix in enumerate(data.prefixes):
        for suffix in (".idx", ".bin"):
            yield f"data.path[{index}]{suffix}", Path(f"{prefix}{suffix}")
    model = Path(data.tokenizer_model)
    if data.tokenizer_model and model.is_dir():
        for path in sorted(model.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS:
                yield f"data.tokenizer_model/{path.name}", path
    elif model.is_absolute():
        yield "data.tokenizer_model", model
    if data.held_out is not None:
        yield "data.held_out", Path(data.held_out)
    if data.cost_embedding != OUTPUT_LAYER:
        yield "data.cost_embedding", Path(data.cost_embedding)


def _describe(label: str, path: Path) -> dict[str, int | str]:
    if not path.is_file():
        raise PlanError(f"{label}: expected a file, found none at {path}")
    size = path.stat().st_size
    if path.suffix == ".bin":
        return {"bytes": size}
    with open(path, "rb") as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in words what another training would see; where files lie makes no difference.

    Held-out documents may be added to a study that had none.
    """
    found = [
        f"data.{name}: {old.get(name)!r}, now {new.get(name)!r}"
        for name in ("tokenizer_type", "split")
        if old.get(name) != new.get(name)
    ]
    if _weights(old) != _weights(new):
        found.append(f"data.path: weights {_weights(old)}, now {_weights(new)}")
    before, now = old.get("files", {}), new.get("files", {})
    for label in sorted(before.keys() | now.keys()):
        if label not in before and label != "data.held_out":
            found.append(f"{label}: not there, now {_show(now[label])}")
        elif label in before and before[label] != now.get(label):
            found.append(f"{label}: {_show(before[label])}, now {_show(now.get(label))}")
    return found


def _weights(data: Mapping[str, Any]) -> list[str]:
    prefixes = DataSettings(path=tuple(data["path"])).prefixes
    return [word for word in data["path"] if word not in prefixes]


def _show(file: Mapping[str, Any] | None) -> str:
    if file is None:
        return "not there"
    digest = f", sha256 {file['sha256'][:12]}" if "sha256" in file else ""
    return f"{file['bytes']} bytes{digest}"
