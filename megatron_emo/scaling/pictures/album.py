"""All pictures of a study, what could not be drawn and why, and the tables beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_emo.evaluation.records import hash_file, provenance
from megatron_emo.report.study import SCHEMA
from megatron_emo.scaling.pictures.compare import draw_differences, draw_speedups
from megatron_emo.scaling.pictures.drawing import draw
from megatron_emo.scaling.pictures.isoflop import draw_isoflop, draw_optima
from megatron_emo.scaling.pictures.picture import Picture, write_table
from megatron_emo.scaling.pictures.study import Study
from megatron_emo.scaling.pictures.surface import draw_frontier, draw_overlay, draw_residuals
from megatron_emo.scaling.pictures.tables import make_tables
from megatron_emo.scaling.pictures.throughput import draw_throughput, read_throughput
from megatron_emo.whole_files import write_json, write_whole

INDEX = "pictures.json"
OF_RUNS: dict[str, Callable[[Study], Picture]] = {
    "isoflop": draw_isoflop,
    "best_sizes": draw_optima,
    "frontier": draw_frontier,
    "residuals": draw_residuals,
    "frontier_overlay": draw_overlay,
    "loss_difference": draw_differences,
    "speedup": draw_speedups,
}
"""Name -> what makes it; ValueError where the runs do not suffice."""
THROUGHPUT = "throughput"


@dataclass(frozen=True)
class Album:
    """Pictures of a study."""

    pictures: tuple[Picture, ...]
    refused: tuple[tuple[str, str], ...]
    """(name, why)."""
    tables: tuple[dict, ...]
    """As `picture_tables`."""


def make_album(
    study: Study | None,
    throughput: str | Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Album:
    """Return the pictures that the measurements suffice for.

    Raises:
        ValueError: a throughput file that cannot be read.
    """
    makers: list[tuple[str, Callable[[], Picture]]] = []
    if study is not None:
        makers += [
            (name, lambda make=make: _with_colours(make(study), study))
            for name, make in OF_RUNS.items()
        ]
    if throughput is not None:
        cells = read_throughput(throughput)
        makers.append((THROUGHPUT, lambda: draw_throughput(cells)))
    pictures, refused = [], []
    for name, make in makers:
        progress(f"picture {name}")
        try:
            pictures.append(make())
        except ValueError as error:
            refused.append((name, str(error)))
    tables, without = make_tables(study) if study is not None else ([], [])
    return Album(tuple(pictures), (*refused, *without), tuple(tables))


def _with_colours(picture: Picture, study: Study) -> Picture:
    return picture if picture.is_ordered else replace(picture, order=tuple(study.tables))


def write_album(
    album: Album, folder: Path, study: Study | None, form: str, throughput: str | Path | None = None
) -> list[Path]:
    """Write NAME.png (or .svg), NAME.csv and, last, the index that `report.py --study` reads.

    Pictures of an earlier call that are not made any more are removed.
    """
    drawn = [(picture, draw(picture, form)) for picture in album.pictures]
    paths = []
    for picture, content in drawn:
        image, table = (folder / f"{picture.name}.{suffix}" for suffix in (form, "csv"))
        write_whole(image, content)
        write_table(table, picture.marks)
        paths += [image, table]
    index = _describe(album, study, form, throughput)
    stale = _find_stale(folder, {path.name for path in paths})
    write_json(folder / INDEX, index)
    for path in stale:
        path.unlink(missing_ok=True)
    return [*paths, folder / INDEX]


def _find_stale(folder: Path, written: set[str]) -> list[Path]:
    """Files that the last index names and this one does not."""
    try:
        last = json.loads((folder / INDEX).read_text(encoding="utf-8"))["pictures"]
        names = {Path(entry[key]).name for entry in last for key in ("image", "csv")}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [folder / name for name in sorted(names - written)]


def _describe(album: Album, study: Study | None, form: str, throughput) -> dict:
    sources = [path for path in (study and study.csv, throughput) if path]
    return {
        "schema": SCHEMA,
        "pictures": [
            {
                "name": picture.name,
                "title": picture.title,
                "caption": picture.caption,
                "image": f"{picture.name}.{form}",
                "csv": f"{picture.name}.csv",
            }
            for picture in album.pictures
        ],
        "refused": [{"name": name, "reason": reason} for name, reason in album.refused],
        "tables": list(album.tables),
        "notes": list(study.notes) if study else [],
        "settings": vars(study.settings) if study else {},
        "columns": study.columns if study else None,
        "sources": {Path(path).name: hash_file(path) for path in sources},
        "provenance": dict(provenance()),
    }


def format_album(paths: Sequence[Path], album: Album, notes: Sequence[str]) -> list[str]:
    """Return lines for a reader."""
    lines = [f"written    {path}" for path in paths]
    lines += [f"refused    {name}: {reason}" for name, reason in album.refused]
    return lines + [f"note       {note}" for note in notes]
