"""Train every variant on every language and seed, keep what was measured, go on where cut off."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_emo.evaluation.oracle.languages import (
    Language,
    LanguageSpec,
    Sequences,
    sample_sequences,
)
from megatron_emo.evaluation.oracle.measures import measure
from megatron_emo.evaluation.oracle.model import (
    Fit,
    TrainingConfig,
    cost_matrix,
    fit,
    identity_cost,
)
from megatron_emo.evaluation.oracle.variants import COSTS, Variant, build_variants
from megatron_emo.evaluation.records import hash_file

SCHEMA = "megatron_emo.oracle/1"
SEEDS = (7, 42, 777, 4222, 99999)
"""MixCE's."""


@dataclass(frozen=True)
class StudyConfig:
    """What decides the numbers of all runs; which runs there are may grow."""

    text: str | None = None
    """The file of corpus languages."""
    num_train: int = 50_000
    """Sequences."""
    num_dev: int = 5_000
    """Sequences."""
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.num_train < self.training.batch_size:
            raise ValueError(
                f"--num-train: expected at least --batch-size {self.training.batch_size}, "
                f"got {self.num_train}"
            )
        if self.num_dev < 1:
            raise ValueError(f"--num-dev: expected at least 1, got {self.num_dev}")

    def to_json(self) -> dict:
        """Return all of it; a text counts by its content."""
        text = hash_file(self.text) if self.text else None
        return {"text_sha256": text, **asdict(replace(self, text=None))}


@dataclass(frozen=True)
class Run:
    """One variant trained on one language with one seed."""

    language: str
    seed: int
    objective: str
    cost: str
    weight: str
    is_default: bool
    measures: dict[str, float]
    num_epochs: int
    best_epoch: int
    seconds: float
    """Wall time: its share of what the models that trained beside it took."""
    cpu_seconds: float
    """The same of one core's time."""

    @property
    def key(self) -> tuple:
        return (self.language, self.seed, self.objective, self.cost, self.weight)


@dataclass(frozen=True)
class _Stack:
    """Variants that train side by side: one language, one seed, one cost matrix."""

    spec: LanguageSpec
    seed: int
    variants: tuple[Variant, ...]
    config: StudyConfig
    output_weight: Tensor | None = None
    """The cost embedding; 1 - I without."""

    @property
    def name(self) -> str:
        return f"{self.spec} seed {self.seed}"


def run_study(
    specs: Sequence[LanguageSpec],
    objectives: Iterable[str],
    seeds: Sequence[int],
    config: StudyConfig,
    path: Path,
    *,
    costs: Collection[str] = COSTS,
    resume: bool = False,
    jobs: int = 1,
    report: Callable[[str], None] = print,
) -> list[Run]:
    """Return the runs asked for, appended to `path` (JSON lines) as they end.

    Args:
        resume: take runs of the same settings that `path` holds, and add what is missing.
        jobs: processes, of one thread each.
        report: given a line for each stack of runs.

    Raises:
        ValueError: a name or number out of range, or `path` of other settings.
        FileExistsError: `path` is there and `resume` is not given.
    """
    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    variants = build_variants(objectives, costs)
    for spec in specs:
        spec.build(seeds[0], config.text)
    done = {run.key: run for run in _open_runs(path, config, resume)}
    cells = [(spec, seed) for spec in dict.fromkeys(specs) for seed in dict.fromkeys(seeds)]
    wanted = {cell: [(str(cell[0]), cell[1], *v.key) for v in variants] for cell in cells}
    missing = {
        cell: [v for v, key in zip(variants, wanted[cell], strict=True) if key not in done]
        for cell in cells
    }
    progress = _Progress(path, done, sum(map(len, missing.values())), report)
    with _workers(jobs) as map_stacks:
        tables = {}
        for stack, runs, table in map_stacks(_first_stacks(missing, variants[0], config)):
            tables[stack.spec, stack.seed] = table
            progress.add(stack.name, runs)
        for stack, runs, _ in map_stacks(_second_stacks(missing, tables, config)):
            progress.add(stack.name, runs)
    return [done[key] for cell in cells for key in wanted[cell]]


def _first_stacks(missing: dict, mle: Variant, config: StudyConfig) -> list[_Stack]:
    """What needs no table, and MLE once more where it ran before and its table is needed."""
    stacks = []
    for (spec, seed), variants in missing.items():
        first = [v for v in variants if v.cost != "output-layer"]
        if len(first) < len(variants) and mle not in first:
            first = [mle, *first]
        if first:
            stacks.append(_Stack(spec, seed, tuple(first), config))
    return stacks


def _second_stacks(missing: dict, tables: dict, config: StudyConfig) -> list[_Stack]:
    return [
        _Stack(spec, seed, second, config, tables[spec, seed])
        for (spec, seed), variants in missing.items()
        if (second := tuple(v for v in variants if v.cost == "output-layer"))
    ]


