"""What a finished run says of itself: one JSON file, written whole by its rank 0."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULT_FORMAT = 1
_LARGEST = sys.float_info.max
_KINDS = {"str": str, "int": int, "float": float, "Mapping[str, str]": Mapping}


class ResultError(ValueError):
    """A result that is missing, torn, or that of another run."""


@dataclass(frozen=True)
class RunResult:
    """One run's result."""

    name: str
    hash: str
    """Of the settings that decide what was trained."""
    iteration: int
    samples: int
    tokens: int
    seconds: float
    """Of the steps, each once however often the run was restarted; saves, evaluations and starts
    are not in it."""
    gpu_hours: float
    """The same hours times ranks, whatever devices these had."""
    starts: int
    """How often it was started."""
    ranks: int
    """Of the last start."""
    device: str
    objective: str
    lm_loss: float
    """Training cross-entropy of the last step, nats/token."""
    versions: Mapping[str, str]
    commit: str
    """"" where there is no git."""
    format: int = RESULT_FORMAT

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, kind = getattr(self, spec.name), _KINDS[spec.type]
            is_right = isinstance(value, (int, float) if kind is float else kind)
            if not is_right or isinstance(value, bool):
                raise ResultError(f"{spec.name}: expected {spec.type}, found {value!r:.60}")
            if kind in (int, float) and not 0 <= value <= _LARGEST:
                raise ResultError(
                    f"{spec.name}: expected a finite number from 0 on, found {value!r:.40}"
                )
        if self.format != RESULT_FORMAT:
            raise ResultError(f"format: expected {RESULT_FORMAT}, found {self.format}")


def write_result(path: str | os.PathLike, result: RunResult) -> None:
    """Write a result, whole or not at all, and to the disk.

    Raises:
        OSError: it cannot be written; a former one is then still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    text = json.dumps(asdict(result), indent=1, allow_nan=False) + "\n"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_result(path: str | os.PathLike, **expected: Any) -> RunResult:
    """Return a result whose fields are as expected.

    Args:
        expected: values of fields, as hash, iteration and tokens.

    Raises:
        ResultError: none there, one that cannot be read, or one with other values.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {spec.name for spec in fields(RunResult)}
        result = RunResult(**{key: value for key, value in content.items() if key in known})
    except FileNotFoundError:
        raise ResultError(f"{path}: expected the result of a finished run, found none") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ResultError(f"{path}: expected the result of a finished run: {error}") from error
    for name, value in expected.items():
        if (found := getattr(result, name)) != value:
            raise ResultError(f"{path}: {name}: expected {value!r}, found {found!r}")
    return result
