"""The calibration as tasks: data, the model in Megatron, each objective, measures, a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from megatron_emo.evaluation.icl_tasks import load_task
from megatron_emo.study.calibration.cost import Cost
from megatron_emo.study.language_modeling.plan import ROOT, count_tokens
from megatron_emo.study.language_modeling.sizes import OBJECTIVES
from megatron_emo.study.tasks import Task

UNTOUCHED = "untouched"
"""In the place of an objective: the model as it came."""
_TRACKER = "latest_checkpointed_iteration.txt"
_LOCAL_LAYERS = (
    *("--transformer-impl", "local", "--attention-backend", "unfused", "--no-rope-fusion"),
    *("--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    "--no-gradient-accumulation-fusion",
)
"""Megatron's own, without the kernels that Transformer Engine and Apex bring."""


@dataclass(frozen=True)
class Training:
    """One run of pretrain(): the settings of the paper's continual fine-tuning."""

    batch_size: int = 16
    """Sequences."""
    micro_batch_size: int = 4
    block: int = 256
    """Tokens of a sequence."""
    lr: float = 2e-5
    """Falls to 0 along a line."""
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    save_interval: int = 50
    """Iterations between checkpoints that a run which was cut off goes on from."""

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"--block: expected at least 2 tokens, got {self.block}")
        if min(self.batch_size, self.micro_batch_size, self.save_interval) < 1 or self.lr <= 0:
            raise ValueError("--batch, --micro-batch, --save-interval, --lr: expected above 0")


@dataclass(frozen=True)
class Measures:
    """What is asked of each model."""

    tasks: tuple[str, ...]
    """Of few-shot classification."""
    task_data: Path
    texts: Mapping[str, Path]
    """{name: file} on which perplexity is measured."""
    documents: int | None
    """Of each text; None for all."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """{task: questions}; those of "" hold for tasks that are not named."""
    shots: Mapping[str, int] = field(default_factory=dict)
    """The same of shots; a task's own where none is given."""
    scorings: str = "ppl,label"
    dtype: str = "float32"
    """Models are measured in."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            load_task(task)
        for flag, numbers in (("--limit", self.limits), ("--shots", self.shots)):
            if unknown := sorted(set(numbers) - {"", *self.tasks}):
                expected = ", ".join(self.tasks)
                raise ValueError(f"{flag}: expected tasks of {expected}, got {unknown[0]!r}")

    def limit(self, task: str) -> int | None:
        return self.limits.get(task, self.limits.get(""))

    def num_shots(self, task: str) -> int | None:
        return self.shots.get(task, self.shots.get(""))


@dataclass(frozen=True)
class Study:
    """What is run, and where."""

    model: Path
    """A Hugging Face folder."""
    output: Path
    text: tuple[Path, ...]
    sentences: int
    measures: Measures
    training: Training = field(default_factory=Training)
    objectives: tuple[str, ...] = ("mle", "emo1")
    seeds: tuple[int, ...] = (100,)
    """Of the order of the data."""
    gpus: int = 0
    tensor_parallel: int = 1
    megatron_args: tuple[str, ...] = ()
    """Added to every training."""
    cost: Cost | None = None
    """What tasks are expected to take; None where nobody knows."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.objectives) - set(OBJECTIVES))
        if unknown or "mle" not in self.objectives:
            expected = f"mle, and any of {', '.join(OBJECTIVES)}"
            raise ValueError(f"--objectives: expected {expected}, got {','.join(self.objectives)}")
        if not self.seeds or min(self.seeds) < 1 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds: expected different numbers from 1 on, got {self.seeds}")
        if not (self.model / "config.json").is_file():
            raise ValueError(f"--model {self.model}: expected a folder with config.json")
        if self.tensor_parallel < 1 or self.gpus % self.tensor_parallel:
            raise ValueError(
                f"--gpus: expected a multiple of --tensor-parallel {self.tensor_parallel}, "
                f"got {self.gpus}"
            )
        once = self.training.micro_batch_size * self.data_parallel
        if self.training.batch_size % once:
            raise ValueError(
                f"--batch: expected a multiple of {once} (--micro-batch times ranks that share "
                f"it), got {self.training.batch_size}"
            )

    @property
    def data_parallel(self) -> int:
        return self.gpus // self.tensor_parallel if self.gpus else 1

    @property
    def prefix(self) -> Path:
        """The training tokens, without suffix."""
        return self.output / "data" / "train_text_document"

    @property
    def checkpoint(self) -> Path:
        """The model as a Megatron checkpoint."""
        return self.output / "base" / "checkpoints"

    @property
    def cost_table(self) -> Path:
        return self.output / "base" / "cost_embedding.safetensors"

    def cell(self, objective: str, seed: int | None) -> Path:
        """Where a model's files are."""
        return self.output / "cells" / (objective if seed is None else f"{objective}/seed{seed}")

    def model_of(self, objective: str, seed: int | None) -> Path:
        """A model as a Hugging Face folder."""
        return self.model if seed is None else self.cell(objective, seed) / "hf"

    def cells(self) -> list[tuple[str, int | None]]:
        """Objective and seed of each model that is measured; the untouched one has no seed."""
        trained = [(objective, seed) for seed in self.seeds for objective in self.objectives]
        return [(UNTOUCHED, None), *trained]


