"""All models' records in one file, their differences on the same questions, and a table of them.

python -m megatron_emo.study.calibration.summary --cells runs/calibration/cells --output results
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_emo.evaluation.records import Interval, Record, read_records
from megatron_emo.study.calibration.paired import compare_answers, compare_nats
from megatron_emo.study.calibration.plan import UNTOUCHED
from megatron_emo.study.language_modeling.sizes import OBJECTIVES
from megatron_emo.study.results import run_summary, write_results

CONTROL = "mle"
HEADINGS = {
    "ppl": "Accuracy in %, answers by whole-prompt perplexity (the paper's rule)",
    "label": "Accuracy in %, answers by the label's log-probability",
    "label-mean": "Accuracy in %, answers by the label's log-probability per token",
}


@dataclass(frozen=True)
class Found:
    """What the models' folders hold; files are named by what is measured."""

    cells: Path
    records: list[Record]

    def objectives(self) -> list[str]:
        """Those with records, the untouched model first."""
        known = {record.labels["objective"] for record in self.records}
        return [name for name in (UNTOUCHED, *OBJECTIVES) if name in known]

    def values(self, label: str) -> list[str]:
        """The values of a label, in the order of their records."""
        names = (record.labels.get(label) for record in self.records)
        return list(dict.fromkeys(name for name in names if name))

    def select(self, metric: str, objective: str, **labels: str) -> dict[str, Record]:
        """Return {seed: record}; the untouched model's seed is ''."""
        wanted = {"objective": objective, **labels}
        return {
            record.labels.get("seed", ""): record
            for record in self.records
            if record.metric == metric and wanted.items() <= record.labels.items()
        }

    def pairs(self, a: str, b: str, measured: str) -> dict[str, tuple[Path, Path]]:
        """Return {seed: files of both}; the untouched model stands beside every seed."""
        ours, theirs = self._files(a, measured), self._files(b, measured)
        if "" in theirs:
            return {seed: (path, theirs[""]) for seed, path in ours.items()}
        return {seed: (ours[seed], theirs[seed]) for seed in ours if seed in theirs}

    def _files(self, objective: str, measured: str) -> dict[str, Path]:
        if objective == UNTOUCHED:
            paths = {"": self.cells / UNTOUCHED / "answers" / f"{measured}.jsonl"}
        else:
            found = sorted((self.cells / objective).glob(f"seed*/answers/{measured}.jsonl"))
            paths = {path.parts[-3].removeprefix("seed"): path for path in found}
        return {seed: path for seed, path in paths.items() if path.exists()}


def compare_all(found: Found) -> list[Record]:
    """Return the differences of each trained model from the untouched one, and from the control."""
    trained = [name for name in found.objectives() if name != UNTOUCHED]
    contrasts = [(name, CONTROL) for name in trained if name != CONTROL]
    contrasts += [(name, UNTOUCHED) for name in trained]
    records = []
    for a, b in contrasts:
        labels = {"study": "calibration", "objective": a, "minus": b}
        for task in found.values("task"):
            if pairs := found.pairs(a, b, task):
                shared = {**labels, "task": task}
                scorings = found.values("scoring")
                records += [compare_answers(pairs, scoring, shared) for scoring in scorings]
        for text in found.values("text"):
            if pairs := found.pairs(a, b, text):
                records.append(compare_nats(pairs, {**labels, "text": text}))
    return records


def average(group: dict[str, Record]) -> Record:
    """Return the mean over seeds with their range, or the only record."""
    records = list(group.values())
    if len(records) == 1:
        return records[0]
    values = {seed: record.value for seed, record in sorted(group.items())}
    first = records[0]
    return replace(
        first,
        value=statistics.fmean(values.values()),
        definition=f"{first.definition}; mean over training seeds",
        n=len(values),
        n_unit="seeds",
        seed=None,
        interval=Interval(min(values.values()), max(values.values()), 1.0, "range"),
        settings={"values": values, "n": first.n, "n_unit": first.n_unit},
        labels={name: value for name, value in first.labels.items() if name != "seed"},
        model=None,
        model_sha256=None,
        seconds=sum(record.seconds or 0.0 for record in records),
    )


