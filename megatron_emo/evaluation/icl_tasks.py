"""Classification tasks declared as data: where questions lie, how they read, what answers mean."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import string
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import yaml

BUILT_IN = Path(__file__).parent / "tasks"
DATA_VARIABLE = "MEGATRON_EMO_EVAL_DATA"
FORMATS = ("label-text", "parallel", "csv", "jsonl")
RETRIEVERS = ("topk", "random", "first", "none")

_KINDS = {
    **{"str": (str, "text"), "bool": (bool, "true or false"), "int": (int, "a whole number")},
    **{"float": ((float, int), "a number"), "tuple": (list, "a list"), "Mapping": (dict, "a map")},
}


_YAML_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML's constructors raise of scalars that are not of their type, beside its own."""


class TaskError(ValueError):
    """A task that does not exist, or a task file that cannot be used."""


@dataclass(frozen=True)
class Task:
    """One task. A YAML file holds these fields under the same names."""

    name: str
    template: str
    """One prompt: {text} and {label}, and any other column of the data by its name."""
    format: str
    """label-text: "label text" a line; parallel: texts and labels in two files, a line each; csv;
    jsonl: one object a line."""
    files: Mapping[str, Any]
    """train and test, or `all`, which is cut by `train_share`; paths below --data. A path may hold
    one *: what it stands for becomes the column `group`. For `parallel` each is a map with the
    paths `text` and `label`."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The label as the data has it: the words of the template. Two may share their words."""
    choices: tuple = ()
    """In place of `labels`: the columns that hold a question's own answers, the label being the
    position of the right one."""
    columns: Mapping[str, Any] = field(default_factory=lambda: {"text": "text", "label": "label"})
    """csv and jsonl: the columns of `text` (a list is joined by spaces) and `label`, by name, or,
    in a csv without a header, by position from 0."""
    header: bool = True
    """csv: whether the first row names the columns."""
    delimiter: str = ","
    """csv: what stands between columns."""
    label_until: str = ""
    """What ends a label: with ":" NUM:dist is NUM."""
    encoding: str = "utf-8"
    train_share: float = 0.0
    """Of `all`: the share shots are taken from; the rest are questions."""
    split_seed: int = 0
    """Of the cut. --seed does not move it, so that all seeds see the same questions."""
    preamble: str = ""
    """Stands before the first shot; may name {group}."""
    separator: str = "\n"
    """Between shots, and between the last one and the question."""
    shots: int = 8
    """Where --shots is not given."""
    retriever: str = "topk"
    """Where --retriever is not given."""
    within_group: bool = False
    """Shots come from the question's own group alone."""
    source: str = ""
    """Where data and template come from."""

    def __post_init__(self) -> None:
        _check_template(self)
        _check_answers(self)
        _check_files(self)
        for name, allowed in (("format", FORMATS), ("retriever", RETRIEVERS)):
            if getattr(self, name) not in allowed:
                expected = ", ".join(allowed)
                raise TaskError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if self.shots < 0:
            raise TaskError(f"shots: expected at least 0, got {self.shots}")
        if missing := {"text", "label"} - set(self.columns):
            raise TaskError(f"columns: expected text and label, {sorted(missing)} not given")

    @property
    def words(self) -> tuple[str, ...]:
        """The answers, in the order of the file, each once; none where questions have their own."""
        return tuple(dict.fromkeys(self.labels.values()))

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that makes a prompt out of a row."""
        made_of = (self.template, self.preamble, self.separator, dict(self.labels), self.choices)
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _check_template(task: Task) -> None:
    try:
        parts = list(string.Formatter().parse(task.template))
    except ValueError as error:
        raise TaskError(f"template: {error}; a brace itself is written twice") from error
    names = [name for _, name, _, _ in parts if name is not None]
    dressed = [n for _, n, spec, conversion in parts if n is not None and (spec or conversion)]
    if wrong := [name for name in names if not name.isidentifier()] + dressed:
        raise TaskError(f"template: expected names of columns alone in braces, got {wrong}")
    for name in ("text", "label"):
        if names.count(name) != 1:
            found = f"{names.count(name)} in {task.template!r}"
            raise TaskError(f"template: expected {{{name}}} once, found {found}")
    if task.template.lstrip().startswith("{label}"):
        raise TaskError(f"template: expected words or {{text}} before {{label}}: {task.template!r}")


def split_at_label(template: str) -> tuple[str, str]:
    """Return what stands before and after {label}, as templates."""
    halves, side = ["", ""], 0
    for literal, name, _, _ in string.Formatter().parse(template):
        halves[side] += literal.replace("{", "{{").replace("}", "}}")
        if name == "label":
            side = 1
        elif name is not None:
            halves[side] += f"{{{name}}}"
    return halves[0], halves[1]


def _check_answers(task: Task) -> None:
    if bool(task.labels) == bool(task.choices):
        raise TaskError("labels, choices: expected one of the two")
    if max(len(task.words), len(task.choices)) < 2:
        raise TaskError("labels, choices: expected at least two different answers")
    if any(not isinstance(word, str) or not word.strip() for word in task.words):
        raise TaskError(f"labels: expected words, got {list(task.words)}")


def _check_files(task: Task) -> None:
    keys = set(task.files)
    if keys not in ({"train", "test"}, {"test"}, {"all"}):
        found = sorted(map(str, keys))
        raise TaskError(f"files: expected train and test, test, or all, got {found}")
    if ("all" in keys) != (0 < task.train_share < 1):
        raise TaskError(
            "train_share: expected between 0 and 1 where files has `all`, and none elsewhere, "
            f"got {task.train_share}"
        )
    for split, value in task.files.items():
        is_pair = isinstance(value, Mapping) and set(value) == {"text", "label"}
        if task.format == "parallel" and not is_pair:
            raise TaskError(f"files: {split}: parallel: expected a map of text and label")
        if task.format != "parallel" and not isinstance(value, str):
            raise TaskError(f"files: {split}: expected a path, got {_show(value)}")
        for path in value.values() if is_pair else [value]:
            _check_path(split, path)


def _check_path(split: str, path: object) -> None:
    """A task from elsewhere reads what lies below --data, and nothing of the user's beside it."""
    parts = PurePath(path).parts if isinstance(path, str) and "\0" not in path else ("..",)
    if ".." in parts or PurePath(*parts).is_absolute():
        raise TaskError(f"files: {split}: expected a path below --data, got {_show(path)}")


