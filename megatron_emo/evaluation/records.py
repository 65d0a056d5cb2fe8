"""A measured number with all that is needed to believe and to repeat it, and files of them."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from megatron_emo.whole_files import write_json

SCHEMA = "megatron_emo.records/1"

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

_PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
_BLOCK = 1 << 20


class RecordError(ValueError):
    """A file that holds no records, or a record that is not one."""


@dataclass(frozen=True)
class Interval:
    """Where the value would lie on other data of the same kind, or with other seeds."""

    low: float
    high: float
    level: float = 0.95
    method: str = "bootstrap"
    """bootstrap, wilson, normal, or range: the least and the largest over seeds."""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise RecordError(f"interval: expected low <= high, got [{self.low}, {self.high}]")


@dataclass(frozen=True)
class Record:
    """One number."""

    metric: str
    """Name, as rep-2, mauve, accuracy, token_perplexity."""
    value: float
    unit: str
    """1 for a share or a pure number, %, nats/token, bits/byte, words..."""
    definition: str
    """Which of the published definitions of this name was computed."""
    n: int
    """How many of `n_unit` went into it."""
    n_unit: str = "texts"
    seed: int | None = None
    interval: Interval | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    """What else the value depends on: window, n-gram order, sampling, shots."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """By what tables are laid out, as objective=emo1, domain=wikitext."""
    model: str | None = None
    """Name of the model's folder."""
    model_sha256: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each input file, by its name."""
    seconds: float | None = None
    """Wall time it took."""
    provenance: Mapping[str, Json] = field(default_factory=lambda: dict(provenance()))
    """commit, date, command, versions."""

    def __post_init__(self) -> None:
        if not self.metric:
            raise RecordError("metric: expected a name, got ''")
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise RecordError(f"{self.metric}: value: expected a number, got {self.value!r}")
        if not math.isfinite(self.value):
            raise RecordError(f"{self.metric}: value: expected a finite number, got {self.value}")
        if self.n < 0:
            raise RecordError(f"{self.metric}: n: expected at least 0, got {self.n}")

    def to_json(self) -> dict[str, Json]:
        """Return plain JSON values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Record:
        """Return the record that `to_json` wrote.

        Raises:
            RecordError: a field that is missing or unknown, or a value that is not a number.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        missing = sorted({"metric", "value", "unit", "definition", "n"} - set(data))
        if unknown or missing:
            raise RecordError(
                f"record: missing {missing or 'nothing'}, unknown {unknown or 'none'}"
            )
        values = {"provenance": {}, **data}
        if isinstance(values.get("interval"), Mapping):
            values["interval"] = Interval(**values["interval"])
        return cls(**values)


@cache
def provenance() -> Mapping[str, Json]:
    """Return commit, date (UTC), command and versions of this process."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = " ".join([Path(sys.argv[0]).name, *map(_shorten_path, sys.argv[1:])])
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"commit": _find_commit(), "date": date, "command": command, "versions": versions}


def _shorten_path(argument: str) -> str:
    """An absolute path says more of a machine than of a measurement: keep its last two parts."""
    path = Path(argument)
    return str(Path(*path.parts[-2:])) if path.is_absolute() else argument


def _find_commit() -> str:
    """Return the package's git commit, "-dirty" added where tracked files differ, or unknown."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return "unknown"
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 20}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **run)  # nosec B607 # the user's own git
        commit = head.stdout.strip()
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        return commit + ("-dirty" if subprocess.run(status, **run).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_records(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Write records as JSON, whole or not at all."""
    write_json(path, {"schema": SCHEMA, "records": [record.to_json() for record in records]})


def read_records(paths: Iterable[str | os.PathLike]) -> list[Record]:
    """Return the records of files, and of all `*.json` under folders, in the order of names.

    Raises:
        RecordError: a file of another kind, named, or nothing found.
        FileNotFoundError: a path that does not exist.
    """
    paths = [Path(path) for path in paths]
    records: list[Record] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            records += _read_file(file, is_named=file == path)
    if not records:
        raise RecordError(f"{', '.join(map(str, paths)) or 'no path'}: no records")
    return records


def _read_file(path: Path, is_named: bool) -> list[Record]:
    """Folders may hold other JSON, as settings of a run: left out. A file named must be records."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        if not is_named:
            return []
        raise RecordError(f"{path}: schema: expected {SCHEMA!r}")
    try:
        return [Record.from_json(record) for record in content["records"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}: expected a list of records: {error!r}") from error


def hash_file(path: str | os.PathLike) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_model(folder: str | os.PathLike) -> str:
    """Return one sha256 over names and contents of a folder's weights, config and tokenizer."""
    folder = Path(folder)
    kept = (".safetensors", ".json", ".model", ".txt", ".bin", ".gguf")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in kept):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()
