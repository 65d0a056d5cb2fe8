"""Few-shot classification: prompts with shots, the answer that scores best, accuracy.

Order, separators and the rule `ppl` are those of OpenICL (Wu et al., 2023), as in the EMO paper.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_emo.evaluation.icl_data import Example, TaskData, take_questions
from megatron_emo.evaluation.icl_scoring import Prompt, PromptScorer, Score, tokenize
from megatron_emo.evaluation.icl_tasks import Task
from megatron_emo.evaluation.intervals import wilson
from megatron_emo.evaluation.models import Progress
from megatron_emo.evaluation.records import Json, Record
from megatron_emo.evaluation.retrieval import Encode, choose_shots
from megatron_emo.evaluation.rows import RowFile, Rows, read_rows

SCORINGS = {
    "ppl": "lowest whole-prompt cross-entropy (OpenICL PPLInferencer)",
    "label": "highest log-probability of the prompt from {label} on",
    "label-mean": "highest log-probability per token of the prompt from {label} on",
}
"""Which answer is taken. All three come from the same run of the model."""
ORDERS = ("nearest-first", "nearest-last")


@dataclass(frozen=True)
class IclSettings:
    """How questions are asked."""

    shots: int = 8
    retriever: str = "topk"
    order: str = "nearest-first"
    """nearest-first as OpenICL; nearest-last puts the nearest shot beside the question."""
    seed: int = 0
    """Of the questions that --limit draws, and of random shots."""
    limit: int | None = None
    """Questions asked, drawn without replacement; None for all."""
    max_length: int | None = None
    """Tokens of the longest prompt; None where the model has no limit."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"--order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length: expected at least 2 tokens, got {self.max_length}")


@dataclass(frozen=True)
class Answer:
    """What came of one question."""

    question: int
    """Position among the task's questions."""
    gold: int
    ppl: list[float]
    """Nats per token of the whole prompt, by answer."""
    label: list[float]
    """Log-probability of the answer, nats, by answer."""
    label_mean: list[float]
    """The same per token."""
    shots: list[int]
    """Positions of the shots that stood before it, the nearest first."""
    shots_dropped: int
    """How many more there was no room for; the farthest go first."""
    tokens_cut: int
    """From the beginning of a question too long to stand alone."""
    seconds: float

    def predict(self, scoring: str) -> int:
        """Return the answer taken; of equals the first."""
        if scoring == "ppl":
            return int(np.argmin(self.ppl))
        return int(np.argmax(self.label if scoring == "label" else self.label_mean))


def read_answers(path: str | os.PathLike) -> list[Answer]:
    """Return the answers of a file of --predictions, to compare models question by question.

    Raises:
        ValueError: not such a file.
    """
    names = Answer.__dataclass_fields__
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        missing = sorted({*names} - {*row})
        if missing:
            raise ValueError(f"--predictions {path}:{number}: expected {missing[0]}, found none")
    return [_answer_of(row) for row in rows]


def _answer_of(row: Mapping[str, Any]) -> Answer:
    return Answer(**{name: row[name] for name in Answer.__dataclass_fields__})


