"""Pictures of surfaces: their least loss at each C, what they foretell, and what they miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.pictures.frontier import BEYOND, FlopsRule, tails
from megatron_emo.scaling.pictures.isoflop import FLOPS, LOSS, SIZE
from megatron_emo.scaling.pictures.picture import Axis, Mark, Panel, Picture
from megatron_emo.scaling.pictures.study import (
    Study,
    SurfaceLaw,
    describe_dropped,
    describe_lost,
    spread,
)


def draw_frontier(study: Study) -> Picture:
    """Return a panel an objective: least loss against C, and what the other budgets foretell."""
    found, without = study.gather(study.surface)
    marks, words = [], []
    for name, law in found.items():
        panel = Panel(name, FLOPS, LOSS)
        marks += _mark_frontier(study, panel, name, law, with_forecast=True)
        words.append(f"{name}: {len(law.table)} runs. {_say_held_out(law)}")
    words += _find_out_of_reach(found, marks)
    words += [*without, _describe_band(study), *describe_lost(found)]
    words.append(describe_dropped(study.tables))
    return Picture(
        name="frontier",
        title="Least loss at each budget",
        caption=" ".join(filter(None, words)),
        panels=tuple(Panel(name, FLOPS, LOSS) for name in found),
        marks=tuple(marks),
        kinds={
            "found": "vertex with interval",
            "law": f"surface ({study.settings.approach})",
            "band": "its interval",
            "forecast": "surface without the largest budget",
            "foretold": "what that foretells",
        },
        shares_axes=True,
    )


def _describe_band(study: Study) -> str:
    chosen = study.settings
    reach = f"; drawn to {chosen.reach:g} times the largest C" if chosen.reach > 1 else ""
    return f"Bands: {chosen.level:.0%} of {chosen.draws} resamples of runs{reach}."


def _say_held_out(law: SurfaceLaw) -> str:
    held = law.held_out
    if "reason" in held:
        return f"No budget left out: {held['reason']}."
    return (
        f"The budgets below C = {held['flops']:.2g} foretell its {held['n']} runs with an error of "
        f"{held['mean_error']:+.4f} nats/token on average, {held['rms_error']:.4f} in root mean "
        "square."
    )


def _find_out_of_reach(found: Mapping[str, SurfaceLaw], marks: Sequence[Mark]) -> list[str]:
    """Say whose surface has no best size near its runs at any C.

    Raises:
        ValueError: no surface has one.
    """
    drawn = {mark.series for mark in marks if mark.kind == "law"}
    beyond = f"best sizes more than {BEYOND:g} times beyond those of its runs at every C"
    words = [f"{name}: the surface has its {beyond}." for name in found if name not in drawn]
    if len(words) == len(found):
        raise ValueError(" ".join(words))
    return words


def _mark_frontier(
    study: Study, panel: Panel, name: str, law: SurfaceLaw, with_forecast: bool
) -> list[Mark]:
    rule, level = FlopsRule.of_table(law.table), study.settings.level
    largest = law.table.flops.max()
    grid = spread(law.table.flops.min(), study.settings.reach * largest)
    loss = rule.optimum(law.fit.surface, grid)[2]
    here = np.isfinite(loss)
    marks = panel.points(name, "law", grid[here], loss[here])
    low, high = frontier_band(rule, law.draws, grid, level)
    here &= np.isfinite(low)
    ends = {"y_low": low[here], "y_high": high[here]}
    marks += panel.points(name, "band", grid[here], loss[here], **ends)
    if with_forecast and law.without_largest is not None:
        marks += _mark_forecast(panel, name, rule, law, grid)
    try:
        own = study.vertices(name)
    except ValueError:
        return marks
    ends = own.intervals(level)[:, :, 2]
    optima = own.optima
    return marks + panel.points(
        name, "found", optima.flops, optima.loss, y_low=ends[0], y_high=ends[1]
    )


def _mark_forecast(
    panel: Panel, name: str, rule: FlopsRule, law: SurfaceLaw, grid: np.ndarray
) -> list[Mark]:
    if not _has_optimum(law.without_largest):
        return []
    loss = rule.optimum(law.without_largest, grid)[2]
    here = np.isfinite(loss)
    marks = panel.points(name, "forecast", grid[here], loss[here])
    flops = np.array([law.held_out["flops"]])
    at = rule.optimum(law.without_largest, flops)[2]
    return marks + (panel.points(name, "foretold", flops, at) if np.isfinite(at).all() else [])


def _has_optimum(surface: Surface) -> bool:
    return min(surface.A, surface.B, surface.alpha, surface.beta) > 0


def frontier_band(
    rule: FlopsRule, draws: list[Surface], flops: np.ndarray, level: float
) -> np.ndarray:
    """Return low and high ends [2, n] of the least loss at flops [n]; NaN of too few draws."""
    return tails(_losses_of(rule, draws, flops), level)


def _losses_of(rule: FlopsRule, draws: list[Surface], flops: np.ndarray) -> np.ndarray:
    losses = [rule.optimum(surface, flops)[2] for surface in draws]
    return np.array(losses).reshape(-1, len(flops))


def draw_overlay(study: Study) -> Picture:
    """Return the frontiers of all objectives in one panel, and beside it how far they are apart."""
    if len(study.tables) < 2:
        raise ValueError(f"expected two objectives, got one: {next(iter(study.tables))}")
    found, without = study.gather(study.surface)
    baseline = study.settings.baseline
    loss = Panel("least loss", FLOPS, LOSS)
    apart = Panel(f"minus that of {baseline}", FLOPS, Axis("difference, nats/token"))
    marks: list[Mark] = []
    for name, law in found.items():
        marks += _mark_frontier(study, loss, name, law, with_forecast=False)
    is_apart = baseline in found and len(found) > 1
    if is_apart:
        marks += _mark_apart(study, apart, found)
    words = [f"{name}: {len(law.table)} runs." for name, law in found.items()]
    words += _find_out_of_reach(found, marks)
    words += [] if is_apart else [f"No differences: no surface of {baseline} and another."]
    words += [*without, _describe_band(study), *describe_lost(found)]
    words.append(describe_dropped(study.tables))
    if is_apart:
        words.append("Those of differences take each objective's runs apart; pairs say more.")
    return Picture(
        name="frontier_overlay",
        title="Frontiers of the objectives",
        caption=" ".join(filter(None, words)),
        panels=(loss, apart) if is_apart else (loss,),
        marks=tuple(marks),
        kinds={
            "found": "vertex with interval",
            "law": f"surface ({study.settings.approach})",
            "band": "its interval",
        },
    )


def _mark_apart(study: Study, panel: Panel, found: dict[str, SurfaceLaw]) -> list[Mark]:
    base = found[study.settings.baseline]
    largest = max(law.table.flops.max() for law in found.values())
    grid = spread(base.table.flops.min(), study.settings.reach * largest)
    rule = FlopsRule.of_table(base.table)
    below = rule.optimum(base.fit.surface, grid)[2]
    below_draws = _losses_of(rule, base.draws, grid)
    marks = panel.points("", "reference", grid[[0, -1]], [0, 0])
    for name, law in found.items():
        if law is base:
            continue
        rule = FlopsRule.of_table(law.table)
        line = rule.optimum(law.fit.surface, grid)[2] - below
        here = np.isfinite(line)
        marks += panel.points(name, "law", grid[here], line[here])
        draws = _losses_of(rule, law.draws, grid)
        count = min(len(draws), len(below_draws))
        # One seed gives both objectives the same resamples of lines: shifted, they are apart.
        drawn = draws[:count] - np.roll(below_draws[:count], 1, axis=0)
        low, high = tails(drawn, study.settings.level)
        here &= np.isfinite(low)
        ends = {"y_low": low[here], "y_high": high[here]}
        marks += panel.points(name, "band", grid[here], line[here], **ends)
    return marks


def draw_residuals(study: Study) -> Picture:
    """Return what surfaces miss, against N, D and what they foretell."""
    found, without = study.gather(study.surface)
    unit = next(iter(found.values())).fit.residual_unit
    misses = Axis(f"predicted - measured, {unit}")
    panels = (
        Panel("against size", SIZE, misses),
        Panel("against tokens", Axis("D, tokens", is_log=True), misses),
        Panel("against prediction", Axis("predicted loss, nats/token"), misses),
    )
    marks: list[Mark] = []
    words = []
    places: list[list[float]] = [[], [], []]
    for name, law in found.items():
        table, surface = law.table, law.fit.surface
        columns = (table.params, table.tokens, surface.loss(table.params, table.tokens))
        for panel, values, ends in zip(panels, columns, places, strict=True):
            marks += panel.points(name, "run", values, law.fit.residuals)
            ends += [values.min(), values.max()]
        size = float(np.sqrt(np.square(law.fit.residuals).mean()))
        words.append(f"{name}: {len(table)} runs, root mean square {size:.2g}.")
        words += [] if law.fit.converged else [f"{name}: the fit has not converged."]
        if law.fit.at_bound:
            words.append(f"{name}: on a bound: {', '.join(law.fit.at_bound)}.")
    for panel, ends in zip(panels, places, strict=True):
        marks += panel.points("", "reference", [min(ends), max(ends)], [0, 0])
    words += [*without, describe_dropped(study.tables)]
    return Picture(
        name="residuals",
        title=f"Residuals of the surface ({study.settings.approach})",
        caption=" ".join(filter(None, words)),
        panels=panels,
        marks=tuple(marks),
        kinds={"run": "run"},
    )
