"""The study as tasks: data, base model, cost table, then each cell, and a table of all."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_emo.study.language_modeling.corpora import DOMAINS, SPLITS
from megatron_emo.study.language_modeling.sizes import OBJECTIVES, Size, Training
from megatron_emo.study.tasks import Task

ROOT = Path(__file__).resolve().parents[3]
BASE = "base"
"""In the place of an objective: the base model, untouched."""

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_DATA_FILES = (*(f"{split}.jsonl" for split in SPLITS), "prompts.jsonl")


@dataclass(frozen=True)
class Study:
    """What is run, and where."""

    size: Size
    output: Path
    root: Path
    """The data folder of the domains known by name."""
    base_hf: Path | None = None
    """A Hugging Face folder as base; None: trained here."""
    featurizer: Path | None = None
    """Of MAUVE; None: the base."""
    files: Mapping[str, tuple[Path, Path, Path]] = field(default_factory=dict)
    """{domain: train, valid, test} where given."""
    only: tuple[str, ...] = ()
    """Domains that have cells; () for all. The base is of all in either case."""
    seed: int = 1
    """Of splits and of the base."""
    gpus: int = 0
    megatron_args: tuple[str, ...] = ()
    """Added to every training, as parallelism or precision."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.size.objectives) - set(OBJECTIVES))
        if unknown:
            raise ValueError(
                f"--objectives: expected some of {', '.join(OBJECTIVES)}, got {unknown[0]!r}"
            )
        if unknown := sorted(set(self.only) - set(self.size.domains)):
            domains = ", ".join(self.size.domains)
            raise ValueError(f"--only: expected some of {domains}, got {unknown[0]!r}")
        if "mle" not in self.size.objectives:
            raise ValueError("--objectives: expected mle among them: entropies are matched to it")
        if not self.size.seeds or min(self.size.seeds) < 1:
            # Megatron takes no seed below 1.
            raise ValueError(f"--seeds: expected numbers from 1 on, got {self.size.seeds}")
        if (self.size.base is None) == (self.base_hf is None):
            raise ValueError(
                "--base: expected a Hugging Face folder with --size paper, and with no other, "
                f"got {self.base_hf}"
            )

    @property
    def cell_domains(self) -> tuple[str, ...]:
        return self.only or self.size.domains

    @property
    def base_model(self) -> Path:
        """The base as a Hugging Face folder."""
        return self.base_hf or self.output / "base" / "hf"

    @property
    def base_checkpoint(self) -> Path:
        """The base as a Megatron checkpoint."""
        return self.output / "base" / "checkpoints"

    @property
    def tokenizer_args(self) -> tuple[str, ...]:
        """Megatron's flags of the tokenizer."""
        if self.base_hf:
            return (
                "--tokenizer-type",
                "HuggingFaceTokenizer",
                "--tokenizer-model",
                str(self.base_hf),
            )
        model = self.output / "data" / "tokenizer.model"
        return ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model))

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file, or the folder it is in."""
        return Path(self.tokenizer_args[-1])

    def data(self, domain: str, name: str) -> Path:
        """A file of a domain's data."""
        return self.output / "data" / domain / name

    def prefix(self, domain: str) -> Path:
        """A domain's training tokens, without suffix; `all` has those of all domains."""
        return self.output / "data" / domain / "train_text_document"

    def cell(self, domain: str, objective: str, seed: int) -> Path:
        """Where a cell's files are."""
        return self.output / "cells" / domain / objective / f"seed{seed}"


def data_tasks(study: Study) -> list[Task]:
    """Return the tasks before the number of training tokens is known."""
    named = [name for name in study.size.domains if name not in study.files]
    corpora = ["--output", str(study.output / "data"), "--root", str(study.root)]
    corpora += ["--domains", ",".join(named), "--seed", str(study.seed)]
    corpora += ["--num-prompts", str(study.size.num_prompts)]
    for name, paths in study.files.items():
        corpora += ["--files", f"{name}={','.join(map(str, paths))}"]
    texts = [study.data(name, file) for name in study.size.domains for file in _DATA_FILES]
    sources = [path for paths in study.files.values() for path in paths]
    for name in named:
        sources += [study.root / file for file in (*DOMAINS[name].files, *DOMAINS[name].test_files)]
    tasks = [
        Task(
            "data/texts",
            _module("corpora", *corpora),
            tuple(texts),
            tuple(sources),
            title="documents and prompts",
            seconds=study.size.seconds.get("data"),
        )
    ]
    train = [study.data(name, "train.jsonl") for name in study.size.domains]
    if study.size.base:
        tasks.append(_tokenizer_task(study, train))
    for name in study.size.domains:
        tasks.append(_tokens_task(study, name, [study.data(name, "train.jsonl")]))
    if study.size.base:
        tasks.append(_tokens_task(study, "all", train))
    return tasks