class _Progress:
    """Keeps runs as they come, and says so."""

    def __init__(self, path: Path, done: dict, total: int, report: Callable) -> None:
        self.path, self.done, self.total, self.report = path, done, total, report
        self.start, self.count = time.monotonic(), 0

    def add(self, name: str, runs: Sequence[Run]) -> None:
        new = [run for run in runs if run.key not in self.done]
        if not new:
            return
        lines = "".join(json.dumps(asdict(run), allow_nan=False) + "\n" for run in new)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(lines)
        self.done.update({run.key: run for run in new})
        self.count += len(new)
        left = (time.monotonic() - self.start) / self.count * (self.total - self.count)
        best = min(new, key=lambda run: run.measures["avg_js"])
        self.report(
            f"{self.count}/{self.total} runs, {left / 60:.1f} min left: {name}, {len(new)} models, "
            f"least avg_js {best.measures['avg_js']:.3g} ({best.objective} {best.weight})"
        )


def _open_runs(path: Path, config: StudyConfig, resume: bool) -> list[Run]:
    """Return the runs of a file, or begin it."""
    if path.exists() and not resume:
        raise FileExistsError(f"{path}: exists; --resume goes on with it, --output names another")
    if path.exists():
        return read_runs(path, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "settings": config.to_json()}
    path.write_text(json.dumps(head) + "\n", encoding="utf-8")
    return []


def read_runs(path: Path, config: StudyConfig | None = None) -> list[Run]:
    """Return the runs of a file, and cut off a last line that was not written whole.

    Raises:
        ValueError: a file of another kind, or of settings other than `config`'s, each named.
    """
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    try:
        head, *rows = [json.loads(line) for line in lines[:-1]]
        if head["schema"] != SCHEMA:
            raise KeyError(head["schema"])
        runs = [Run(**row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected runs of schema {SCHEMA!r}: {error}") from error
    if config is not None:
        _check_settings(path, _flat(head["settings"]), _flat(config.to_json()))
    return runs


def _check_settings(path: Path, found: dict, expected: dict) -> None:
    for name in sorted(found.keys() | expected.keys()):
        # Only corpus languages need the text: one can be added to a file begun without.
        if found.get(name) != expected.get(name) and not (
            name == "text_sha256" and None in (found.get(name), expected.get(name))
        ):
            raise ValueError(
                f"{path}: {name}: expected {expected.get(name)}, the runs there have "
                f"{found.get(name)}; --output names another file"
            )


def _flat(settings: dict) -> dict:
    return {**{k: v for k, v in settings.items() if k != "training"}, **settings["training"]}


@contextmanager
def _workers(jobs: int) -> Iterator[Callable]:
    """Yield a map over stacks: in this process, or in `jobs` others in the order they end."""
    if jobs == 1:
        yield lambda stacks: map(_run_stack, stacks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        yield lambda stacks: pool.imap_unordered(_run_stack, stacks)


def _run_stack(stack: _Stack) -> tuple[_Stack, list[Run], Tensor]:
    """Return its runs and the first variant's output layer."""
    wall, cpu = time.monotonic(), time.process_time()
    spec, config = stack.spec, stack.config
    language, train, dev = _load_data(spec, stack.seed, config)
    cost = identity_cost(spec.vocab_size)
    if stack.output_weight is not None:
        cost = cost_matrix(stack.output_weight)
    fits = fit(
        train,
        dev,
        [variant.build() for variant in stack.variants],
        cost,
        spec.hidden_size,
        stack.seed,
        config.training,
        lambda epoch: _say_epoch(stack, epoch),
    )
    num = len(fits)
    seconds = (time.monotonic() - wall) / num, (time.process_time() - cpu) / num
    runs = [
        _make_run(stack, variant, _measure(language, one, dev), one, seconds)
        for variant, one in zip(stack.variants, fits, strict=True)
    ]
    return stack, runs, fits[0].output_weight


def _say_epoch(stack: _Stack, epoch: int) -> None:
    if epoch % 10 == 0:
        most = stack.config.training.max_epochs
        print(
            f"  {stack.name}, {len(stack.variants)} models: epoch {epoch} of at most {most}",
            file=sys.stderr,
            flush=True,
        )


def _measure(language: Language, trained: Fit, dev: Sequences) -> dict[str, float]:
    found = measure(language.rows, trained.log_q, language.expected_visits(), dev.counts())
    return {name: float(f"{value:.8g}") for name, value in found.items()}


def _make_run(
    stack: _Stack,
    variant: Variant,
    measures: dict[str, float],
    trained: Fit,
    seconds: tuple[float, float],
) -> Run:
    return Run(
        language=str(stack.spec),
        seed=stack.seed,
        objective=variant.objective,
        cost=variant.cost,
        weight=variant.weight,
        is_default=variant.is_default,
        measures=measures,
        num_epochs=trained.num_epochs,
        best_epoch=trained.best_epoch,
        seconds=round(seconds[0], 2),
        cpu_seconds=round(seconds[1], 2),
    )


@lru_cache(maxsize=2)
def _load_data(
    spec: LanguageSpec, seed: int, config: StudyConfig
) -> tuple[Language, Sequences, Sequences]:
    language = spec.build(seed, config.text)
    train = sample_sequences(language, config.num_train, [seed, 1])
    return language, train, sample_sequences(language, config.num_dev, [seed, 2])
