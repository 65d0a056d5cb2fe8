"""Pictures of pairs: what another objective changes at equal resource, and what it saves."""

from __future__ import annotations

import numpy as np

from megatron_emo.scaling.comparison.compare import Comparison, Estimate
from megatron_emo.scaling.comparison.speedup import pair_differences, pair_speedups
from megatron_emo.scaling.pictures.isoflop import FLOPS
from megatron_emo.scaling.pictures.picture import Axis, Mark, Panel, Picture
from megatron_emo.scaling.pictures.study import Study, describe_draws, describe_dropped

_NAMES = {"tokens": "tokens", "flops": "FLOPs", "hours": "GPU-hours"}


def draw_differences(study: Study) -> Picture:
    """Return the paired difference of losses against C, a panel for each resource held equal."""
    found, without = _compare_all(study)
    resources = list(next(iter(found.values())).overall.differences)
    axis = Axis(f"loss minus that of {study.settings.baseline}, nats/token")
    panels = {r: Panel(f"at equal {_NAMES[r]}", FLOPS, axis) for r in resources}
    marks: list[Mark] = []
    for name, one in found.items():
        values = pair_differences(one.pairs, one.law)
        for resource, panel in panels.items():
            marks += _mark_pairs(panel, name, one, values[resource])
            marks += _mark_groups(panel, name, one, "differences", resource)
    marks += _mark_reference(panels, found, 0.0)
    words = []
    for name, one in found.items():
        shown = [
            f"{_say(one.overall.differences[r], '{:+.4f}')} at equal {_NAMES[r]}" for r in resources
        ]
        words.append(f"{name}, {len(one.pairs)} pairs: {', '.join(shown)}.")
    return Picture(
        name="loss_difference",
        title=f"Loss against {study.settings.baseline}, pairs of runs",
        caption=" ".join([*words, *_common_words(study, found, without)]),
        panels=tuple(panels.values()),
        marks=tuple(marks),
        kinds={"run": "pair", "found": "mean of a budget with interval"},
        shares_axes=True,
    )


def draw_speedups(study: Study) -> Picture:
    """Return the effective speedup against C, a panel for each resource, with its trend."""
    found, without = _compare_all(study)
    resources = list(next(iter(found.values())).overall.speedups)
    panels = {
        r: Panel(f"in {_NAMES[r]}", FLOPS, Axis("effective speedup", is_log=True))
        for r in resources
    }
    marks: list[Mark] = []
    words = []
    for name, one in found.items():
        values = pair_speedups(one.pairs, one.law)
        for resource, panel in panels.items():
            here = np.isfinite(values[resource])
            marks += _mark_pairs(panel, name, one, values[resource], here)
            marks += _mark_groups(panel, name, one, "speedups", resource)
        for trend in one.trends:
            flops, value, ends = zip(*trend.at, strict=True)
            band = {"y_low": [e.low for e in ends], "y_high": [e.high for e in ends]}
            marks += panels[trend.resource].points(name, "law", flops, value)
            marks += panels[trend.resource].points(name, "band", flops, value, **band)
        shown = [f"{_say(one.overall.speedups[r], '{:.3f}')} in {_NAMES[r]}" for r in resources]
        words.append(f"{name}, {len(one.pairs)} pairs: {', '.join(shown)}.")
        if one.undefined:
            words.append(f"{len(one.undefined)} pairs without: a loss not above its size's floor.")
    marks += _mark_reference(panels, found, 1.0)
    return Picture(
        name="speedup",
        title=f"How many times the resource {study.settings.baseline} would need",
        caption=" ".join([*words, *_common_words(study, found, without)]),
        panels=tuple(panels.values()),
        marks=tuple(marks),
        kinds={
            "run": "pair",
            "found": "mean of a budget with interval",
            "law": "trend over cells",
            "band": "its interval",
        },
        shares_axes=True,
    )


def _compare_all(study: Study) -> tuple[dict[str, Comparison], list[str]]:
    if len(study.tables) < 2 or study.runs is None:
        raise ValueError(study.no_pairs)
    return study.gather(study.comparison, study.others)


def _mark_pairs(
    panel: Panel, name: str, one: Comparison, values: np.ndarray, here: np.ndarray | None = None
) -> list[Mark]:
    here = np.isfinite(values) if here is None else here
    return panel.points(name, "run", one.pairs.base.flops[here], values[here])


def _mark_groups(panel: Panel, name: str, one: Comparison, what: str, resource: str) -> list[Mark]:
    marks = []
    for group in one.budgets:
        found: Estimate = getattr(group, what)[resource]
        if found.value is None:
            continue
        ends = found.interval
        low, high = (ends.low, ends.high) if ends else (np.nan, np.nan)
        marks += panel.points(
            name, "found", [group.flops], [found.value], y_low=[low], y_high=[high]
        )
    return marks


def _mark_reference(panels: dict[str, Panel], found: dict, level: float) -> list[Mark]:
    flops = np.concatenate([one.pairs.base.flops for one in found.values()])
    ends = [flops.min(), flops.max()]
    return [
        mark
        for panel in panels.values()
        for mark in panel.points("", "reference", ends, [level] * 2)
    ]


def _say(found: Estimate, form: str) -> str:
    if found.value is None:
        return "no value"
    if found.interval is None:
        return form.format(found.value)
    low, high = (form.format(end) for end in (found.interval.low, found.interval.high))
    return f"{form.format(found.value)} [{low}, {high}]"


def _common_words(study: Study, found: dict[str, Comparison], without: list[str]) -> list[str]:
    words = [f"{study.settings.level:.0%} intervals.", *describe_draws(found)]
    # All are compared on the law of one baseline.
    words += dict.fromkeys(f"{doubt}." for one in found.values() for doubt in one.doubts)
    for name, one in found.items():
        if one.pairs.unpaired:
            words.append(f"{name}: {len(one.pairs.unpaired)} runs without a partner are left out.")
    hours = next((note for note in study.notes if note.startswith("without hours")), "")
    words += [f"No panel of GPU-hours: {hours.partition(': ')[2]}."] if hours else []
    return [*words, *without, *filter(None, [describe_dropped(study.tables)])]
