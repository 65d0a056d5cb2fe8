"""The study as tasks: a table and texts before the trainings, fits and tables after them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_emo.study.scaling.corpora import CORPORA, DEMO, HELD_OUT_BYTES
from megatron_emo.study.tasks import Task

ROOT = Path(__file__).resolve().parents[3]
STORIES = ("stories260K.bin", "tok512.bin")
LAW_SECONDS, PICTURE_SECONDS = 150.0, 60.0
"""Expected on one core with 200 resamples."""
TRAINED, HELD_OUT = "train.jsonl", "held_out.jsonl"


@dataclass(frozen=True)
class Study:
    """What is run, and where."""

    output: Path
    plan: Path
    """A plan without `data:`; each corpus gets its own."""
    root: Path
    """The data folder of corpora known by name."""
    stories: Path
    """A folder with STORIES."""
    corpora: tuple[str, ...]
    objectives: tuple[str, ...]
    """Labels of the plan's objectives, the baseline first."""
    model: Path | None = None
    """A Hugging Face folder whose tokenizer and output layer serve; None: stories260K's."""
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """{corpus: its files} where given."""
    held_out_bytes: int = HELD_OUT_BYTES
    draws: int = 200
    """Resamples of a fit and of a comparison."""
    core_tflops: float = 0.02
    """Of a run's process, for the hours that `plan` prints."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("--corpora: expected at least one, got none")
        if len(set(self.corpora)) < len(self.corpora):
            raise ValueError(f"--corpora: expected each once, got {','.join(self.corpora)}")
        known = {*CORPORA, DEMO, *self.files}
        for name in self.corpora:
            if name not in known:
                raise ValueError(
                    f"--corpora: expected some of {', '.join(sorted(known))}, got {name!r}"
                )

    @property
    def tokenizer(self) -> Path:
        """A Hugging Face folder."""
        return self.model or self.output / "model"

    @property
    def cost_embedding(self) -> Path:
        return self.output / "cost_embedding.safetensors"

    def data(self, corpus: str, name: str) -> Path:
        """A file of a corpus."""
        return self.output / corpus / "data" / name

    def prefix(self, corpus: str) -> Path:
        """A corpus's training tokens, without suffix."""
        return self.data(corpus, "train_text_document")

    def plan_of(self, corpus: str) -> Path:
        """The plan with its data."""
        return self.output / corpus / "plan.yaml"

    def folder(self, corpus: str) -> Path:
        """The folder of `run`, `score` and `pictures`."""
        return self.output / corpus / "study"

    def results(self, corpus: str) -> Path:
        """Where the table and its records go."""
        return self.output / "results" / corpus


def data_tasks(study: Study) -> list[Task]:
    """Return what comes before the trainings, the plan's own checks among it."""
    tasks = _model_tasks(study)
    for corpus in study.corpora:
        tasks += _corpus_tasks(study, corpus)
    return tasks


def _model_tasks(study: Study) -> list[Task]:
    tasks = []
    if study.model is None:
        files = tuple(study.stories / name for name in STORIES)
        script = str(ROOT / "examples" / "stories260k" / "convert_to_hf.py")
        command = (sys.executable, script, "--checkpoint", str(files[0]))
        command += ("--tokenizer", str(files[1]), "--output", str(study.tokenizer), "--overwrite")
        tasks.append(Task("model", command, (study.tokenizer,), files, title="stories260K"))
    command = ("--from-hf", str(study.tokenizer), *_tokenizer_flags(study))
    command += ("--output", str(study.cost_embedding), "--overwrite")
    costs = _tool("prepare_cost_embedding", *command)
    outputs = (study.cost_embedding,)
    return [*tasks, Task("costs", costs, outputs, (study.tokenizer,), title="cost table")]


