"""What the runs show: means over seeds as records, as tables in Markdown, and in a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_emo.evaluation.oracle.languages import LanguageSpec
from megatron_emo.evaluation.oracle.measures import SMOOTHING, jensen_shannon
from megatron_emo.evaluation.oracle.optimum import find_optimum
from megatron_emo.evaluation.oracle.study import Run, StudyConfig
from megatron_emo.evaluation.oracle.variants import Variant, build_variants
from megatron_emo.evaluation.records import Interval, Record, provenance, write_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFINITIONS = {
    "avg_js": ("nats", "MixCE avg_js: mean row Jensen-Shannon divergence from the truth"),
    "forward_kl": ("nats", "mean row KL(truth || model)"),
    "reverse_kl_support": (
        "nats",
        "mean row KL(model || truth), the model restricted to the truth's support and renormalised",
    ),
    "reverse_kl_smoothed": (
        "nats",
        f"mean row KL(model || truth + {SMOOTHING:g}, renormalised)",
    ),
    "leaked_mass": ("1", "mean row probability of what the truth cannot emit"),
    "avg_0s": ("1", "MixCE avg_0s: mean model probability where the truth is 0"),
    "tvd": ("1", "mean row total variation distance from the truth"),
    "entropy_gap": ("nats", "mean row entropy of the model less that of the truth"),
    "dev_js": ("nats", "mean row Jensen-Shannon divergence from the dev data's frequencies"),
    "visited_avg_js": ("nats", "avg_js, rows weighted by the truth's expected visits"),
    "visited_forward_kl": ("nats", "forward_kl, rows weighted by the truth's expected visits"),
    "visited_leaked_mass": ("1", "leaked_mass, rows weighted by the truth's expected visits"),
    "optimum_avg_js": (
        "nats",
        "avg_js of the stationary point of the expected gradient, found without training",
    ),
}
"""Metric: unit and definition, of what is kept as records."""

COLUMNS = {
    "avg_js": "JS",
    "forward_kl": "forward KL",
    "reverse_kl_support": "reverse KL on support",
    "leaked_mass": "leaked mass",
    "avg_0s": "avg_0s",
    "tvd": "TVD",
    "entropy_gap": "entropy - truth's",
    "optimum_avg_js": "JS at its optimum",
}


@dataclass(frozen=True)
class Cell:
    """The runs of one variant on one language, over seeds."""

    language: str
    objective: str
    cost: str
    weight: str
    is_default: bool
    values: Mapping[str, Mapping[int, float]]
    """Metric -> seed -> value."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric].values())

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds, 0 of one."""
        values = list(self.values[metric].values())
        return statistics.stdev(values) if len(values) > 1 else 0.0


def gather_cells(runs: Sequence[Run], text: str | None) -> list[Cell]:
    """Return the cells in the order of their first runs, with the optimum where there is one."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.language, run.objective, run.cost, run.weight), []).append(run)
    cells = []
    for (language, objective, cost, weight), group in groups.items():
        values = {
            name: {run.seed: run.measures[name] for run in group} for name in group[0].measures
        }
        if cost != "output-layer":
            values |= _optimum_of(group, text)
        cells.append(Cell(language, objective, cost, weight, group[0].is_default, values))
    return cells


def _optimum_of(group: Sequence[Run], text: str | None) -> dict[str, dict[int, float]]:
    first = group[0]
    variants: list[Variant] = build_variants([first.objective])
    key = (first.objective, first.cost, first.weight)
    objective = next(one for one in variants if one.key == key).build()
    found = {}
    for run in group:
        p = LanguageSpec.parse(run.language).build(run.seed, text).rows
        try:
            # Rounding leaves MLE's, which is 0, on either side of it.
            found[run.seed] = max(0.0, float(jensen_shannon(p, find_optimum(p, objective)).mean()))
        except ValueError:
            return {}
    return {"optimum_avg_js": found}


def choose_by_dev(cells: Sequence[Cell]) -> list[Cell]:
    """Return, for each language, objective and cost, the weight of least mean dev_js."""
    best: dict[tuple, Cell] = {}
    for cell in cells:
        key = (cell.language, cell.objective, cell.cost)
        if key not in best or cell.mean("dev_js") < best[key].mean("dev_js"):
            best[key] = cell
    return list(best.values())


def make_records(cells: Sequence[Cell], config: StudyConfig) -> list[Record]:
    """Return the means over seeds of the cells that tables choose: by dev data, and released."""
    text_sha256 = config.to_json()["text_sha256"]
    recipe = {
        "num_train": config.num_train,
        "max_epochs": config.training.max_epochs,
        "stop_by": config.training.stop_by,
    }
    origin = {name: provenance()[name] for name in ("commit", "date", "command")}
    chosen = choose_by_dev(cells)
    records = []
    for cell in cells:
        if not (cell.is_default or cell in chosen):
            continue
        name, _, width = cell.language.partition("@")
        kind, vocabulary = name.split(":")
        labels = {
            "objective": cell.objective,
            "cost": cell.cost,
            "weight": cell.weight,
            "language": kind,
            "vocabulary": vocabulary,
            "hidden_size": width or "50",
            "released": "yes" if cell.is_default else "no",
            "chosen": "yes" if cell in chosen else "no",
        }
        data = {Path(config.text).name: text_sha256} if kind == "corpus" else {}
        shared = {"labels": labels, "data": data, "provenance": origin}
        records += [
            _make_record(cell, metric, recipe, shared)
            for metric in DEFINITIONS
            if metric in cell.values
        ]
    return records


