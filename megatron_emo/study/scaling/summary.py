"""What a study found: its losses, best sizes, laws and comparison, as records and as a table.

python -m megatron_emo.study.scaling.summary --corpus wikitext --study study --laws laws \\
    --plan plan.json --output results
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_emo.evaluation.records import Interval, Record, hash_file, read_records
from megatron_emo.study.results import write_results
from megatron_emo.study.scaling.columns import has_budgets
from megatron_emo.study.scaling.laws import APPROACHES, COMPARISON, law_name

PARAMETERS = ("E", "alpha", "beta", "a")
_LAW_UNITS = {"E": "nats/token"}
_DEFINITIONS = {
    "E": "loss without limit of size and tokens, of E + A / N^alpha + B / D^beta",
    "alpha": "exponent of N in E + A / N^alpha + B / D^beta",
    "beta": "exponent of D in E + A / N^alpha + B / D^beta",
    "a": "exponent of N*(C)",
}
_RESOURCES = {"tokens": "tokens", "flops": "FLOPs", "hours": "measured hours"}


def read_rows(table: Path) -> list[dict]:
    """Return the rows of runs.csv, numbers as floats; budget is None where a row has none.

    Raises:
        ValueError: no rows, or cells that are no numbers.
    """
    numbers = ("params", "tokens", "flops", "flops_all", "gpu_hours", "loss")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"--study: {table}: expected runs, got none")
    try:
        return [
            {**row, **{name: float(row[name]) for name in numbers}}
            | {"budget": float(row["budget"]) if row["budget"] else None}
            for row in rows
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--study: {table}: expected numbers in budget, {', '.join(numbers)}: {error}"
        ) from error


def law_records(laws: Mapping[tuple[str, str], Mapping], corpus: str) -> Iterator[Record]:
    """Yield each law's parameters with their intervals."""
    for (objective, approach), law in laws.items():
        for name in PARAMETERS:
            if law.get(name) is None:
                continue
            yield Record(
                *(f"scaling_{name}", law[name], _LAW_UNITS.get(name, "1"), _DEFINITIONS[name]),
                law["n"],
                n_unit="runs",
                interval=_interval(law["intervals"].get(name)),
                settings={"converged": law["converged"], "at_bound": list(law["at_bound"])},
                labels=_labels(corpus, objective, approach=approach),
                data=law["csv"],
            )


def comparison_records(comparison: Mapping, corpus: str) -> Iterator[Record]:
    """Yield the mean paired difference and speedup of each objective, by resource."""
    baseline = comparison["baseline"]
    for found in comparison["objectives"]:
        labels = _labels(corpus, found["objective"], baseline=baseline)
        for kind, unit, what in (
            ("differences", "nats/token", "held-out loss minus the baseline's at equal {}"),
            ("speedups", "1", "times the {} the baseline needs for the same loss, by its own law"),
        ):
            for resource, estimate in found["overall"][kind].items():
                if estimate["value"] is None:
                    continue
                yield Record(
                    *(f"scaling_{kind[:-1]}_{resource}", estimate["value"], unit),
                    what.format(_RESOURCES[resource]) + ", mean over pairs of runs",
                    estimate["n"],
                    n_unit="pairs",
                    interval=_interval(estimate["interval"]),
                    labels=labels,
                    data=comparison["csv"],
                )


def _labels(corpus: str, objective: str, **more: str) -> dict[str, str]:
    return {"study": "scaling", "corpus": corpus, "objective": objective, **more}


def _interval(found: Mapping | None) -> Interval | None:
    return None if found is None else Interval(**found)


def format_page(
    corpus: str, rows: Sequence[Mapping], laws: Mapping, comparison: Mapping | None
) -> str:
    """Return the Markdown page: sentence, losses, best sizes, laws, what was refused."""
    lines = [f"# {corpus}", "", *_sentences(rows, comparison), ""]
    lines += [*(_losses if has_budgets(rows) else _runs)(rows), ""]
    lines += [*_optima(laws), "", *_laws(laws), ""]
    refused = {f"{o}, approach {a}": law["refused"] for (o, a), law in laws.items() if _is_no(law)}
    if comparison is not None and _is_no(comparison):
        refused["comparison"] = comparison["refused"]
    if refused:
        lines += ["## Refused", ""]
        lines += [f"- {what}: {' '.join(reason.split())}" for what, reason in refused.items()]
    return "\n".join(lines).rstrip() + "\n"


def _is_no(content: Mapping) -> bool:
    return isinstance(content.get("refused"), str)


