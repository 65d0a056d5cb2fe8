"""A picture for each metric: values with intervals, a row for each group, a colour for each series.

Rows run down the page, so that names need no turning and never overlap. Colours are Okabe's and
Ito's, which the colour-blind tell apart; a shape goes with each.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_emo.evaluation.records import Record
from megatron_emo.report.layout import COMPARED, METRIC, order_keys
from megatron_emo.report.tables import Cell, Table, make_tables
from megatron_emo.report.text import NOTHING, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator
    from PIL import Image

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^vPX*"
MOST_POINTS = 150
"""Cells of one picture; more are not read any more."""
WIDTH, LINE, DPI = 7.2, 0.19, 130
"""Inches across, inches a line, and points an inch."""
STEPS = 6
"""Between two colours of a picture; with more of them Pillow confuses faint with paper."""
FAR = 5
"""Groups that span more than this many times their own width get a panel each."""
THEMES = {
    "light": {"ink": "#1b1f24", "faint": "#c9ced6", "paper": "#ffffff"},
    "dark": {"ink": "#e6e8eb", "faint": "#484e58", "paper": "#16191d"},
}


@dataclass(frozen=True)
class Plot:
    """What one picture shows."""

    metric: str
    unit: str
    better: str | None
    groups: tuple[str, ...]
    series: tuple[str, ...]
    series_name: str
    """The label whose values the series are; "" where all are one series."""
    cells: Mapping[tuple[str, str], Cell]
    """(group, series) -> cell."""

    @property
    def caption(self) -> str:
        """The picture in words, for those who do not see it."""
        parts = [
            f"{series} {group}".strip() + f": {cell.value:.4g}"
            for (group, series), cell in self.cells.items()
        ]
        return f"{with_unit(self.metric, self.unit)}. {'; '.join(parts)}."


def make_plots(records: Sequence[Record], better: Mapping[str, str]) -> list[Plot]:
    """Return a plot for each metric that has more than one cell, and not too many."""
    plots = []
    for metric in dict.fromkeys(record.metric for record in records):
        own = [record for record in records if record.metric == metric]
        tables = make_tables(own, better)
        if 1 < len(tables[0].cells) <= MOST_POINTS:
            plots.append(_make_plot(tables[0], better.get(metric)))
    return plots


def _make_plot(table: Table, better: str | None) -> Plot:
    names = [name for name in table.layout.rows + table.layout.columns if name != METRIC]
    series_name = next((name for name in COMPARED if name in names), names[0])
    if len(names) == 1:
        series_name = ""
    others = [name for name in names if name != series_name]
    found: dict[tuple[tuple[str, ...], str], Cell] = {}
    for (row, column), cell in table.cells.items():
        used = dict(zip(table.layout.rows + table.layout.columns, row + column, strict=True))
        key = tuple(used[name] for name in others)
        found[key, used.get(series_name, "")] = cell
    groups = {
        key: " · ".join(value or NOTHING for value in key)
        for key in order_keys((key for key, _ in found), others)
    }
    series = [key[0] for key in order_keys(((one,) for _, one in found), (series_name,))]
    first = next(iter(found.values()))
    return Plot(
        first.metric,
        first.unit,
        better,
        tuple(groups.values()),
        tuple(series),
        series_name,
        {
            (groups[key], one): found[key, one]
            for key in groups
            for one in series
            if (key, one) in found
        },
    )


def draw_png(plot: Plot, theme: str = "light") -> bytes:
    """Return the picture as PNG, of few colours and therefore small."""
    import matplotlib
    from PIL import Image

    look = THEMES[theme]
    ink = look["ink"]
    style = {
        **{"axes.facecolor": look["paper"], "figure.facecolor": look["paper"]},
        **{"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink},
        **{"xtick.color": ink, "ytick.color": ink, "grid.color": look["faint"]},
        **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False},
    }
    buffer, small = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(style):
        _draw(plot, look).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(buffer) as image:
        few = image.convert("RGB").quantize(palette=_palette(look), dither=Image.Dither.NONE)
        few.save(small, format="png", optimize=True)
    return small.getvalue()


def _palette(look: Mapping[str, str]) -> Image.Image:
    """All colours of a picture, and what lies between them at edges."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    paper, ink = to_rgb(look["paper"]), to_rgb(look["ink"])
    values = []
    for name in (look["ink"], look["faint"], *COLOURS):
        for other in (paper, ink):
            for part in range(STEPS):
                pairs = zip(to_rgb(name), other, strict=True)
                values += [round(255 * (a + (b - a) * part / STEPS)) for a, b in pairs]
    image = Image.new("P", (1, 1))
    image.putpalette([*values, *(round(255 * channel) for channel in paper)])
    return image


