"""A scaling study on the page: its tables and pictures, and what was run when.

Read are DIR/pictures.json or DIR/pictures/pictures.json (`scaling_study.py pictures`) and, where
the folder is a study's, its manifest.json with state.json and result.json of each run.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_emo.evaluation.records import Json
from megatron_emo.foreign_files import file_inside, read_json_object
from megatron_emo.report.grids import Grid, Item
from megatron_emo.report.plots import DPI
from megatron_emo.report.text import NOTHING

SCHEMA = "megatron_emo.scaling_pictures/1"
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_COLUMNS = {
    **{"name": "run", "objective": "objective", "seed": "seed", "state": "state"},
    **{"attempts": "attempts", "started": "begun (UTC)", "ended": "ended (UTC)"},
    **{"tokens": "tokens", "seconds": "seconds of steps", "gpu_hours": "GPU-hours"},
    **{"device": "device", "commit": "commit"},
}
_OF_RESULT = ("tokens", "seconds", "gpu_hours", "device", "commit")
_NUMBERS = ("seed", "attempts", "tokens", "seconds", "gpu_hours")


@dataclass(frozen=True)
class Shown:
    """A picture of the study."""

    name: str
    caption: str
    uri: str
    """With the image in it."""
    width: int
    height: int


@dataclass(frozen=True)
class Study:
    """What the page shows of one study."""

    folder: str
    pictures: Sequence[Shown]
    refused: Sequence[str]
    """Name and reason of pictures that could not be drawn."""
    tables: Sequence[Grid]
    runs: Sequence[Grid]
    """What was run when, and what the pictures are of."""
    notes: Sequence[str]
    num_runs: int
    """Of the manifest; 0 without one."""


def read_study(folder: Path) -> Study:
    """Return what there is of a study.

    Raises:
        ValueError: no index of pictures, or one that cannot be read.
        OSError: a picture that is not there.
    """
    index = next(
        (
            path
            for path in (folder / "pictures.json", folder / "pictures" / "pictures.json")
            if path.is_file()
        ),
        None,
    )
    if index is None:
        raise ValueError(
            f"--study {folder}: expected pictures.json or pictures/pictures.json in it, found "
            "none: `scaling_study.py pictures --output DIR` writes it"
        )
    content = _read_json(index)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"--study: {index}: expected schema {SCHEMA}")
    try:
        pictures = [_read_picture(index.parent, entry) for entry in content["pictures"]]
        tables = [_make_grid(table) for table in content["tables"]]
        refused = [f"{entry['name']}: {entry['reason']}" for entry in content["refused"]]
        about = _about_grid(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--study: {index}: expected what `pictures` writes: {error!r}") from error
    rows = _read_runs(folder)
    runs = [_run_grid(rows)] if rows else []
    notes = [str(note) for note in content.get("notes") or ()]
    return Study(folder.name, pictures, refused, tables, [*runs, about], notes, len(rows))


def _read_json(path: Path) -> dict[str, Json]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"--study: {error}") from error


def _read_picture(folder: Path, entry: Mapping) -> Shown:
    path = folder / Path(entry["image"]).name
    if path.suffix not in _TYPES:
        raise ValueError(f"--study: {path}: expected one of {', '.join(_TYPES)}")
    content = path.read_bytes()
    uri = f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(content).decode()}"
    width, height = _png_size(content) if path.suffix == ".png" else (0, 0)
    caption = f"{entry['title']}. {entry['caption']}"
    name = f"{entry['title']}. Its numbers: {Path(entry['csv']).name}"
    return Shown(name, caption, uri, width, height)


def _png_size(content: bytes) -> tuple[int, int]:
    """Return width and height in the page's pixels."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise ValueError("--study: a picture is no PNG")
    width, height = struct.unpack(">II", content[16:24])
    return round(width * 96 / DPI), round(height * 96 / DPI)