def study_tasks(study: Study) -> list[Task]:
    """Return all tasks; the training tokens of `data_tasks` are there.

    Raises:
        FileNotFoundError: they are not, and steps are counted in epochs.
    """
    size = study.size
    tasks = [*data_tasks(study), *_base_tasks(study)]
    cells = [
        (domain, seed, objective)
        for seed in size.seeds
        for domain in study.cell_domains
        for objective in sorted(size.objectives, key=lambda name: name != "mle")
    ]
    records = []
    for domain, seed, objective in cells:
        is_first = objective == "mle" and seed == size.seeds[0]
        tasks += _cell_tasks(study, domain, objective, seed, verify=is_first)
        records.append(study.cell(domain, objective, seed) / "records.json")
    for domain in study.cell_domains:
        seed = size.seeds[0]
        tasks.append(_evaluation_task(study, domain, BASE, seed, study.base_model))
        records.append(study.cell(domain, BASE, seed) / "records.json")
    results = study.output / "results"
    outputs = tuple(results / name for name in ("table.md", "summary.json", "records.json"))
    summary = _module("summary", "--cells", str(study.output / "cells"), "--output", str(results))
    tasks.append(Task("summary", summary, outputs, tuple(records), title="table"))
    return tasks


def _module(name: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"megatron_emo.study.language_modeling.{name}", *args)


def _tool(name: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "tools" / f"{name}.py"), *args)


def _tokenizer_task(study: Study, train: Sequence[Path]) -> Task:
    model = study.output / "data" / "tokenizer.model"
    command = _tool("train_tokenizer", "--input", *map(str, train), "--output", str(model))
    command += ("--vocab-size", str(study.size.vocab_size), "--overwrite")
    return Task("data/tokenizer", command, (model,), tuple(train), title="tokenizer")


