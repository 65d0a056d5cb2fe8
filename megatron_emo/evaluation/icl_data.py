"""Questions and shots of a task from its files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_emo.evaluation.icl_tasks import Task, split_at_label
from megatron_emo.evaluation.records import hash_file

Row = tuple[str, str, dict[str, str]]
"""Where it stands, its label, its columns."""


@dataclass(frozen=True)
class Example:
    """A question with its answer."""

    columns: Mapping[str, str]
    """`text`, stripped, `group`, and what else the file has."""
    label: int
    """Position of the right answer in `words`."""
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.columns["text"]

    @property
    def group(self) -> str:
        return self.columns["group"]

    def render(self, task: Task, label: int) -> str:
        """Return the template with the answer of that position."""
        return task.template.format(**{**self.columns, "label": self.words[label]})

    def render_question(self, task: Task) -> str:
        """Return the template up to the answer, without the space before it."""
        return split_at_label(task.template)[0].format(**self.columns).rstrip()


@dataclass(frozen=True)
class TaskData:
    """What a task's files hold."""

    train: list[Example]
    """What shots are chosen from."""
    test: list[Example]
    """The questions."""
    hashes: Mapping[str, str]
    """sha256 by declared path; of several files one over names and contents."""
    split: str
    """In words, where train and test come from."""


def read_task_data(task: Task, folder: Path) -> TaskData:
    """Return the examples of all files, in their order.

    Raises:
        FileNotFoundError: a file that is missing, or a pattern without a match.
        ValueError: a row that cannot be read, a label that the task does not know, files that hold
            no question; file and line named.
    """
    splits, hashes = {}, {}
    for name, declared in task.files.items():
        splits[name] = [_build(task, row) for row in _read_split(task, declared, folder)]
        paths = declared.values() if isinstance(declared, Mapping) else [declared]
        hashes |= {path: _hash_all(_find_files(path, folder)) for path in paths}
        if not splits[name]:
            raise ValueError(f"{task.name}: {name}: expected questions, found none in {declared}")
    if "all" in splits:
        train, test = _cut(splits["all"], task)
        split = f"{task.train_share:g} of the data for shots, split seed {task.split_seed}"
    else:
        train, test = splits.get("train", []), splits["test"]
        split = " and ".join(splits)
    return TaskData(train, test, hashes, split)


def take_questions(data: TaskData, limit: int | None, seed: int) -> list[int]:
    """Return positions in data.test, ascending: all, or `limit` of them drawn by the seed.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {limit}")
    size = len(data.test)
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(np.random.default_rng(seed).permutation(size)[:limit].tolist())


def _cut(examples: list[Example], task: Task) -> tuple[list[Example], list[Example]]:
    size = round(task.train_share * len(examples))
    if not 0 < size < len(examples):
        raise ValueError(
            f"{task.name}: train_share {task.train_share}: {len(examples)} rows are too few to cut"
        )
    order = np.random.default_rng(task.split_seed).permutation(len(examples))
    train, test = sorted(order[:size].tolist()), sorted(order[size:].tolist())
    return [examples[i] for i in train], [examples[i] for i in test]


def _build(task: Task, row: Row) -> Example:
    where, label, columns = row
    label = label.strip()
    if task.label_until:
        label = label.split(task.label_until, 1)[0]
    missing = [name for name in task.choices if name not in columns]
    if missing:
        raise ValueError(f"{where}: choices: {missing} are no columns of {sorted(columns)}")
    if task.choices:
        words = tuple(columns[name].strip() for name in task.choices)
        known = [str(i) for i in range(len(words))]
    else:
        words, known = task.words, list(task.labels)
    if label not in known:
        raise ValueError(f"{where}: label: expected one of {', '.join(known)}, got {label!r}")
    position = int(label) if task.choices else words.index(task.labels[label])
    example = Example({**columns, "text": columns["text"].strip()}, position, words)
    try:
        example.render(task, position)
    except KeyError as error:
        raise ValueError(f"{where}: template: {error} is no column of {sorted(columns)}") from error
    return example


def _find_files(declared: str, folder: Path) -> list[Path]:
    path = folder / declared
    found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"{path}: no such file; --data is {folder}")
    return found


def _hash_all(paths: list[Path]) -> str:
    if len(paths) == 1:
        return hash_file(paths[0])
    lines = "".join(f"{path.name} {hash_file(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_split(task: Task, declared: Any, folder: Path) -> Iterator[Row]:
    if task.format == "parallel":
        texts, labels = (_find_files(declared[part], folder)[0] for part in ("text", "label"))
        yield from _read_parallel(texts, labels, task.encoding)
        return
    before, _, after = Path(declared).name.partition("*")
    read = {"label-text": _read_label_text, "csv": _read_csv, "jsonl": _read_jsonl}[task.format]
    for path in _find_files(declared, folder):
        name = path.name[len(before) : len(path.name) - len(after)] if "*" in declared else ""
        group = name.replace("_", " ")
        for where, label, columns in read(path, task):
            yield where, label, {**columns, "group": group}


def _read_lines(path: Path, encoding: str) -> list[str]:
    """Only a line feed ends a line: MR's bytes 0x85 are letters to a reader of lines."""
    lines = _decode(path, encoding).split("\n")
    return [line.removesuffix("\r") for line in lines[: -1 if not lines[-1] else None]]


def _decode(path: Path, encoding: str) -> str:
    try:
        return path.read_bytes().decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"{path}: encoding: expected {encoding}: {error}") from error


def _read_label_text(path: Path, task: Task) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path, task.encoding), 1):
        if line.strip():
            label, _, text = line.partition(" ")
            yield f"{path}:{number}", label, {"text": text}


def _read_parallel(texts: Path, labels: Path, encoding: str) -> Iterator[Row]:
    pair = [_read_lines(path, encoding) for path in (texts, labels)]
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{labels}: expected a line for each of the {len(pair[0])} of {texts.name}, "
            f"got {len(pair[1])}"
        )
    for number, (text, label) in enumerate(zip(*pair, strict=True), 1):
        yield f"{labels}:{number}", label, {"text": text, "group": ""}


def _read_csv(path: Path, task: Task) -> Iterator[Row]:
    reader = csv.reader(
        io.StringIO(_decode(path, task.encoding), newline=""), delimiter=task.delimiter
    )
    rows = ((reader.line_num, row) for row in _rows(reader, path) if row)
    names = next(rows, (0, []))[1] if task.header else None
    for line, row in rows:
        where = f"{path}:{line}"
        if names is not None and len(row) != len(names):
            raise ValueError(f"{where}: expected {len(names)} columns, got {len(row)}")
        columns = dict(zip(names or map(str, range(len(row))), row, strict=True))
        yield where, *_pick(columns, task, where)


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: expected CSV: {error}") from error


def _read_jsonl(path: Path, task: Task) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path, task.encoding), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        columns = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in row.items()
        }
        yield where, *_pick(columns, task, where)


def _pick(columns: dict[str, str], task: Task, where: str) -> tuple[str, dict[str, str]]:
    wanted = task.columns["text"]
    names = [str(name) for name in (wanted if isinstance(wanted, list) else [wanted])]
    label = str(task.columns["label"])
    if missing := [name for name in [*names, label] if name not in columns]:
        raise ValueError(f"{where}: columns: expected {missing} among {sorted(columns)}")
    return columns[label], {**columns, "text": " ".join(columns[name] for name in names)}