def _sentences(rows: Sequence[Mapping], comparison: Mapping | None) -> list[str]:
    sizes = len({row["size"] for row in rows})
    hours = sum(row["gpu_hours"] for row in rows)
    lines = [
        f"{len(rows)} runs: {_spread(rows)} x {sizes} sizes x "
        f"{len({row['label'] for row in rows})} objectives; {hours:.2f} hours of steps on one "
        "core each."
    ]
    if comparison is None or _is_no(comparison):
        return lines
    level = comparison["level"]
    for found in comparison["objectives"]:
        # Those without a speedup count for what they do say, those without a law for nothing.
        lacking = "a law or a pair's speedup"
        failed = _failures(found["failed_draws"], comparison["draws"], lacking)
        parts = [
            f"{_show(found['overall']['differences'][name], '+.4f')} nats/token at equal {what}"
            for name, what in _RESOURCES.items()
            if name in found["overall"]["differences"]
        ]
        speedups = [
            f"{_show(found['overall']['speedups'][name], '.3f')} in {what}"
            for name, what in _RESOURCES.items()
            if name in found["overall"]["speedups"]
        ]
        lines += [
            "",
            f"**{found['objective']} against {comparison['baseline']}**, {found['n']} pairs, "
            f"{level:.0%} intervals: held-out loss {'; '.join(parts)}. Effective speedup "
            f"{'; '.join(speedups)}: below 1 it needs more than {comparison['baseline']} does."
            + (f" {failed}." if failed else ""),
        ]
    return lines


def _spread(rows: Sequence[Mapping]) -> str:
    what = "budget" if has_budgets(rows) else "tokens"
    values = {row[what] for row in rows}
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    if what == "tokens":
        return f"without budgets, {low} to {high} tokens"
    return f"{len(values)} budgets from {low} to {high} FLOPs"


def _failures(failures: Mapping[str, int], draws: int, lacking: str) -> str:
    """Return how many of the draws are without what is lacking, and why; "" where none is."""
    if not failures:
        return ""
    reasons = "; ".join(f"{count}: {' '.join(why.split())}" for why, count in failures.items())
    return f"{sum(failures.values())} of {draws} resamples without {lacking} ({reasons})"


def _show(estimate: Mapping, form: str) -> str:
    if estimate["value"] is None:
        return "unknown"
    interval = estimate["interval"]
    spread = f" [{interval['low']:{form}}, {interval['high']:{form}}]" if interval else ""
    return f"{estimate['value']:{form}}{spread}"


def _losses(rows: Sequence[Mapping]) -> list[str]:
    """A row a size and objective, a column a budget; means over seeds."""
    budgets = sorted({row["budget"] for row in rows})
    keys = sorted({(row["params"], row["size"]) for row in rows})
    lines = ["## Held-out loss, nats/token; the best size of a budget is bold", ""]
    lines += ["| size | N | | " + " | ".join(f"{budget:.2g}" for budget in budgets) + " |"]
    lines += ["|---|---|---|" + "---|" * len(budgets)]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    means = {
        (params, label, budget): _mean_loss(rows, params, label, budget)
        for params, _ in keys
        for label in labels
        for budget in budgets
    }
    for params, size in keys:
        for label in labels:
            cells = []
            for budget in budgets:
                value = means[params, label, budget]
                others = [means[p, label, budget] for p, _ in keys]
                best = min((other for other in others if other is not None), default=None)
                text = "" if value is None else f"{value:.4f}"
                cells.append(f"**{text}**" if text and value == best else text)
            lines.append(f"| {size} | {params:,.0f} | {label} | {' | '.join(cells)} |")
    return lines


def _runs(rows: Sequence[Mapping]) -> list[str]:
    """A row a size, objective and number of tokens, of runs without budgets; means over seeds."""
    lines = ["## Held-out loss, nats/token", "", "| size | N | | D | D/N | loss |"]
    lines += ["|---|---|---|---|---|---|"]
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        key = (row["params"], row["size"], row["tokens"], row["label"])
        groups.setdefault(key, []).append(row["loss"])
    for (params, size, tokens, label), losses in sorted(groups.items(), key=lambda g: g[0][:3]):
        cells = (f"{params:,.0f}", label, f"{tokens:,.0f}", f"{tokens / params:.3g}")
        lines.append(f"| {size} | {' | '.join(cells)} | {sum(losses) / len(losses):.4f} |")
    return lines


def _mean_loss(rows: Sequence[Mapping], params: float, label: str, budget: float) -> float | None:
    here = [
        row["loss"]
        for row in rows
        if (row["params"], row["label"], row["budget"]) == (params, label, budget)
    ]
    return sum(here) / len(here) if here else None


