"""Pictures of best sizes: IsoFLOP curves, and N*, D*, D*/N* against C."""

from __future__ import annotations

import numpy as np

from megatron_emo.scaling.laws.table import BUDGET_TOLERANCE, group_values
from megatron_emo.scaling.pictures.drawing import format_flops
from megatron_emo.scaling.pictures.frontier import FlopsRule, tails
from megatron_emo.scaling.pictures.picture import Axis, Mark, Panel, Picture
from megatron_emo.scaling.pictures.study import Study, SurfaceLaw, describe_dropped, spread
from megatron_emo.scaling.pictures.vertices import Vertices

FLOPS = Axis("C, training FLOPs", is_log=True)
SIZE = Axis("N, parameters", is_log=True)
LOSS = Axis("held-out loss, nats/token")


def draw_isoflop(study: Study) -> Picture:
    """Return a panel an objective: loss against N by budget, parabolas, best sizes."""
    found, without = study.gather(study.vertices)
    budgets = _name_budgets(found)
    marks: list[Mark] = []
    for name, own in found.items():
        panel = Panel(name, SIZE, LOSS)
        ends = own.intervals(study.settings.level)
        for at, curve in enumerate(own.curves):
            series = budgets[curve.flops]
            rows = curve.table
            marks += panel.points(series, "run", rows.params, rows.loss)
            marks += panel.points(series, "law", curve.places, curve.losses)
            best = own.optima.take([at])
            marks += panel.points(
                *(series, "found", best.params, best.loss),
                **{"x_low": ends[0, [at], 0], "x_high": ends[1, [at], 0]},
                **{"y_low": ends[0, [at], 2], "y_high": ends[1, [at], 2]},
            )
    order = {name: at for at, name in enumerate(dict.fromkeys(budgets.values()))}
    marks.sort(key=lambda mark: order[mark.series])
    return Picture(
        name="isoflop",
        title="IsoFLOP curves, by training FLOPs C",
        caption=_caption(study, found, without),
        panels=tuple(Panel(name, SIZE, LOSS) for name in found),
        marks=tuple(marks),
        kinds={"run": "run", "law": "parabola in log N", "found": "best size with interval"},
        is_ordered=True,
        shares_axes=True,
    )


def _name_budgets(found: dict[str, Vertices]) -> dict[float, str]:
    """Return {C: name} ascending; objectives' budgets differ by what the loss adds, and share
    one."""
    flops = np.unique([curve.flops for own in found.values() for curve in own.curves])
    labels = group_values(flops, BUDGET_TOLERANCE)
    means = [np.exp(np.log(flops[labels == label]).mean()) for label in labels]
    return {float(c): format_flops(float(mean)) for c, mean in zip(flops, means, strict=True)}


def _caption(study: Study, found: dict[str, Vertices], without: list[str]) -> str:
    counts = [f"{name}: {own.n} runs, {len(own.optima)} budgets" for name, own in found.items()]
    words = ["; ".join(counts) + ".", describe_intervals(study)]
    for name, own in found.items():
        words += [
            f"{name}, {r.name} ({r.num_points} points): no best size, {r.reason}."
            for r in own.refused
        ]
        lost = 1 - float(np.isfinite(own.draws[:, :, 0]).mean())
        if lost > 0.01:
            words.append(f"{name}: {lost:.0%} of draws of a curve have no best size.")
    words += [*without, describe_dropped({name: study.tables[name] for name in found})]
    return " ".join(filter(None, words))


def describe_intervals(study: Study) -> str:
    """Return what the intervals of best sizes are."""
    chosen = study.settings
    return (
        f"Intervals: {chosen.level:.0%} of {chosen.draws} draws of residuals about the parabolas."
    )


def draw_optima(study: Study) -> Picture:
    """Return N*, D* and D*/N* against C: best sizes, the power law through them, the surface's."""
    found, without = study.gather(study.vertices)
    panels = (
        Panel("best size", FLOPS, Axis("N*, parameters", is_log=True)),
        Panel("its tokens", FLOPS, Axis("D*, tokens", is_log=True)),
        Panel("tokens per parameter", FLOPS, Axis("D*/N*", is_log=True)),
    )
    marks: list[Mark] = []
    laws = []
    for name, own in found.items():
        marks += _mark_optima(study, name, own, panels)
        if len(own.optima) > 1:
            laws.append(f"{name}: {_say_law(study, own)}.")
    caption = _caption(study, found, without)
    few = [name for name, own in found.items() if len(own.optima) < 2]
    laws += [f"{name}: one best size, no law." for name in few]
    return Picture(
        name="best_sizes",
        title="Best size and tokens at each budget",
        caption=" ".join([*laws, caption]),
        panels=panels,
        marks=tuple(marks),
        kinds={
            "found": "vertex with interval",
            "law": "power law",
            "band": "its interval",
            "forecast": f"surface ({study.settings.approach})",
        },
    )


def _say_law(study: Study, own: Vertices) -> str:
    words = []
    for quantity, letter in enumerate("ND"):
        (low,), (high,) = tails(own.law_draws(quantity)[:, :1], study.settings.level)
        words.append(f"{letter}* ~ C^{own.law(quantity)[0]:.3f} [{low:.3f}, {high:.3f}]")
    return ", ".join(words)


def _mark_optima(
    study: Study, name: str, own: Vertices, panels: tuple[Panel, Panel, Panel]
) -> list[Mark]:
    flops, level = own.optima.flops, study.settings.level
    ends, marks = own.intervals(level), []
    for quantity, values in enumerate((own.optima.params, own.optima.tokens)):
        low, high = ends[0, :, quantity], ends[1, :, quantity]
        marks += panels[quantity].points(name, "found", flops, values, y_low=low, y_high=high)
    logs = own.draws[:, :, 1] - own.draws[:, :, 0]
    low, high = np.exp(tails(logs, level))
    ratio = own.optima.tokens / own.optima.params
    marks += panels[2].points(name, "found", flops, ratio, y_low=low, y_high=high)
    if len(flops) > 1:
        grid = spread(flops.min(), flops.max())
        lines = [np.array(own.law(quantity)) for quantity in (0, 1)]
        draws = [own.law_draws(quantity) for quantity in (0, 1)]
        for panel, line, drawn in zip(
            panels, [*lines, lines[1] - lines[0]], [*draws, draws[1] - draws[0]], strict=True
        ):
            marks += _mark_law(panel, name, grid, line, drawn, level)
    try:
        surface = study.surface(name)
    except ValueError:
        return marks
    return marks + _mark_surface(panels, name, surface)


def _mark_law(
    panel: Panel,
    name: str,
    grid: np.ndarray,
    line: np.ndarray,
    drawn: np.ndarray,
    level: float,
) -> list[Mark]:
    x = np.log(grid)
    values = np.exp(line[1] + line[0] * x)
    marks = panel.points(name, "law", grid, values)
    if len(drawn) > 1:
        low, high = np.exp(tails(drawn[:, 1:] + drawn[:, :1] * x, level))
        marks += panel.points(name, "band", grid, values, y_low=low, y_high=high)
    return marks


def _mark_surface(panels: tuple[Panel, Panel, Panel], name: str, law: SurfaceLaw) -> list[Mark]:
    grid = spread(law.table.flops.min(), law.table.flops.max())
    params, tokens, _ = FlopsRule.of_table(law.table).optimum(law.fit.surface, grid)
    here = np.isfinite(params)
    marks = []
    for panel, values in zip(panels, (params, tokens, tokens / params), strict=True):
        marks += panel.points(name, "forecast", grid[here], values[here])
    return marks