def _corpus_tasks(study: Study, corpus: str) -> list[Task]:
    tasks, files = [], list(study.files.get(corpus, ()))
    if corpus == DEMO and not files:
        files = [study.data(corpus, "corpus.jsonl")]
        command = _tool("make_demo_corpus", "--output", str(files[0]))
        tasks.append(Task(f"{corpus}/corpus", command, tuple(files), title="demo corpus"))
    command = ("--name", corpus, "--output", str(study.data(corpus, "")))
    command += ("--held-out-bytes", str(study.held_out_bytes))
    if files:
        command += ("--files", *map(str, files))
    else:
        files = [study.root / file for file in CORPORA[corpus][1]]
        command += ("--root", str(study.root))
    texts = tuple(study.data(corpus, name) for name in (TRAINED, HELD_OUT))
    title = f"{corpus}: texts"
    tasks.append(
        Task(f"{corpus}/texts", _module("corpora", *command), texts, tuple(files), title=title)
    )
    prefix = study.prefix(corpus)
    command = ("--input", str(texts[0]), *_tokenizer_flags(study), "--append-eod", "--overwrite")
    command += ("--output-prefix", str(prefix).removesuffix("_text_document"))
    tokens = tuple(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
    inputs = (texts[0], study.tokenizer)
    command = _tool("preprocess_data", *command)
    tasks.append(Task(f"{corpus}/tokens", command, tokens, inputs, title=f"{corpus}: tokens"))
    return [*tasks, *_plan_tasks(study, corpus, (*texts[1:], *tokens))]


def _plan_tasks(study: Study, corpus: str, data: Sequence[Path]) -> list[Task]:
    path, table = study.plan_of(corpus), study.output / corpus / "plan.json"
    command = ("--template", str(study.plan), "--output", str(path))
    command += ("--path", str(study.prefix(corpus)), "--tokenizer", str(study.tokenizer))
    command += ("--held-out", str(study.data(corpus, HELD_OUT)))
    command = _module("write_plan", *command, "--cost-embedding", str(study.cost_embedding))
    inputs = (study.plan, study.tokenizer, study.cost_embedding, *data)
    check = _tool("scaling_study", "plan", "--plan", str(path), "--json", str(table))
    check += ("--peak-tflops", str(study.core_tflops), "--mfu", "1")
    return [
        Task(f"{corpus}/plan", command, (path,), inputs, title=f"{corpus}: plan"),
        Task(f"{corpus}/check", check, (table,), (path,), title=f"{corpus}: plan checked"),
    ]


def training_commands(study: Study, corpus: str, jobs: int) -> list[tuple[str, ...]]:
    """Return `run` and `score`, which take up what they had begun and say themselves how far."""
    common = ("--output", str(study.folder(corpus)), "--jobs", str(jobs))
    return [
        _tool("scaling_study", "run", "--plan", str(study.plan_of(corpus)), *common, "--resume"),
        _tool("scaling_study", "score", *common),
    ]


def analysis_tasks(study: Study) -> list[Task]:
    """Return what is made of the tables of runs."""
    tasks = []
    for corpus in study.corpora:
        folder, results = study.folder(corpus), study.results(corpus)
        table, plan = folder / "runs.csv", study.output / corpus / "plan.json"
        laws = study.output / corpus / "laws"
        command = ("--csv", str(table), "--output", str(laws), "--bootstrap", str(study.draws))
        command = _module("laws", *command, "--objectives", ",".join(study.objectives))
        title = f"{corpus}: laws and comparison"
        kind = {"title": title, "seconds": LAW_SECONDS}
        tasks.append(Task(f"{corpus}/laws", command, (laws,), (table,), **kind))
        command = _module("summary", "--corpus", corpus, "--study", str(folder))
        command += ("--laws", str(laws), "--plan", str(plan), "--output", str(results))
        outputs = tuple(results / name for name in ("table.md", "summary.json", "records.json"))
        inputs = (table, laws, plan)
        tasks.append(Task(f"{corpus}/summary", command, outputs, inputs, title=f"{corpus}: table"))
        command = ("--study", str(folder), "--bootstrap", str(max(20, study.draws)))
        command = _module("pictures", *command)
        title = f"{corpus}: pictures and page"
        outputs = (folder / "pictures", folder / "report.html")
        kind = {"title": title, "seconds": PICTURE_SECONDS}
        tasks.append(Task(f"{corpus}/pictures", command, outputs, (table,), **kind))
    return tasks


def _tokenizer_flags(study: Study) -> tuple[str, ...]:
    return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(study.tokenizer))


def _module(name: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"megatron_emo.study.scaling.{name}", *args)


def _tool(name: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "tools" / f"{name}.py"), *args)