def _make_record(cell: Cell, metric: str, recipe: Mapping, shared: Mapping) -> Record:
    unit, definition = DEFINITIONS[metric]
    per_seed = {str(seed): value for seed, value in cell.values[metric].items()}
    return Record(
        metric,
        cell.mean(metric),
        unit,
        definition,
        n=len(per_seed),
        n_unit="seeds",
        interval=Interval(min(per_seed.values()), max(per_seed.values()), 1.0, "range"),
        settings={"per_seed": per_seed, "sd": cell.spread(metric), **recipe},
        **shared,
    )


def format_report(cells: Sequence[Cell]) -> str:
    """Return the tables: for each language weights chosen on dev data, released ones, and all."""
    chosen = choose_by_dev(cells)
    parts = [
        "Mean ± standard deviation over seeds; rows weighted equally; KL, JS and entropy in nats. "
        "JS over MLE's: mean of the seeds' ratios, and in how many seeds it is below 1."
    ]
    for language in dict.fromkeys(cell.language for cell in cells):
        ours = [cell for cell in cells if cell.language == language]
        picked = [cell for cell in ours if cell in chosen]
        defaults = [cell for cell in ours if cell.is_default]
        parts += [
            f"## {language}",
            "Weight of least JS from the dev data's frequencies, the truth unseen:",
            _format_table(picked, ours),
            "Released weights, nothing chosen:",
            _format_table(defaults, ours),
            "Every weight:",
            _format_table(ours, ours),
        ]
    return "\n\n".join(parts) + "\n"


def _format_table(cells: Sequence[Cell], language_cells: Sequence[Cell]) -> str:
    mle = next(cell for cell in language_cells if cell.objective == "mle")
    columns = [name for name in COLUMNS if any(name in cell.values for cell in cells)]
    head = ["objective", "cost", "weight", "JS over MLE's", *(COLUMNS[name] for name in columns)]
    rows = [
        [cell.objective, cell.cost, cell.weight, _against(cell, mle)]
        + [_format_value(cell, name) for name in columns]
        for cell in cells
    ]
    rule = ["---"] * 3 + ["---:"] * (len(head) - 3)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _against(cell: Cell, mle: Cell) -> str:
    if cell.objective == "mle":
        return "-"
    pairs = [(value, mle.values["avg_js"][seed]) for seed, value in cell.values["avg_js"].items()]
    ratio = statistics.fmean(value / other for value, other in pairs)
    return f"{ratio:.3g} ({sum(value < other for value, other in pairs)}/{len(pairs)})"


def _format_value(cell: Cell, metric: str) -> str:
    if metric not in cell.values:
        return "-"
    if metric == "optimum_avg_js":
        return f"{round(cell.mean(metric), 12):.3g}"
    return f"{cell.mean(metric):.3g} ± {cell.spread(metric):.1g}"


def draw_plane(cells: Sequence[Cell], output: Path) -> None:
    """Draw a panel for each language: missed mass to the right, invented mass upwards.

    Forward KL against leaked mass, or against reverse KL where the truth has no zeros. Small points
    are weights that were tried, large ones the released weights, bars a standard deviation. emo
    alone is left out: it lies so far off that the rest would be one point.
    """
    from matplotlib.figure import Figure

    cells = [cell for cell in cells if cell.objective != "emo"]
    languages = list(dict.fromkeys(cell.language for cell in cells))
    columns = min(2, len(languages))
    rows = -(-len(languages) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.8, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, language in zip(panels, languages, strict=False):
        _draw_panel(panel, [cell for cell in cells if cell.language == language])
    for panel in panels[len(languages) :]:
        panel.set_axis_off()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    figure.savefig(output, dpi=100)


def _draw_panel(panel: Axes, cells: Sequence[Cell]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    objectives = list(dict.fromkeys(cell.objective for cell in cells))
    markers = {"none": "o", "identity": "s", "output-layer": "^"}
    height = "leaked_mass" if any(cell.mean("leaked_mass") for cell in cells) else None
    height = height or "reverse_kl_support"
    for cell in cells:
        name = cell.objective if cell.cost == "none" else f"{cell.objective}, {cell.cost} cost"
        panel.errorbar(
            cell.mean("forward_kl"),
            cell.mean(height),
            xerr=cell.spread("forward_kl"),
            yerr=cell.spread(height),
            fmt=markers[cell.cost],
            color=f"C{objectives.index(cell.objective)}",
            markeredgecolor="black" if cell.is_default else "none",
            markersize=11 if cell.objective == "mle" else 8 if cell.is_default else 4,
            elinewidth=0.6,
            label=name if cell.is_default else None,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    panel.set_title(cells[0].language)
    panel.set_xlabel("forward KL (nats): what is missed")
    panel.set_ylabel(f"{COLUMNS[height]}: what is invented")
    panel.grid(alpha=0.3)


def write_report(runs: Sequence[Run], config: StudyConfig, folder: Path) -> str:
    """Write records-LANGUAGE.json, table.md and plane.png into `folder`; return the tables."""
    cells = gather_cells(runs, config.text)
    for language in dict.fromkeys(cell.language for cell in cells):
        ours = [cell for cell in cells if cell.language == language]
        name = language.replace(":", "-").replace("@", "-h")
        write_records(folder / f"records-{name}.json", make_records(ours, config))
    table = format_report(cells)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw_plane(cells, folder / "plane.png")
    cpu = sum(run.cpu_seconds for run in runs) / 60
    return f"{table}\n{len(runs)} runs, {cpu:.1f} CPU minutes; records, table, figure: {folder}"