def _tokens_task(study: Study, name: str, texts: Sequence[Path]) -> Task:
    prefix = study.prefix(name)
    output = str(prefix).removesuffix("_text_document")
    command = _tool("preprocess_data", "--input", *map(str, texts), "--output-prefix", output)
    command += (*study.tokenizer_args, "--append-eod", "--overwrite")
    outputs = tuple(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
    inputs = (*texts, study.tokenizer)
    return Task(f"data/tokens-{name}", command, outputs, inputs, title=f"tokens of {name}")


def _base_tasks(study: Study) -> Iterator[Task]:
    seconds = study.size.seconds
    tracker = study.base_checkpoint / "latest_checkpointed_iteration.txt"
    table = study.output / "cost_embedding.safetensors"
    if study.base_hf:
        command = ("import", "--hf", str(study.base_hf), "--output", str(study.base_checkpoint))
        command = _tool("convert_checkpoint", *command, "--overwrite")
        yield Task("base/import", command, (tracker,), (study.base_hf,), title="base to Megatron")
    else:
        command = _pretrain(study, study.size.base, "all", "mle", study.seed, study.base_checkpoint)
        inputs = (Path(f"{study.prefix('all')}.idx"),)
        kind = {"title": "base model by MLE", "seconds": seconds.get("base")}
        kind["resumes"] = (study.base_checkpoint,)
        yield Task("base/train", command, (tracker,), inputs, **kind)
        command = _export(study, study.base_checkpoint, study.base_model, verify=True)
        yield Task("base/export", command, (study.base_model,), (tracker,), title="base, exported")
    command = ("--from-hf", str(study.base_model), *study.tokenizer_args, "--output", str(table))
    command = _tool("prepare_cost_embedding", *command, "--overwrite")
    yield Task("base/costs", command, (table,), (study.base_model,), title="cost table")


def _cell_tasks(
    study: Study, domain: str, objective: str, seed: int, verify: bool
) -> Iterator[Task]:
    cell, seconds = study.cell(domain, objective, seed), study.size.seconds
    name = f"{domain}/{objective}/seed{seed}"
    tracker = cell / "checkpoints" / "latest_checkpointed_iteration.txt"
    table = study.output / "cost_embedding.safetensors"
    start = study.base_checkpoint / "latest_checkpointed_iteration.txt"
    command = _pretrain(study, study.size.tuning, domain, objective, seed, cell / "checkpoints")
    command += ("--pretrained-checkpoint", str(study.base_checkpoint))
    command += ("--emo-cost-embedding", str(table))
    yield Task(
        f"{name}/train",
        command,
        (tracker,),
        (start, table, Path(f"{study.prefix(domain)}.idx")),
        title=f"{domain} {objective} seed {seed} trained",
        seconds=seconds.get("train"),
        resumes=(cell / "checkpoints",),
    )
    yield Task(
        f"{name}/export",
        _export(study, cell / "checkpoints", cell / "hf", verify),
        (cell / "hf",),
        (tracker,),
        title=f"{domain} {objective} seed {seed} exported",
        seconds=seconds.get("export"),
    )
    yield _evaluation_task(study, domain, objective, seed, cell / "hf")


def _pretrain(
    study: Study, training: Training, domain: str, objective: str, seed: int, save: Path
) -> tuple[str, ...]:
    """The command of one training; --load is its own folder, so that it goes on where it was."""
    size, iters = study.size, count_iters(study, training, domain)
    launch: tuple[str, ...] = (sys.executable,)
    if study.gpus:
        launch += ("-m", "torch.distributed.run", "--standalone")
        launch += ("--nproc-per-node", str(study.gpus))
    values = {
        "--seq-length": size.seq_length,
        "--max-position-embeddings": size.seq_length,
        "--micro-batch-size": training.batch_size // max(1, study.gpus),
        "--global-batch-size": training.batch_size,
        "--train-iters": iters,
        "--lr": training.lr,
        "--min-lr": training.min_lr,
        "--lr-decay-style": training.lr_decay_style,
        "--lr-decay-iters": iters,
        "--lr-warmup-fraction": training.warmup_share,
        "--weight-decay": training.weight_decay,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--seed": seed,
        "--data-path": study.prefix(domain),
        "--data-cache-path": save.parent / "index",
        "--split": "100,0,0",
        "--num-workers": 0,
        "--eval-iters": 0,
        "--eval-interval": iters,
        "--log-interval": 10,
        "--tensorboard-dir": save.parent / "tensorboard",
        "--save": save,
        "--load": save,
        "--save-interval": training.save_interval or iters,
        "--objective": objective,
    }
    flags = [str(word) for pair in values.items() for word in pair]
    if training.save_interval is None:
        flags += ["--no-save-optim", "--no-save-rng"]
    model = ("--use-checkpoint-args",) if study.base_hf else size.model
    script = str(ROOT / "pretrain_gpt_emo.py")
    settings = OBJECTIVES[objective]
    return (
        *(*launch, script, *model, *study.tokenizer_args, *flags, *settings),
        *study.megatron_args,
    )


def count_iters(study: Study, training: Training, domain: str) -> int:
    """Return the iterations asked for, or those of `epochs` over a domain's training tokens.

    Raises:
        FileNotFoundError: the tokens are to be counted and not there.
    """
    if training.iters is not None:
        return training.iters
    tokens = count_tokens(study.prefix(domain))
    return math.ceil(training.epochs * tokens / (training.batch_size * study.size.seq_length))


def count_tokens(prefix: Path) -> int:
    """Return the tokens of a .bin/.idx pair, by the size of the one and the dtype in the other.

    Raises:
        ValueError: an .idx of another format.
    """
    index = Path(f"{prefix}.idx")
    with open(index, "rb") as file:
        magic = file.read(len(_IDX_MAGIC))
        _version, code = struct.unpack("<QB", file.read(9))
    if magic != _IDX_MAGIC or code not in _TOKEN_BYTES:
        raise ValueError(f"{index}: expected Megatron's indexed data set, got {magic!r}, {code}")
    return Path(f"{prefix}.bin").stat().st_size // _TOKEN_BYTES[code]


def _export(study: Study, megatron: Path, output: Path, verify: bool) -> tuple[str, ...]:
    command = ("export", "--megatron", str(megatron), "--output", str(output), "--overwrite")
    if study.base_hf:
        command += ("--hf-config", str(study.base_hf))
    else:
        command += ("--tokenizer-model", str(study.tokenizer))
    return _tool("convert_checkpoint", *command, *(() if verify else ("--no-verify",)))


def _evaluation_task(study: Study, domain: str, objective: str, seed: int, model: Path) -> Task:
    size, cell = study.size, study.cell(domain, objective, seed)
    control = study.cell(domain, "mle", seed) / "hf"
    featurizer = study.featurizer or study.base_model
    values = {
        "--model": model,
        "--match-entropy-of": control,
        "--featurizer": featurizer,
        "--data": study.output / "data" / domain,
        "--output": cell,
        "--cache": study.output / "features",
        "--seed": seed,
        "--max-new-tokens": size.max_new_tokens,
        "--batch-size": size.generation_batch,
        "--clusterings": size.clusterings,
    }
    limits = {
        "--num-prompts": size.num_prompts,
        "--test-documents": size.test_documents,
        "--valid-documents": size.valid_documents,
    }
    values |= {flag: value for flag, value in limits.items() if value is not None}
    flags = [str(word) for pair in values.items() for word in pair]
    labels = {"study": "language_modeling", "domain": domain, "objective": objective}
    for label, value in (labels | {"seed": str(seed)}).items():
        flags += ["--label", f"{label}={value}"]
    data = tuple(study.data(domain, name) for name in _DATA_FILES if name != "train.jsonl")
    inputs = tuple(dict.fromkeys((model, control, featurizer)))
    return Task(
        f"{domain}/{objective}/seed{seed}/evaluate",
        _module("evaluate_cell", *flags),
        (cell / "records.json", cell / "documents.jsonl"),
        (*inputs, *data),
        title=f"{domain} {objective} seed {seed} evaluated",
        seconds=size.seconds.get("evaluate"),
    )