def _optima(laws: Mapping) -> list[str]:
    found = {re.findall(r"(?:^|,)flops=([^,]*)", law["columns"])[0] for law in _fitted(laws)}
    of = f", C is {' or '.join(sorted(found))} of runs.csv" if found else ""
    lines = [f"## Best sizes (approach 2){of}", "", "| objective | C | N* | D* | D*/N* |"]
    lines += ["|---|---|---|---|---|"]
    for (objective, approach), law in laws.items():
        if approach != "2" or not law.get("frontier"):
            continue
        optima = law["frontier"]["optima"]
        for flops, params, tokens in zip(
            optima["flops"], optima["params"], optima["tokens"], strict=True
        ):
            ratio = tokens / params
            lines.append(
                f"| {objective} | {flops:.3g} | {params:.3g} | {tokens:.3g} | {ratio:.3g} |"
            )
    return lines


def _laws(laws: Mapping) -> list[str]:
    head = " | ".join(PARAMETERS)
    levels = {found["level"] for law in _fitted(laws) for found in law["intervals"].values()}
    of = " and ".join(f"{level:.0%}" for level in sorted(levels))
    lines = [
        f"## Laws{of and f', {of} intervals'}",
        "",
        f"| objective | approach | {head} | n | largest budget left out |",
    ]
    lines += ["|---|---|" + "---|" * (len(PARAMETERS) + 2)]
    for (objective, approach), law in laws.items():
        if _is_no(law):
            continue
        cells = [
            _show({"value": law[name], "interval": law["intervals"].get(name)}, ".3f")
            if law[name] is not None
            else ""
            for name in PARAMETERS
        ]
        cells += [str(law["n"]), _held_out(law["leave_largest_out"])]
        lines.append(f"| {objective} | {approach} | {' | '.join(cells)} |")
    for (objective, approach), law in laws.items():
        bootstrap = None if _is_no(law) else law["bootstrap"]
        if bootstrap and bootstrap["failures"]:
            failed = _failures(bootstrap["failures"], bootstrap["draws"], "a law")
            lines += ["", f"{objective}, approach {approach}: {failed}."]
    return lines


def _fitted(laws: Mapping) -> list[Mapping]:
    return [law for law in laws.values() if not _is_no(law)]


def _held_out(found: Mapping) -> str:
    if "rms_error" in found:
        return f"{found['rms_error']:.4f} nats/token rms"
    if "log_ratio" in found:
        return f"N* off by {found['log_ratio']:+.2f} (log)"
    return found.get("reason", "")


def write_summary(
    corpus: str, study: Path, laws_dir: Path, output: Path, plan: Path | None = None
) -> str:
    """Write table.md, summary.json, records.json, runs.csv and plan.json; return the page.

    Raises:
        ValueError, FileNotFoundError: runs, scores or laws that are not there.
    """
    table = study / "runs.csv"
    rows = read_rows(table)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    laws = {
        (label, approach): _read(laws_dir / law_name(label, approach))
        for label in labels
        for approach in APPROACHES
    }
    path = laws_dir / COMPARISON
    comparison = _read(path) if path.exists() else None
    for law in (*laws.values(), *([comparison] if comparison else [])):
        if not _is_no(law) and law["csv"] != {table.name: hash_file(table)}:
            raise ValueError(f"--laws {laws_dir}: expected laws of {table}, got those of another")
    fitted = {key: law for key, law in laws.items() if not _is_no(law)}
    summary = list(law_records(fitted, corpus))
    if comparison is not None and not _is_no(comparison):
        summary += comparison_records(comparison, corpus)
    page = format_page(corpus, rows, laws, comparison)
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(table, output / table.name)
    if plan is not None:
        shutil.copyfile(plan, output / plan.name)
    scores = read_records([study / "runs" / row["name"] / "score.json" for row in rows])
    write_results(output, scores, summary, page)
    return page


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Write the results and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", required=True, metavar="NAME", help="kept with each record")
    add("--study", type=Path, required=True, metavar="DIR", help="with runs.csv and runs/")
    add("--laws", type=Path, required=True, metavar="DIR", help="of laws.py")
    add("--plan", type=Path, metavar="FILE", help="JSON of `plan`, copied beside the table")
    add("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        print(write_summary(args.corpus, args.study, args.laws, args.output, args.plan))
    except (ValueError, OSError) as error:
        raise SystemExit(f"summary: {error}") from error


if __name__ == "__main__":
    main()