def _make_grid(table: Mapping) -> Grid:
    rows = table["rows"]
    columns = range(len(table["heads"]))
    is_number = [any(_is_number(row[at]) for row in rows) for at in columns]
    heads = [
        Item(str(head), "number" if number else "")
        for head, number in zip(table["heads"], is_number, strict=True)
    ]
    cells = [
        [
            _make_item(cell, number, at == 0)
            for at, (cell, number) in enumerate(zip(row, is_number, strict=True))
        ]
        for row in rows
    ]
    return Grid(str(table["name"]), heads, cells, str(table["caption"]))


def _is_number(cell: Json) -> bool:
    return isinstance(cell, int | float | Mapping)


def _make_item(cell: Json, number: bool, is_head: bool) -> Item:
    kind = "number" if number else ""
    if cell is None or cell == "":
        return Item(NOTHING, kind, is_head=is_head)
    if isinstance(cell, Mapping):
        ends = f"[{_say_number(cell['low'])}, {_say_number(cell['high'])}]"
        return Item(_say_number(cell["value"]), kind, float(cell["value"]), ends)
    if _is_number(cell):
        return Item(_say_number(cell), kind, float(cell))
    return Item(str(cell), kind, is_head=is_head)


def _say_number(value: float) -> str:
    text = str(value) if isinstance(value, int) else f"{value:.4g}"
    text = re.sub(r"e([+-])0?", lambda found: f"e{found[1].strip('+')}", text)
    return "−" + text[1:] if text.startswith("-") else text


def _about_grid(content: Mapping) -> Grid:
    about = content.get("provenance") or {}
    sources = ", ".join(f"{name} ({sha[:12]})" for name, sha in content["sources"].items())
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items())
    rows = [
        ("drawn from", sources),
        ("columns", content.get("columns")),
        ("settings", settings),
        ("command", about.get("command")),
        ("date (UTC)", about.get("date")),
        ("commit", about.get("commit")),
    ]
    cells = [[Item(name, is_head=True), Item(str(value), "long")] for name, value in rows if value]
    return Grid("Pictures", [Item("what"), Item("value")], cells)


def _read_runs(folder: Path) -> list[dict]:
    """Return a row for each run of the manifest: what its state and its result say."""
    path = folder / "manifest.json"
    if not path.is_file():
        return []
    runs = _read_json(path).get("runs")
    if not isinstance(runs, list):
        raise ValueError(f"--study: {path}: expected runs, got none")
    try:
        return [_read_run(run, file_inside(folder / "runs", run["name"], path)) for run in runs]
    except (ArithmeticError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--study: {path}: expected a study's runs: {error!r}") from error


def _read_run(run: Mapping, folder: Path) -> dict:
    """Return what is measured of a run, and what its state says: a result alone makes it done."""
    state, result = (_read_if_there(folder / name) for name in ("state.json", "result.json"))
    config = run.get("config") or {}
    is_done = bool(result) and result.get("hash") == run.get("hash")
    measured = {name: result.get(name) if is_done else None for name in _OF_RESULT}
    return measured | {
        "name": run["name"],
        "objective": run.get("label") or run.get("objective") or config.get("objective"),
        "seed": run.get("seed", config.get("seed")),
        "state": "done" if is_done else state.get("state") or "planned",
        "attempts": state.get("attempts"),
        "started": _say_time(state.get("started")),
        "ended": _say_time(state.get("ended")),
    }


def _read_if_there(path: Path) -> Mapping:
    return _read_json(path) if path.is_file() else {}


def _run_grid(rows: Sequence[Mapping]) -> Grid:
    """What is not known yet has a dash."""
    heads = [Item(text, "number" if key in _NUMBERS else "") for key, text in _COLUMNS.items()]
    lines = [
        [_make_item(row[key], key in _NUMBERS, key == "name") for key in _COLUMNS] for row in rows
    ]
    return Grid("Runs", heads, lines)


def _say_time(value: Json) -> str | None:
    """Return a time to the minute: of seconds since 1970, or as it was written."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return str(value)[:16].replace("T", " ") if value else None