def open_answers(
    path: str | os.PathLike,
    recipe: Mapping[str, Json],
    total: int,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RowFile:
    """Return the file of --predictions, in which `classify` keeps its answers one by one."""
    return RowFile(
        *(path, recipe),
        total=total,
        group=1,
        resume=resume,
        overwrite=overwrite,
        flag="--predictions",
    )


def build_prompt(task: Task, question: Example, shots: Sequence[Example]) -> tuple[str, list[str]]:
    """Return the prompt without an answer, and the prompt with each answer."""
    head = task.preamble.replace("{group}", question.group)
    head += "".join(shot.render(task, shot.label) + task.separator for shot in shots)
    answered = [head + question.render(task, label) for label in range(len(question.words))]
    return head + question.render_question(task), answered


def fit_prompts(
    task: Task,
    question: Example,
    shots: Sequence[Example],
    tokenizer: Any,
    settings: IclSettings,
) -> tuple[list[Prompt], int, int]:
    """Return the prompts in tokens, the shots that fitted, the tokens cut from the beginning.

    Args:
        shots: the nearest first; of these the last ones are left out where room is short.

    Raises:
        ValueError: max_length leaves no token before the answer, or the tokenizer makes the same
            of two answers.
    """
    limit, kept = settings.max_length, list(shots)
    while True:
        placed = kept if settings.order == "nearest-first" else kept[::-1]
        bare, answered = build_prompt(task, question, placed)
        prompts = [tokenize(tokenizer, bare, text) for text in answered]
        if len({tuple(prompt.ids) for prompt in prompts}) < len(set(question.words)):
            raise ValueError(f"labels: the tokenizer tells not all apart of {question.words}")
        excess = max(len(prompt.ids) for prompt in prompts) - (limit or float("inf"))
        if excess <= 0:
            return prompts, len(kept), 0
        if not kept:
            break
        kept.pop()
    cut = [Prompt(prompt.ids[excess:], prompt.answer_start - excess) for prompt in prompts]
    if min(prompt.answer_start for prompt in cut) < 1:
        raise ValueError(f"--max-length: {limit} tokens leave no room before an answer")
    return cut, 0, excess


def classify(
    task: Task,
    data: TaskData,
    scorer: PromptScorer,
    tokenizer: Any,
    settings: IclSettings,
    *,
    encode: Encode | None = None,
    predictions: Rows | None = None,
) -> list[Answer]:
    """Return an answer for each question, in order.

    Args:
        predictions: of `open_answers`; gets the answers one by one, and holds those of an earlier
            run, which are not asked again.
    """
    positions = take_questions(data, settings.limit, settings.seed)
    questions = [data.test[position] for position in positions]
    how = {"within_group": task.within_group, "encode": encode, "seed": settings.seed}
    chosen = choose_shots(questions, data.train, settings.shots, settings.retriever, **how)
    found = [_answer_of(row) for row in predictions.found] if predictions else []
    answers = {answer.question: answer for answer in found}
    todo = [i for i, position in enumerate(positions) if position not in answers]
    progress = Progress(f"icl {task.name}", len(todo), "questions")
    for i in todo:
        start = time.monotonic()
        shots = [data.train[shot] for shot in chosen[i]]
        prompts, num_kept, cut = fit_prompts(task, questions[i], shots, tokenizer, settings)
        scores = scorer.score(prompts)
        seconds = time.monotonic() - start
        answer = _answer(positions[i], questions[i], scores, chosen[i], num_kept, cut, seconds)
        answers[positions[i]] = answer
        if predictions:
            predictions.append([asdict(answer)])
        progress.add(1)
    return [answers[position] for position in positions]


def _answer(
    position: int,
    question: Example,
    scores: Sequence[Score],
    chosen: list[int],
    num_kept: int,
    cut: int,
    seconds: float,
) -> Answer:
    return Answer(
        question=position,
        gold=question.label,
        ppl=[score.ppl for score in scores],
        label=[-score.answer_nll for score in scores],
        label_mean=[-score.answer_nll / score.num_answer_tokens for score in scores],
        shots=chosen[:num_kept],
        shots_dropped=len(chosen) - num_kept,
        tokens_cut=cut,
        seconds=round(seconds, 4),
    )


def summarize(
    task: Task,
    data: TaskData,
    answers: Sequence[Answer],
    scorings: Sequence[str],
    common: Mapping[str, Any],
) -> list[Record]:
    """Return accuracy and macro-F1 by scoring rule, and the accuracy of knowing nothing.

    Args:
        common: fields that all records share: settings, labels, model, seed.
    """
    questions = [data.test[answer.question] for answer in answers]
    gold = [answer.gold for answer in answers]
    seconds = sum(answer.seconds for answer in answers)
    common = {**common, "unit": "1", "n": len(answers), "n_unit": "questions", "data": data.hashes}
    settings = {
        **common["settings"],
        "split": data.split,
        "num_train": len(data.train),
        "num_shots_dropped": sum(answer.shots_dropped for answer in answers),
        "num_questions_cut": sum(answer.tokens_cut > 0 for answer in answers),
        "seconds_per_question": round(seconds / len(answers), 4),
        "gold_counts": _count(task, gold),
    }
    records = []
    for scoring in scorings:
        predicted = [answer.predict(scoring) for answer in answers]
        how = settings | {"scoring": scoring, "predicted_counts": _count(task, predicted)}
        labels = {"scoring": scoring, **common["labels"]}
        shared = {**common, "settings": how, "labels": labels, "seconds": seconds}
        records += _accuracies(task, questions, gold, predicted, SCORINGS[scoring], shared)
    return records + _baselines(questions, gold, {**common, "settings": settings})


def _accuracies(
    task: Task,
    questions: Sequence[Example],
    gold: Sequence[int],
    predicted: Sequence[int],
    rule: str,
    shared: Mapping[str, Any],
) -> list[Record]:
    right = [g == p for g, p in zip(gold, predicted, strict=True)]
    interval = wilson(sum(right), len(right))
    share = sum(right) / len(right)
    records = [Record("accuracy", share, definition=f"answer: {rule}", interval=interval, **shared)]
    if not task.choices:
        definition = f"mean over labels that occur or are answered; answer: {rule}"
        records.append(
            Record("macro_f1", macro_f1(gold, predicted), definition=definition, **shared)
        )
    groups: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        groups.setdefault(question.group, []).append(is_right)
    if len(groups) > 1:
        mean = float(np.mean([np.mean(group) for group in groups.values()]))
        definition = f"mean of the accuracies of {len(groups)} groups; answer: {rule}"
        records.append(Record("accuracy_group_mean", mean, definition=definition, **shared))
    return records


def _baselines(
    questions: Sequence[Example], gold: Sequence[int], common: Mapping[str, Any]
) -> list[Record]:
    most = Counter(gold).most_common(1)[0][1]
    chance = float(np.mean([1 / len(question.words) for question in questions]))
    majority = "share of the label that most questions have, as if it were known"
    return [
        Record("accuracy_majority", most / len(gold), definition=majority, **common),
        Record("accuracy_random", chance, definition="expected of uniform guesses", **common),
    ]


def macro_f1(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Return the mean of F1 over labels that occur in either; 0 for one that is never hit."""
    scores = []
    for label in sorted({*gold, *predicted}):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        scores.append(2 * hits / (list(gold).count(label) + list(predicted).count(label)))
    return sum(scores) / len(scores)


def _count(task: Task, labels: Sequence[int]) -> dict[str, int]:
    names = task.words or task.choices
    counts = Counter(labels)
    return {names[label]: counts[label] for label in range(len(names))}
