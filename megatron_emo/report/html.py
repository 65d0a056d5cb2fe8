"""One HTML page that needs nothing beside itself: tables, pictures, definitions, what was run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from megatron_emo.evaluation.records import Record
from megatron_emo.report.grids import (
    Grid,
    make_definition_grid,
    make_input_grids,
    make_record_grid,
    make_result_grid,
    make_run_grid,
)
from megatron_emo.report.plots import DPI, Plot, draw_png
from megatron_emo.report.study import Study
from megatron_emo.report.tables import Table
from megatron_emo.report.text import format_span

MOST_BYTES = 2_000_000
MOST_RECORDS = 2_000
"""In the table of all records."""


class PageError(ValueError):
    """Too much for one page."""


@dataclass(frozen=True)
class Picture:
    """A plot as data URIs, in both themes or, of a study, the light one alone."""

    metric: str
    name: str
    alt: str
    light: str
    dark: str
    width: int
    height: int

    @property
    def size(self) -> int:
        """Bytes that it takes in the page, or somewhat more."""
        words = 6 * len((self.name * 2 + self.alt).encode())
        return len(self.light) + len(self.dark) + words + 500


@dataclass(frozen=True)
class Section:
    """What stands under one heading of the second order."""

    anchor: str
    title: str
    lines: Sequence[str] = ()
    text: str = ""
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    is_folded: bool = False


def format_page(
    records: Sequence[Record],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    better: Mapping[str, str],
    title: str,
    notes: str = "",
    studies: Sequence[Study] = (),
) -> str:
    """Return the page. It depends on the arguments alone: the same records give the same bytes.

    Args:
        studies: scaling studies, which come before the records, of which there may be none then.

    Raises:
        PageError: the page would have more than `MOST_BYTES`.
    """

    def render(pictures: Sequence[Section]) -> str:
        sections = [
            *([Section("notes", "Notes", text=notes)] if notes.strip() else []),
            *(part for at, study in enumerate(studies, 1) for part in _study_sections(study, at)),
            *(_record_sections(records, tables, better, pictures) if records else []),
        ]
        return _render(title=title, summary=_summarize(records, studies), sections=sections)

    room = MOST_BYTES - len(render([]).encode())
    if room < 0:
        of_studies = f" and {_count(len(studies), 'study')}" if studies else ""
        raise PageError(
            f"--html: expected at most {MOST_BYTES} bytes, got {MOST_BYTES - room} from "
            f"{len(records)} records{of_studies}: choose with --metric or --where"
        )
    return render(_picture_sections([_draw_picture(plot) for plot in plots], room))


def _record_sections(
    records: Sequence[Record],
    tables: Sequence[Table],
    better: Mapping[str, str],
    pictures: Sequence[Section],
) -> list[Section]:
    return [
        Section("results", "Results", grids=[make_result_grid(t, better) for t in tables]),
        *pictures,
        Section("definitions", "Definitions", grids=[make_definition_grid(records, better)]),
        Section("runs", "What was run", grids=[make_run_grid(records), *make_input_grids(records)]),
        _record_section(records),
    ]


def _study_sections(study: Study, number: int) -> list[Section]:
    """Return tables, pictures and runs of a study; its number keeps anchors apart."""
    name = f"Scaling study {study.folder}"
    lines = [f"Not known: {note}." for note in study.notes]
    lines += [f"Not drawn: {reason}." for reason in study.refused]
    pictures = [
        Picture(shown.name, shown.name, shown.caption, shown.uri, "", shown.width, shown.height)
        for shown in study.pictures
    ]
    anchor = f"study-{number}"
    return [
        Section(anchor, name, grids=study.tables),
        Section(f"{anchor}-pictures", f"{name}: pictures", lines=lines, pictures=pictures),
        Section(f"{anchor}-runs", f"{name}: what was run", grids=study.runs),
    ]


def _render(**values: object) -> str:
    import jinja2
    from markupsafe import Markup

    files = resources.files("megatron_emo.report")
    style, script, template = (
        (files / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js", "html")
    )
    ours = {"style": Markup(style), "script": Markup(script)}  # nosec B704 # files of the package
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        **values,
        **ours,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def _csp_hash(content: str) -> str:
    """By which a browser knows the page's own script and style, and runs no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _summarize(records: Sequence[Record], studies: Sequence[Study] = ()) -> str:
    words = [
        f"Scaling study {study.folder}: {_count(len(study.pictures), 'picture')}"
        + (f", {_count(study.num_runs, 'run')}." if study.num_runs else ".")
        for study in studies
    ]
    return " ".join([*words, *([_summarize_records(records)] if records else [])])


def _summarize_records(records: Sequence[Record]) -> str:
    metrics = len({record.metric for record in records})
    dates = sorted(str(date) for record in records if (date := record.provenance.get("date")))
    when = f", measured {format_span(dates)} UTC" if dates else ""
    return f"{_count(len(records), 'record')} of {_count(metrics, 'metric')}{when}."


def _count(number: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def _draw_picture(plot: Plot) -> Picture:
    import io

    from PIL import Image

    images = {theme: draw_png(plot, theme) for theme in ("light", "dark")}
    with Image.open(io.BytesIO(images["light"])) as image:
        width, height = (round(side * 96 / DPI) for side in image.size)
    uris = {
        theme: "data:image/png;base64," + base64.b64encode(content).decode()
        for theme, content in images.items()
    }
    name = f"{plot.metric}: {plot.cells[next(iter(plot.cells))].definitions[0]}"
    return Picture(plot.metric, name, plot.caption, uris["light"], uris["dark"], width, height)


def _picture_sections(pictures: Sequence[Picture], room: int) -> list[Section]:
    """Return the section of those pictures that fit into `room` bytes; none of no picture."""
    kept, left_out = [], []
    for picture in pictures:
        room -= picture.size
        (kept if room > 0 else left_out).append(picture)
    if not pictures:
        return []
    lines = [
        "Marks are values or means over seeds, bars their intervals, small strokes the seeds. "
        "The tables above hold the same numbers."
    ]
    if left_out:
        names = ", ".join(picture.metric for picture in left_out)
        lines.append(f"Left out for the size of the page: {names}. --png writes them all.")
    return [Section("pictures", "Pictures", lines=lines, pictures=kept)]


def _record_section(records: Sequence[Record]) -> Section:
    left_out = len(records) - MOST_RECORDS
    lines = [f"The last {left_out} of {len(records)} are left out."] if left_out > 0 else []
    grid = make_record_grid(records[:MOST_RECORDS])
    return Section("records", "All records", lines=lines, grids=[grid], is_folded=True)
