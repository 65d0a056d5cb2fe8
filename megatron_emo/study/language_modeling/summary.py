"""All cells' records in one file, their means over seeds, and a table of them with verdicts.

python -m megatron_emo.study.language_modeling.summary --cells lm/cells --output lm/results
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_emo.evaluation.perplexity import ratio_interval
from megatron_emo.evaluation.records import Interval, Record, read_records
from megatron_emo.evaluation.rows import read_rows
from megatron_emo.study.language_modeling.sizes import OBJECTIVES
from megatron_emo.study.results import run_summary, write_results

CONTROL = "mle"
ORDER = ("base", *OBJECTIVES)
DIFFERENCE = "cross_entropy_difference"


@dataclass(frozen=True)
class Column:
    """One of the table's."""

    title: str
    metric: str
    decoding: str | None = None
    digits: int = 3
    best: str | None = None
    """min or max, where one is better than the other."""


QUALITY = (
    Column("test PPL", "token_perplexity", digits=1, best="min"),
    Column("nats/token - mle", DIFFERENCE, digits=4),
    Column("MAUVE", "mauve", "unbiased", best="max"),
    Column("MAUVE, matched entropy", "mauve", "matched", best="max"),
    Column("MAUVE, greedy", "mauve", "greedy", best="max"),
)
SHARPNESS = (
    Column("entropy of q", "entropy_before"),
    Column("T to match", "matched_temperature"),
    Column("top-1 mass", "generation_top1_mass", "unbiased"),
    Column("diversity", "diversity", "unbiased"),
    Column("diversity, matched", "diversity", "matched"),
    Column("diversity, greedy", "diversity", "greedy"),
)

Key = tuple[str, str, str, str | None]
"""domain, objective, metric, decoding"""


def group_records(records: Sequence[Record]) -> dict[Key, dict[str, Record]]:
    """Return {(domain, objective, metric, decoding): {seed: record}}.

    Raises:
        ValueError: two records of the same measurement.
    """
    groups: dict[Key, dict[str, Record]] = defaultdict(dict)
    for record in records:
        labels = record.labels
        key = (labels["domain"], labels["objective"], record.metric, labels.get("decoding"))
        if labels["seed"] in groups[key]:
            raise ValueError(f"{' '.join(map(str, key))} seed {labels['seed']}: found twice")
        groups[key][labels["seed"]] = record
    return dict(groups)


def summarise(group: Mapping[str, Record]) -> Record:
    """Return the mean over seeds; the interval is their range."""
    first = next(iter(group.values()))
    values = {seed: record.value for seed, record in sorted(group.items())}
    labels = {name: value for name, value in first.labels.items() if name != "seed"}
    several = len(values) > 1
    kept = ("num_clusters", "mode", "window", "stride", "max_new_tokens", "texts", "prompts")
    settings = {name: first.settings[name] for name in kept if name in first.settings}
    settings |= {"values": values, "n": first.n, "n_unit": first.n_unit}
    if several:
        settings["standard_deviation"] = statistics.stdev(values.values())
    return replace(
        first,
        value=statistics.fmean(values.values()),
        definition=f"{first.definition}; mean over training seeds",
        n=len(values),
        n_unit="seeds",
        seed=None,
        interval=Interval(min(values.values()), max(values.values()), 1.0, "range")
        if several
        else None,
        settings=settings,
        labels=labels,
        model=None,
        model_sha256=None,
        seconds=sum(record.seconds or 0.0 for record in group.values()),
    )


def compare_with_control(cells: Path, domain: str, objective: str, draws: int = 1000) -> Record:
    """Return the mean over seeds of the nats per token above the control's of the same seed.

    Documents are paired, and are what the interval resamples; seeds are not.

    Raises:
        ValueError: other documents than the control's, or no seed in common.
    """
    nats, tokens, seeds = [], None, []
    for path in sorted((cells / domain / objective).glob("seed*/documents.jsonl")):
        other = cells / domain / CONTROL / path.parent.name / path.name
        if not other.exists():
            continue
        ours, theirs = read_rows(path), read_rows(other)
        if [row["sha256"] for row in ours] != [row["sha256"] for row in theirs]:
            raise ValueError(f"{path}: expected the documents of {other}")
        nats.append([a["nats"] - b["nats"] for a, b in zip(ours, theirs, strict=True)])
        tokens = np.array([row["tokens"] for row in ours], dtype=np.float64)
        seeds.append(path.parent.name.removeprefix("seed"))
    if not nats:
        raise ValueError(f"{cells / domain / objective}: no seed in common with {CONTROL}")
    difference = np.mean(nats, axis=0)
    values = {seed: sum(row) / tokens.sum() for seed, row in zip(seeds, nats, strict=True)}
    return Record(
        *(DIFFERENCE, float(difference.sum() / tokens.sum()), "nats/token"),
        f"(nats - nats of {CONTROL}) / tokens, paired by document, mean over training seeds",
        len(seeds),
        n_unit="seeds",
        interval=ratio_interval(difference, tokens, draws),
        settings={"values": values, "documents": len(tokens), "resampled": "documents"},
        labels={"study": "language_modeling", "domain": domain, "objective": objective},
    )