def format_report(found: Found, differences: Sequence[Record]) -> str:
    """Return the Markdown page."""
    lines = [
        "Brackets are 95% intervals: Wilson's of accuracies, of resampled documents of "
        "perplexities, and of resampled questions or documents of differences, which are paired; "
        "of several training seeds an accuracy or perplexity has their mean and range. p is "
        "McNemar's, exact, of each seed.",
        "",
    ]
    for scoring in found.values("scoring"):
        lines += [f"## {HEADINGS[scoring]}", "", *_accuracies(found, differences, scoring), ""]
    if found.values("text"):
        lines += ["## Perplexity per token", "", *_perplexities(found, differences), ""]
    return "\n".join([*lines, "## In words", "", *_verdicts(differences), ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _contrasts(differences: Sequence[Record], kind: str) -> list[tuple[str, str]]:
    pairs = [(d.labels["objective"], d.labels["minus"]) for d in differences if kind in d.labels]
    return list(dict.fromkeys(pairs))


def _accuracies(found: Found, differences: Sequence[Record], scoring: str) -> list[str]:
    objectives, contrasts = found.objectives(), _contrasts(differences, "task")
    head = ["task", "questions", "random", "majority", *objectives]
    lines = _head([*head, *(f"{a} - {b}" for a, b in contrasts)])
    for task in found.values("task"):
        base = next(iter(found.select("accuracy_random", objectives[0], task=task).values()), None)
        cells = [task, str(base.n) if base else ""]
        for metric in ("accuracy_random", "accuracy_majority"):
            group = found.select(metric, objectives[0], task=task)
            cells.append(_percent(average(group).value) if group else "")
        for name in objectives:
            group = found.select("accuracy", name, task=task, scoring=scoring)
            cells.append(_value(average(group), 100, 1) if group else "")
        for a, b in contrasts:
            wanted = {"objective": a, "minus": b, "task": task, "scoring": scoring}
            cells.append(_difference(differences, wanted, 100, 1))
        lines.append(_row(cells))
    return lines


def _perplexities(found: Found, differences: Sequence[Record]) -> list[str]:
    objectives, contrasts = found.objectives(), _contrasts(differences, "text")
    head = ["text", "tokens", *objectives]
    lines = _head([*head, *(f"{a} - {b}, nats/token" for a, b in contrasts)])
    for text in found.values("text"):
        groups = [found.select("token_perplexity", name, text=text) for name in objectives]
        tokens = next((next(iter(group.values())).n for group in groups if group), 0)
        cells = [text, f"{tokens:,}"]
        cells += [_value(average(group), 1, 2) if group else "" for group in groups]
        for a, b in contrasts:
            wanted = {"objective": a, "minus": b, "text": text}
            cells.append(_difference(differences, wanted, 1, 4))
        lines.append(_row(cells))
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _value(record: Record, times: float, digits: int) -> str:
    spread = record.interval
    text = f"{times * record.value:.{digits}f}"
    if spread is None:
        return text
    return f"{text} [{times * spread.low:.{digits}f}, {times * spread.high:.{digits}f}]"


def _difference(
    differences: Sequence[Record], wanted: dict[str, str], times: float, digits: int
) -> str:
    record = next((d for d in differences if wanted.items() <= d.labels.items()), None)
    if record is None:
        return ""
    text, spread = f"{times * record.value:+.{digits}f}", record.interval
    if spread:
        text += f" [{times * spread.low:+.{digits}f}, {times * spread.high:+.{digits}f}]"
    if chances := record.settings.get("mcnemar_p"):
        text += f" p {', '.join(f'{p:.2g}' for p in chances.values())}"
    return text


def _verdicts(differences: Sequence[Record]) -> list[str]:
    """Which differences have an interval that leaves 0 out."""
    lines = []
    pairs = dict.fromkeys((d.labels["objective"], d.labels["minus"]) for d in differences)
    for a, b in pairs:
        ours = [d for d in differences if (d.labels["objective"], d.labels["minus"]) == (a, b)]
        better = [_name(d) for d in ours if _sign(d) > 0]
        worse = [_name(d) for d in ours if _sign(d) < 0]
        lines.append(
            f"- {a} against {b}: better on {', '.join(better) or 'none'}; worse on "
            f"{', '.join(worse) or 'none'}; undecided on {len(ours) - len(better) - len(worse)} "
            f"of {len(ours)}, their intervals hold 0."
        )
    return lines


def _sign(record: Record) -> int:
    """1 where A is better beyond the interval, -1 where B is, else 0."""
    spread, is_accuracy = record.interval, record.metric == "accuracy_difference"
    if spread is None or spread.low <= 0 <= spread.high:
        return 0
    return 1 if (spread.low > 0) == is_accuracy else -1


def _name(record: Record) -> str:
    labels = record.labels
    return f"{labels['task']} ({labels['scoring']})" if "task" in labels else labels["text"]


def write_summary(cells: Path, output: Path) -> str:
    """Write records.json, summary.json and table.md to `output`; return the table.

    summary.json has the means over seeds and the differences.

    Raises:
        ValueError: no records, or files of two models that do not fit together.
    """
    files = [*cells.glob(f"{UNTOUCHED}/*.json"), *cells.glob("*/seed*/*.json")]
    if not files:
        raise ValueError(f"{cells}: expected models that are measured, found none")
    records = read_records(sorted(files))
    found = Found(cells, records)
    differences = compare_all(found)
    report = format_report(found, differences)
    summary = [*_averages(found), *differences]
    write_results(output, records, summary, report)
    return report


def _averages(found: Found) -> list[Record]:
    groups: dict[tuple, dict[str, Record]] = {}
    for record in found.records:
        labels = {name: value for name, value in record.labels.items() if name != "seed"}
        key = (record.metric, *sorted(labels.items()))
        groups.setdefault(key, {})[record.labels.get("seed", "")] = record
    return [average(group) for group in groups.values()]


if __name__ == "__main__":
    run_summary(__doc__, write_summary)