def built_in_names() -> list[str]:
    """Return the names that `load_task` knows without a file."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_task(name: str) -> Task:
    """Return a built-in task by its name, or the task of a YAML or JSON file.

    Raises:
        TaskError: an unknown name, or a file with an unknown, missing or ill-formed field.
        FileNotFoundError: a file that does not exist.
    """
    path = Path(name) if is_task_file(name) else BUILT_IN / f"{name}.yaml"
    if path.parent == BUILT_IN and not path.exists():
        known = ", ".join(built_in_names())
        raise TaskError(f"--task: expected a .yaml file or one of {known}, got {name!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (*_YAML_ERRORS, yaml.YAMLError) as error:
        raise TaskError(f"--task {path}: {error}") from error
    try:
        return parse_task(content)
    except TaskError as error:
        raise TaskError(f"--task {path}: {error}") from error


def _show(value: object) -> str:
    # YAML's aliases make lists of lists, whose whole text has no end.
    return reprlib.repr(value)


def is_task_file(name: str) -> bool:
    """Return whether --task names a file."""
    return Path(name).suffix in (".yaml", ".yml", ".json")


def parse_task(content: Any) -> Task:
    """Return the task that a mapping declares.

    Raises:
        TaskError: an unknown, missing or ill-formed field.
    """
    if not isinstance(content, dict):
        raise TaskError(f"expected fields and values, got {type(content).__name__}")
    known = {f.name: f for f in fields(Task)}
    if unknown := sorted(map(str, set(content) - set(known))):
        raise TaskError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    needed = [n for n, f in known.items() if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if name not in content]:
        raise TaskError(f"missing {', '.join(missing)}")
    values = dict(content)
    for name, value in content.items():
        kind, expected = _KINDS[known[name].type.split("[")[0]]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TaskError(f"{name}: expected {expected}, got {_show(value)}")
    values["labels"] = {str(label): word for label, word in content.get("labels", {}).items()}
    values["choices"] = tuple(content.get("choices", ()))
    for name, words in (("labels", values["labels"].values()), ("choices", values["choices"])):
        if wrong := [word for word in words if not isinstance(word, str)]:
            raise TaskError(f"{name}: expected words, got {_show(wrong[0])}")
    return Task(**values)


def find_data_dir(name: str, data: str | None) -> Path:
    """Return the folder below which a task's files lie.

    --data, else the folder of a task file, else the environment's MEGATRON_EMO_EVAL_DATA.

    Raises:
        TaskError: none of them, for a task that is built in.
        FileNotFoundError: the folder does not exist.
    """
    folder = data or (str(Path(name).parent) if is_task_file(name) else os.getenv(DATA_VARIABLE))
    if not folder:
        raise TaskError(
            f"--data: expected the folder of the data of {name}, got none, and {DATA_VARIABLE} is "
            "not set"
        )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--data: {folder}: no such folder")
    return Path(folder)