def data_tasks(study: Study) -> list[Task]:
    """Return the tasks before the number of training tokens is known."""
    data, measures = study.output / "data", study.measures
    texts = ("--text", *map(str, study.text), "--sentences", str(study.sentences))
    for name, path in measures.texts.items():
        texts += ("--eval", f"{name}={path}")
    if measures.documents is not None:
        texts += ("--documents", str(measures.documents))
    written = (data / "train.jsonl", *(data / f"eval-{name}.jsonl" for name in measures.texts))
    prefix = str(study.prefix)
    tokens = ("--input", str(data / "train.jsonl"), "--append-eod", "--overwrite")
    tokens += ("--output-prefix", prefix.removesuffix("_text_document"), *_tokenizer(study))
    return [
        Task(
            "data/texts",
            _module("texts", *texts, "--output", str(data)),
            written,
            (*study.text, *measures.texts.values()),
            title="sentences",
        ),
        Task(
            "data/tokens",
            _tool("preprocess_data", *tokens),
            (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")),
            (written[0], study.model),
            title="tokens",
        ),
    ]


def count_iters(study: Study) -> int:
    """Return the iterations of one epoch; what does not fill a batch is left out.

    Raises:
        FileNotFoundError: the tokens are not there yet.
        ValueError: they fill no batch.
    """
    tokens, training = count_tokens(study.prefix), study.training
    # The last token is a target alone.
    iters = (tokens - 1) // training.block // training.batch_size
    if not iters:
        raise ValueError(
            f"--sentences: {study.sentences:,} make {tokens:,} tokens, expected more than "
            f"{training.batch_size * training.block:,} (--batch times --block)"
        )
    return iters


def study_tasks(study: Study) -> list[Task]:
    """Return all tasks; the training tokens of `data_tasks` are there.

    Raises:
        FileNotFoundError: they are not.
        ValueError: they fill no batch.
    """
    tasks = [*data_tasks(study), *_base_tasks(study)]
    # Trainings first: they take longest, and --jobs shares them out best at the start.
    for objective, seed in study.cells():
        if seed is not None:
            tasks += _training_tasks(study, objective, seed)
    for objective, seed in study.cells():
        tasks += _measure_tasks(study, objective, seed)
    results = study.output / "results"
    records = [path for task in tasks if task.name.startswith("measure/") for path in task.outputs]
    command = _module("summary", "--cells", str(study.output / "cells"), "--output", str(results))
    outputs = tuple(results / name for name in ("table.md", "summary.json", "records.json"))
    return [*tasks, Task("summary", command, outputs, tuple(records), title="table")]


def _module(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"megatron_emo.study.calibration.{name}", *words)


def _tool(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "tools" / f"{name}.py"), *words)


def _tokenizer(study: Study) -> tuple[str, ...]:
    return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(study.model))


def _base_tasks(study: Study) -> Iterator[Task]:
    words = ("import", "--hf", str(study.model), "--output", str(study.checkpoint), "--overwrite")
    words += ("--tensor-model-parallel-size", str(study.tensor_parallel))
    # The logits are compared when a trained model is exported, through the same rules.
    command = _tool("convert_checkpoint", *words, "--verify", "weights")
    outputs = (study.checkpoint / _TRACKER,)
    yield Task("base/import", command, outputs, (study.model,), title="model to Megatron")
    words = ("--from-hf", str(study.model), *_tokenizer(study), "--output", str(study.cost_table))
    command = _tool("prepare_cost_embedding", *words, "--overwrite")
    yield Task("base/costs", command, (study.cost_table,), (study.model,), title="cost table")


def _training_tasks(study: Study, objective: str, seed: int) -> Iterator[Task]:
    name, title = f"train/{objective}/seed{seed}", f"{objective} seed {seed}"
    cell, iters = study.cell(objective, seed), count_iters(study)
    # Of the last iteration, and not the tracker: a run that ends early has one too.
    trained = cell / "checkpoints" / f"iter_{iters:07d}"
    inputs = (study.checkpoint / _TRACKER, study.cost_table, Path(f"{study.prefix}.idx"))
    tokens = iters * study.training.batch_size * study.training.block
    seconds = study.cost and study.cost.training(tokens)
    command = (*_launch(study), *_training_flags(study, objective, seed, iters))
    yield Task(
        name,
        command,
        (trained,),
        inputs,
        # Megatron asks for it where tensor parallelism overlaps with its communication.
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if study.gpus else {},
        title=f"{title}: {iters} iterations",
        seconds=seconds,
        # Or another learning rate would go on from, and end with, these weights.
        resumes=(cell / "checkpoints",),
    )
    words = ("export", "--megatron", str(cell / "checkpoints"), "--output", str(cell / "hf"))
    # bf16 runs train fp32 masters; what these few steps change, bf16 would partly round away.
    words += ("--hf-config", str(study.model), "--dtype", "float32", "--overwrite")
    yield Task(
        f"export/{objective}/seed{seed}",
        _tool("convert_checkpoint", *words),
        (cell / "hf",),
        (trained, study.model),
        title=f"{title}: exported and compared",
        seconds=study.cost and study.cost.export,
    )


