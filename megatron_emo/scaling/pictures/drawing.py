"""Marks as lines, points and bands, in colours that the colour-blind tell apart."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_emo.report.plots import COLOURS, DPI, MARKERS, THEMES
from megatron_emo.scaling.pictures.picture import Axis, Mark, Panel, Picture

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

FORMATS = ("png", "svg")
ACROSS = 3
WIDTH, HEIGHT, LINE = 3.3, 2.9, 0.16
"""Inches of a panel, and of a line of the caption."""
LETTERS = 17
"""Of a caption, an inch."""
MARGIN = 0.05
_LOOK = THEMES["light"]
_SOFT = "#565f6b"
_STYLE = {
    **{"axes.facecolor": _LOOK["paper"], "figure.facecolor": _LOOK["paper"], "font.size": 9},
    **{"text.color": _LOOK["ink"], "axes.labelcolor": _LOOK["ink"], "axes.edgecolor": _LOOK["ink"]},
    **{"xtick.color": _LOOK["ink"], "ytick.color": _LOOK["ink"], "grid.color": _LOOK["faint"]},
    **{"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "scaling"},
}
_LINES = {"law": "-", "forecast": "--", "reference": "-"}


def draw(picture: Picture, kind: str = "png") -> bytes:
    """Return the picture as PNG or SVG: the same marks give the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = make_figure(picture)
        about = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=about)
    return _shrink(buffer) if kind == "png" else buffer.getvalue()


