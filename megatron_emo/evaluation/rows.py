"""Files of JSON lines, a row each, that a run adds to and that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_emo.evaluation.records import Json


class Rows(Protocol):
    """Where rows go: a RowFile, or what shows them at once."""

    found: list[dict]
    """Of an earlier run: not made again."""

    def append(self, rows: Sequence[Mapping[str, Json]]) -> None: ...


class RowFile:
    """Rows that gather in `<path>.part`, which `finish` renames to `path`.

    Each row has the hash of all that it depends on under "settings". The recipe itself lies in
    `<path>.recipe.json`, so that the file holds nothing but rows; it says what differs where a
    resume is refused.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        recipe: Mapping[str, Json],
        *,
        total: int,
        group: int,
        resume: bool = False,
        overwrite: bool = False,
        flag: str = "--output",
    ) -> None:
        """Begin the file, or with `resume` take over the whole groups of rows that are there.

        A part decides over a finished file: that one is being replaced.

        Args:
            recipe: all that the rows depend on.
            total: how many rows there will be.
            group: rows that are made together: part of a group is made again.
            overwrite: begin anew, with `resume` too.
            flag: what names the file, for messages.

        Raises:
            FileExistsError: there is one, and neither resume nor overwrite.
            ValueError: what there is was made by another recipe, what differs named; no JSON lines;
                group below 1.
        """
        if group < 1:
            raise ValueError(f"--batch-size: expected at least 1, got {group}")
        refuse_existing(path, resume=resume, overwrite=overwrite, flag=flag)
        self.path, self._flag = Path(path), flag
        self._part, self._note = _part_of(self.path), _beside(self.path, ".recipe.json")
        self._recipe = json.loads(json.dumps(recipe))
        self.hash = _hash_recipe(self._recipe)
        self.found: list[dict] = []
        there = next((p for p in (self._part, self.path) if p.exists()), None)
        if there and not overwrite:
            rows = self._read(there)
            self.found = rows if len(rows) == total else rows[: len(rows) // group * group]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        note = {"settings": self.hash, "recipe": self._recipe}
        _replace(self._note, json.dumps(note, indent=1, ensure_ascii=False) + "\n")
        _replace(self._part, "".join(map(_to_line, self.found)))

    def append(self, rows: Sequence[Mapping[str, Json]]) -> None:
        """Add rows, on disk when this returns."""
        with open(self._part, "a", encoding="utf-8") as file:
            file.write("".join(_to_line({**row, "settings": self.hash}) for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the file its name."""
        os.replace(self._part, self.path)

    def _read(self, path: Path) -> list[dict]:
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            if row.get("settings") != self.hash:
                raise ValueError(
                    f"{self._flag} {path}:{number}: {self._describe(row.get('settings'))}; "
                    "--overwrite starts anew"
                )
        return rows

    def _describe(self, found: object) -> str:
        """How the recipe of that hash differs, as far as it is known."""
        theirs = _read_note(self._note, found)
        if theirs is None:
            return f"expected settings {self.hash}, got {found}: another model, texts or flags"
        keys = sorted({*theirs, *self._recipe})
        pairs = {key: (theirs.get(key), self._recipe.get(key)) for key in keys}
        differing = [f"{k} {a!r}, expected {b!r}" for k, (a, b) in pairs.items() if a != b]
        return f"has {'; '.join(differing)}"


def refuse_existing(
    path: str | os.PathLike, *, resume: bool, overwrite: bool, flag: str = "--output"
) -> None:
    """Check that no rows would be lost.

    Raises:
        FileExistsError: the file is there, or a part of it, and neither resume nor overwrite.
    """
    there = [p for p in (Path(path), _part_of(Path(path))) if p.exists()]
    if there and not (resume or overwrite):
        raise FileExistsError(
            f"{flag} {there[0]}: exists; --resume goes on, --overwrite replaces it"
        )


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Return the objects of a JSON lines file; a last line that was cut off is left out.

    Raises:
        ValueError: another line that is not a JSON object.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: expected JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _part_of(path: Path) -> Path:
    return _beside(path, ".part")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all."""
    new = _beside(path, ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _read_note(path: Path, settings: object) -> dict | None:
    """The recipe of these settings, None where the note is gone, damaged or of other settings."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return note["recipe"] if note["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_line(row: Mapping[str, Json]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _hash_recipe(recipe: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