def _launch(study: Study) -> tuple[str, ...]:
    ranks = study.gpus or study.tensor_parallel
    script = str(ROOT / "pretrain_gpt_emo.py")
    if ranks == 1:
        return (sys.executable, script)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return (sys.executable, *launcher, script)


def _training_flags(study: Study, objective: str, seed: int, iters: int) -> tuple[str, ...]:
    """--load is the run's own folder: it goes on there when there is a checkpoint."""
    training, cell = study.training, study.cell(objective, seed)
    values = {
        "--tensor-model-parallel-size": study.tensor_parallel,
        "--seq-length": training.block,
        "--micro-batch-size": training.micro_batch_size,
        "--global-batch-size": training.batch_size,
        "--train-iters": iters,
        "--lr": training.lr,
        "--min-lr": 0.0,
        "--lr-decay-style": "linear",
        "--lr-decay-iters": iters,
        "--lr-warmup-fraction": training.warmup_share,
        "--weight-decay": training.weight_decay,
        "--adam-beta2": 0.999,
        "--clip-grad": 1.0,
        "--seed": seed,
        "--data-path": study.prefix,
        "--data-cache-path": cell / "index",
        "--split": "100,0,0",
        "--num-workers": 0,
        "--eval-iters": 0,
        "--eval-interval": iters,
        "--log-interval": 1,
        "--tensorboard-log-interval": 1,
        "--tensorboard-dir": cell / "tensorboard",
        "--pretrained-checkpoint": study.checkpoint,
        "--save": cell / "checkpoints",
        "--load": cell / "checkpoints",
        "--save-interval": training.save_interval,
        # Of an iteration that never comes: only the last checkpoint is kept.
        "--save-retain-interval": training.save_interval * 1_000_000,
        "--objective": objective,
        # For mle too: it then logs the same expected cost.
        "--emo-cost-embedding": study.cost_table,
    }
    flags = [str(word) for pair in values.items() for word in pair]
    flags += ["--use-checkpoint-args", "--attention-softmax-in-fp32", *_tokenizer(study)]
    return (*flags, *OBJECTIVES[objective], *_device_flags(study), *study.megatron_args)


def _device_flags(study: Study) -> tuple[str, ...]:
    if not study.gpus:
        return ()
    return ("--bf16",) if find_spec("transformer_engine") else ("--bf16", *_LOCAL_LAYERS)


def _measure_tasks(study: Study, objective: str, seed: int | None) -> Iterator[Task]:
    measures, model = study.measures, study.model_of(objective, seed)
    common = ("--model", str(model), "--dtype", measures.dtype)
    for task in measures.tasks:
        words = ("icl", *common, "--task", task, "--data", str(measures.task_data))
        words += ("--scoring", measures.scorings)
        for flag, value in (
            ("--limit", measures.limit(task)),
            ("--shots", measures.num_shots(task)),
        ):
            words += () if value is None else (flag, str(value))
        seconds = study.cost and study.cost.questions(task, measures.limit(task))
        files = (Path(task),) if Path(task).is_file() else ()
        yield _measure_task(study, objective, seed, load_task(task).name, words, files, seconds)
    for text in measures.texts:
        path = study.output / "data" / f"eval-{text}.jsonl"
        # BOS means "a chat begins" to some models: a text's first token is not scored instead.
        words = ("perplexity", *common, "--texts", str(path), "--prefix", "none")
        words += ("--label", f"text={text}")
        seconds = study.cost and study.cost.documents(text, measures.documents)
        yield _measure_task(study, objective, seed, text, words, (path,), seconds)


def _measure_task(
    study: Study,
    objective: str,
    seed: int | None,
    measured: str,
    words: tuple[str, ...],
    inputs: tuple[Path, ...],
    seconds: float | None,
) -> Task:
    cell = study.cell(objective, seed)
    output, answers = cell / f"{measured}.json", cell / "answers" / f"{measured}.jsonl"
    labels = {"study": "calibration", "objective": objective}
    labels |= {} if seed is None else {"seed": str(seed)}
    words += tuple(word for k, v in labels.items() for word in ("--label", f"{k}={v}"))
    title = objective if seed is None else f"{objective} seed {seed}"
    return Task(
        "/".join(("measure", *cell.relative_to(study.output / "cells").parts, measured)),
        _module("measure", "--output", str(output), "--answers", str(answers), *words),
        (output, answers),
        (study.model_of(objective, seed), *inputs),
        title=f"{title}: {measured}",
        seconds=seconds,
    )
