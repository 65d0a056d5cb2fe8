"""Tasks in the form that lm-eval reads: a YAML file and JSON lines for each."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_emo.evaluation.icl_data import Example, TaskData, take_questions
from megatron_emo.evaluation.icl_tasks import Task, split_at_label

if TYPE_CHECKING:
    from megatron_emo.evaluation.icl import IclSettings

PREFIX = "megatron_emo_"
"""Of the tasks' names, which would else be those of lm-eval's own."""


def write_lm_eval(
    task: Task, data: TaskData, settings: IclSettings, folder: str | os.PathLike
) -> list[Path]:
    """Write the task for lm-eval, and return the YAML files, the one to run first.

    lm-eval chooses shots in its own ways: the first ones for the retriever `first`, random ones for
    all others. A task with groups becomes one task for each group, under a common name. YAML files
    hold absolute paths of the data: lm-eval would look for others where it is started.

    Args:
        settings: limit and seed choose questions; shots become num_fewshot.

    Raises:
        ValueError: a limit below 1, or fewer training examples than shots.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    test = [data.test[i] for i in take_questions(data, settings.limit, settings.seed)]
    groups = sorted({question.group for question in test})
    name, after = PREFIX + task.name, split_at_label(task.template)[1]
    paths = []
    for group in groups:
        asked = [question for question in test if question.group == group]
        train = [shot for shot in data.train if not task.within_group or shot.group == group]
        if len(train) < settings.shots:
            raise ValueError(
                f"--shots: expected at most {len(train)}, the training examples, "
                f"got {settings.shots}"
            )
        own = name + (f"_{re.sub(r'[^0-9A-Za-z]+', '_', group)}" if group else "")
        splits = {"train": train, "test": asked} if train else {"test": asked}
        files = {}
        for split, examples in splits.items():
            files[split] = str(folder / f"{own}_{split}.jsonl")
            _write_examples(Path(files[split]), examples, after)
        content = _declare(task, own, files, settings) | {
            "description": _quote(task.preamble.replace("{group}", group))
        }
        paths.append(_write_yaml(folder / f"{own}.yaml", content))
    if len(groups) > 1:
        parts = [path.stem for path in paths]
        mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
        content = {"group": name, "task": parts, "aggregate_metric_list": [mean]}
        paths.insert(0, _write_yaml(folder / f"{name}.yaml", content))
    return paths


def _declare(task: Task, name: str, files: dict[str, str], settings: IclSettings) -> dict[str, Any]:
    before = split_at_label(task.template)[0]
    stripped = before.rstrip(" ")
    content: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": to_jinja(stripped),
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": before[len(stripped) :],
        "fewshot_delimiter": task.separator,
        "num_fewshot": settings.shots if "train" in files else 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1, "source": task.source},
    }
    if "train" in files:
        content["fewshot_split"] = "train"
        content["fewshot_config"] = {
            "sampler": "first_n" if settings.retriever == "first" else "default"
        }
    return content


def to_jinja(template: str) -> str:
    """Return a template of ours as one of Jinja's, which write {text} as {{text}}."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(_quote(literal))
        if name is not None:
            parts.append(f"{{{{{name}}}}}")
    return "".join(parts)


def _quote(text: str) -> str:
    """Return a text in Jinja, which takes no braces for its own."""
    return f"{{% raw %}}{text}{{% endraw %}}" if re.search("[{}]", text) else text


def _write_examples(path: Path, examples: Sequence[Example], after: str) -> None:
    """Each line: the columns, choices with what follows them in the template, label."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            tail = after.format(**example.columns)
            choices = [word + tail for word in example.words]
            row = {**example.columns, "choices": choices, "label": example.label}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