def _draw(plot: Plot, look: Mapping[str, str]) -> Figure:
    from matplotlib.figure import Figure

    draw = _draw_panels if has_own_scales(plot) else _draw_rows
    figure = Figure(layout="constrained")
    draw(figure, plot, look)
    arrow = {"high": "higher is better", "low": "lower is better"}.get(plot.better or "", "")
    words = [_plain(with_unit(plot.metric, plot.unit)), arrow]
    words += ["each panel has its own scale"] if draw is _draw_panels else []
    figure.supxlabel(", ".join(filter(None, words)), fontsize=9)
    if plot.series_name:
        _draw_legend(figure, plot, look)
    return figure


def has_own_scales(plot: Plot) -> bool:
    """Say whether groups lie so far apart that one scale would hide what differs within them."""
    widths, ends = [], []
    for group in plot.groups:
        values = [cell.value for (one, _), cell in plot.cells.items() if one == group]
        ends += values
        if len(values) > 1:
            widths.append(max(values) - min(values))
    return bool(widths) and max(ends) - min(ends) > FAR * statistics.median(widths) > 0


def _draw_rows(figure: Figure, plot: Plot, look: Mapping[str, str]) -> None:
    names = [_plain(textwrap.fill(group, 32)) for group in plot.groups]
    axes = figure.add_subplot()
    places, first = [], 0.0
    for group, name in zip(plot.groups, names, strict=True):
        count = sum(one == group for one, _ in plot.cells)
        # A line of a name takes 0.8 of a line of marks.
        height = max(count + 1, 0.8 * (name.count("\n") + 1) + 0.4)
        places.append(first + (height - 2) / 2)
        _draw_group(axes, plot, group, first + (height - 1 - count) / 2, look)
        first += height
    figure.set_size_inches(WIDTH, 1.5 + LINE * first)
    axes.set_yticks(places, names)
    _finish(axes, first - 2)


def _draw_panels(figure: Figure, plot: Plot, look: Mapping[str, str]) -> None:
    across = min(3, len(plot.groups))
    down = math.ceil(len(plot.groups) / across)
    lines = max(Counter(group for group, _ in plot.cells).values())
    figure.set_size_inches(WIDTH, 1.0 + down * (0.75 + LINE * lines))
    for at, group in enumerate(plot.groups):
        axes = figure.add_subplot(down, across, at + 1)
        _draw_group(axes, plot, group, 0, look)
        axes.set_title(_plain(textwrap.fill(group, 26)), fontsize=9)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(_few_ticks())
        _finish(axes, lines - 1)


def _few_ticks() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)


def _finish(axes: Axes, last: int) -> None:
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(last + 0.8, -0.8)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    axes.ticklabel_format(axis="x", useOffset=False)


def _draw_group(axes: Axes, plot: Plot, group: str, first: float, look: Mapping[str, str]) -> None:
    """What was not measured takes no line."""
    present = [one for one in plot.series if (group, one) in plot.cells]
    for line, series in enumerate(present):
        _draw_cell(axes, plot.cells[group, series], first + line, plot.series.index(series), look)


def _draw_cell(axes: Axes, cell: Cell, place: float, number: int, look: Mapping[str, str]) -> None:
    colour = COLOURS[number % len(COLOURS)]
    if cell.interval is not None:
        ends = [cell.interval.low, cell.interval.high]
        axes.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    if cell.n > 1:
        axes.plot(cell.values, [place] * cell.n, "|", color=look["ink"], markersize=6, alpha=0.7)
    axes.plot([cell.value], [place], linestyle="none", **_mark(number, look))


def _mark(number: int, look: Mapping[str, str]) -> dict:
    return {
        "marker": MARKERS[number % len(MARKERS)],
        "color": COLOURS[number % len(COLOURS)],
        "markeredgecolor": look["ink"],
        "markeredgewidth": 0.6,
        "markersize": 5.5,
    }


def _draw_legend(figure: Figure, plot: Plot, look: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], linestyle="none", **_mark(i, look)) for i in range(len(plot.series))]
    figure.legend(
        marks,
        [_plain(one or NOTHING) for one in plot.series],
        title=_plain(plot.series_name),
        loc="outside upper center",
        ncols=min(len(marks), 6),
        frameon=False,
        handletextpad=0.2,
    )


def _plain(text: str) -> str:
    """Two dollar signs would begin a formula, a low line at the start hides a legend's line."""
    return re.sub("^_", " _", text.replace("$", r"\$"))


def write_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write METRIC.png for each plot and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots:
        name = re.sub(r"[^\w.-]+", "_", plot.metric).strip(".") or "metric"
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(draw_png(plot))
    return paths