def _shrink(png: io.BytesIO) -> bytes:
    """A third of the bytes: a picture has fewer than 256 colours that the eye tells apart."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(png) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(small, format="png", optimize=True)
    return small.getvalue()


def make_figure(picture: Picture) -> Figure:
    """Return the figure: title, legend, panels, and the caption beneath."""
    from matplotlib.figure import Figure

    across = min(ACROSS, len(picture.panels))
    down = math.ceil(len(picture.panels) / across)
    wide = max(WIDTH * across, 6.0)
    caption = textwrap.wrap(_plain(picture.caption), round(wide * LETTERS))
    handles = _legend(picture)
    columns = max(
        1, round(wide / max(1.35, 0.35 + 0.075 * max(len(h.get_label()) for h in handles)))
    )
    rows = math.ceil(len(handles) / columns)
    high = HEIGHT * down + LINE * len(caption) + 0.2 * rows + 0.45
    figure = Figure(figsize=(wide, high), layout="constrained")
    panels = figure.subplots(
        *(down, across), squeeze=False, sharex=picture.shares_axes, sharey=picture.shares_axes
    )
    colours = _colours(picture)
    for axes, panel in zip(panels.flat, picture.panels, strict=False):
        _draw_panel(axes, picture, panel, colours)
    for axes in list(panels.flat)[len(picture.panels) :]:
        axes.remove()
    figure.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=7.5, color=_SOFT)
    # A title of its own would be drawn over the legend: both are laid out at the top.
    figure.legend(
        handles=handles,
        title=_plain(picture.title),
        title_fontproperties={"weight": "bold", "size": 10.5},
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    return figure


def _colours(picture: Picture) -> dict[str, str]:
    series = picture.series
    if not picture.is_ordered:
        return {name: COLOURS[picture.place(name) % len(COLOURS)] for name in series}
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # The last tenth is too pale on white.
    shades = colormaps["viridis"]
    last = max(len(series) - 1, 1)
    return {name: to_hex(shades(0.88 * at / last)) for at, name in enumerate(series)}


def _marker(picture: Picture, series: str) -> str:
    return MARKERS[picture.place(series) % len(MARKERS)] if series else "o"


def _draw_panel(axes: Axes, picture: Picture, panel: Panel, colours: dict[str, str]) -> None:
    own = [mark for mark in picture.marks if mark.panel == panel.name]
    _set_scale(axes, panel)
    for series in ["", *picture.series]:
        colour = colours.get(series, _SOFT)
        marker = _marker(picture, series)
        for kind in dict.fromkeys(mark.kind for mark in own if mark.series == series):
            marks = [mark for mark in own if mark.series == series and mark.kind == kind]
            _draw_marks(axes, kind, marks, colour, marker)
    if len(picture.panels) > 1:
        axes.set_title(_plain(panel.name), fontsize=9)
    axes.set_xlabel(_plain(panel.x.label))
    axes.set_ylabel(_plain(panel.y.label))
    axes.grid(linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(MARGIN)


def _draw_marks(axes: Axes, kind: str, marks: Sequence[Mark], colour: str, marker: str) -> None:
    x, y = [mark.x for mark in marks], [mark.y for mark in marks]
    if "band" in kind:
        low, high = [mark.y_low for mark in marks], [mark.y_high for mark in marks]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, gid=kind)
    elif kind in _LINES:
        width = 0.9 if kind == "reference" else 1.4
        axes.plot(x, y, _LINES[kind], color=colour, linewidth=width, gid=kind)
    else:
        axes.plot(x, y, linestyle="none", marker=marker, color=colour, gid=kind, **_point(kind))
        if kind == "found":
            _draw_intervals(axes, marks, colour)


def _point(kind: str) -> dict:
    if kind == "run":
        return {"markersize": 3.2, "alpha": 0.55, "markeredgewidth": 0}
    if kind == "foretold":
        return {"markersize": 8.5, "markerfacecolor": "none", "markeredgewidth": 1.3}
    return {"markersize": 5.5, "markeredgecolor": _LOOK["ink"], "markeredgewidth": 0.7, "zorder": 3}


def _draw_intervals(axes: Axes, marks: Sequence[Mark], colour: str) -> None:
    for mark in marks:
        for low, high, is_across in (
            (mark.x_low, mark.x_high, True),
            (mark.y_low, mark.y_high, False),
        ):
            if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
                continue
            ends = ([low, high], [mark.y] * 2) if is_across else ([mark.x] * 2, [low, high])
            axes.plot(*ends, color=colour, linewidth=1.8, solid_capstyle="butt", gid="interval")


def _set_scale(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    for axis, scale, made in (
        (panel.x, axes.set_xscale, axes.xaxis),
        (panel.y, axes.set_yscale, axes.yaxis),
    ):
        if not axis.is_log:
            made.set_major_locator(MaxNLocator(6))
            continue
        scale("log")
        made.set_major_locator(_make_ticks() if axis.base == 10 else LogLocator(axis.base))
        made.set_major_formatter(_format_tick(axis))
        made.set_minor_locator(NullLocator())
        made.set_minor_formatter(NullFormatter())


def _make_ticks() -> LogLocator:
    """Few enough to be read side by side: powers of ten, or 1, 2, 5 over a short way."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    class Ticks(LogLocator):
        def tick_values(self, low, high):
            decades = math.log10(max(high, 1e-300) / max(low, 1e-300))
            # About 1, as of speedups: no round number of a decade is in sight.
            if decades < 0.3:
                return MaxNLocator(6).tick_values(low, high)
            if decades > 2.5:
                self.set_params(subs=(1.0,), numticks=6)
            elif decades > 1.3:
                self.set_params(subs=(1.0, 3.0), numticks=12)
            else:
                self.set_params(subs=(1.0, 2.0, 5.0) if decades > 0.6 else tuple(_TENTHS))
            return super().tick_values(low, high)

    return Ticks()


_TENTHS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)


def _format_tick(axis: Axis) -> FuncFormatter:
    from matplotlib.ticker import FuncFormatter

    form = format_flops if "FLOP" in axis.label else format_count
    return FuncFormatter(lambda value, _: form(value))


def format_count(value: float) -> str:
    """Return 350k, 1.2M, 7B, 15T; smaller numbers as they are."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def format_flops(value: float) -> str:
    """Return 1e18, 2.5e20."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _legend(picture: Picture) -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = _colours(picture)
    handles: list = [
        Line2D(
            *([], []),
            linestyle="none" if picture.is_ordered else "-",
            marker=_marker(picture, name),
            color=colours[name],
            markersize=5,
            label=_plain(name),
        )
        for name in picture.series
    ]
    drawn = {mark.kind for mark in picture.marks}
    for kind, label in picture.kinds.items():
        if kind not in drawn:
            continue
        if "band" in kind:
            handles.append(Patch(color=_SOFT, alpha=0.25, linewidth=0, label=label))
        elif kind in _LINES:
            handles.append(Line2D([], [], linestyle=_LINES[kind], color=_SOFT, label=label))
        else:
            look = {"marker": "o", "color": _SOFT, **_point(kind)}
            handles.append(Line2D([], [], linestyle="none", label=label, **look))
    return handles


def _plain(text: str) -> str:
    """Two dollar signs would begin a formula, a low line at the start hides a legend's line."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