def summarise_all(records: Sequence[Record], cells: Path) -> dict[Key, Record]:
    """Return the means of all groups, and each objective's difference from the control."""
    found = {key: summarise(group) for key, group in group_records(records).items()}
    for domain, objective in sorted({key[:2] for key in found}):
        if objective != CONTROL:
            record = compare_with_control(cells, domain, objective)
            found[domain, objective, DIFFERENCE, None] = record
    return found


def format_report(found: Mapping[Key, Record]) -> str:
    """Return the Markdown page: for each domain two tables and its winners, then a count."""
    domains = sorted({key[0] for key in found})
    lines = [
        "Mean over training seeds and their standard deviation; bold is the best mean of a column "
        "where the objectives differ in quality (the untouched base counts too). The difference to "
        "mle has the 95% interval of resampled test documents. MAUVE is the mean of several "
        "clusterings a seed.",
        "",
    ]
    for domain in domains:
        lines += [f"## {domain}", "", *_table(found, domain, QUALITY), ""]
        lines += [*_table(found, domain, SHARPNESS), "", *_verdicts(found, domain), ""]
    lines += ["## Better and worse than mle in every seed", "", *_count(found, domains), ""]
    return "\n".join(lines)


def _objectives(found: Mapping[Key, Record], domain: str) -> list[str]:
    return [name for name in ORDER if any(key[:2] == (domain, name) for key in found)]


def _best(found: Mapping[Key, Record], domain: str, column: Column) -> str | None:
    rows = {
        name: found[domain, name, column.metric, column.decoding].value
        for name in _objectives(found, domain)
        if (domain, name, column.metric, column.decoding) in found
    }
    if not rows or column.best is None:
        return None
    return (min if column.best == "min" else max)(rows, key=rows.__getitem__)


def _table(found: Mapping[Key, Record], domain: str, columns: Sequence[Column]) -> list[str]:
    lines = [
        "| | " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    best = [_best(found, domain, column) for column in columns]
    for name in _objectives(found, domain):
        cells = [
            _cell(found.get((domain, name, column.metric, column.decoding)), column, name == leader)
            for column, leader in zip(columns, best, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(record: Record | None, column: Column, is_best: bool) -> str:
    if record is None:
        return ""
    digits = column.digits
    if column.metric == DIFFERENCE:
        interval = record.interval
        spread = f" [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]" if interval else ""
        return f"{record.value:+.{digits}f}{spread}"
    deviation = record.settings.get("standard_deviation")
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    text = f"{record.value:.{digits}f}"
    return (f"**{text}**" if is_best else text) + spread


def _verdicts(found: Mapping[Key, Record], domain: str) -> list[str]:
    """Who is best in each column, and how it stands to the control seed by seed."""
    lines = []
    for column in QUALITY:
        best = _best(found, domain, column)
        if best is None:
            continue
        if best == CONTROL:
            lines.append(f"- {column.title}: {CONTROL} is best.")
            continue
        differences = _differences(found, domain, best, column)
        shown = ", ".join(f"{value:+.{column.digits}f}" for value in differences)
        lines.append(f"- {column.title}: {best} is best; {best} - {CONTROL} by seed: {shown}.")
    return lines


def _differences(
    found: Mapping[Key, Record], domain: str, name: str, column: Column
) -> list[float]:
    ours = found.get((domain, name, column.metric, column.decoding))
    theirs = found.get((domain, CONTROL, column.metric, column.decoding))
    if ours is None or theirs is None:
        return []
    ours, theirs = ours.settings["values"], theirs.settings["values"]
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]


def _count(found: Mapping[Key, Record], domains: Sequence[str]) -> list[str]:
    """Domains in which all seeds agree, for each objective and column."""
    columns = [column for column in QUALITY if column.best]
    lines = [
        "Number of domains where every seed is better / every seed is worse, of "
        f"{len(domains)}; the rest are undecided.",
        "",
        "| | " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    trained = {key[1] for key in found if key[1] in OBJECTIVES and key[1] != CONTROL}
    for name in sorted(trained, key=ORDER.index):
        cells = []
        for column in columns:
            sign = -1.0 if column.best == "min" else 1.0
            rows = [_differences(found, domain, name, column) for domain in domains]
            rows = [[sign * value for value in row] for row in rows if row]
            better = sum(all(value > 0 for value in row) for row in rows)
            worse = sum(all(value < 0 for value in row) for row in rows)
            cells.append(f"{better} / {worse}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write_summary(cells: Path, output: Path) -> str:
    """Write records.json, summary.json and table.md to `output`; return the table.

    Raises:
        ValueError: no records, or cells that do not fit together.
    """
    files = sorted(cells.glob("*/*/seed*/records.json"))
    if not files:
        raise ValueError(f"{cells}: expected cells that are evaluated, found none")
    records = read_records(files)
    found = summarise_all(records, cells)
    report = format_report(found)
    write_results(output, records, [found[key] for key in sorted(found, key=str)], report)
    return report


if __name__ == "__main__":
    run_summary(__doc__, write_summary)
