"""The YAML of a throughput study: model shapes, layouts, objectives, and how a step grows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_emo.scaling.counts.flops import OBJECTIVES
from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.plans.plan_file import LossSettings, Objective, PlanError, parse_section
from megatron_emo.scaling.plans.recipe import ModelSettings, SizeEntry, check_ranges, make_shape
from megatron_emo.scaling.speed.cluster import Efficiency
from megatron_emo.scaling.speed.cluster_layouts import LayoutRules, name_layout

MODES = ("strong", "weak")
PRECISIONS = ("fp32", "bf16", "fp8")
MOST_CELLS = 5000


@dataclass(frozen=True)
class LayoutEntry:
    """One layout, as a file names it."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    virtual_pipeline: int = 1
    micro_batch_size: int = 1
    sequence_parallel: bool = True
    """Where tensor_parallel is above 1."""

    def to_layout(self, is_cpu: bool) -> Layout:
        """Return the layout as train.sh runs it: on GPUs with the distributed optimizer.

        Raises:
            ValueError: a setting outside its range.
        """
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        return Layout(
            gpus=model * self.data_parallel,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            context_parallel=self.context_parallel,
            expert_parallel=self.expert_parallel,
            micro_batch_size=self.micro_batch_size,
            distributed_optimizer=not is_cpu,
            sequence_parallel=self.sequence_parallel,
            virtual_pipeline=self.virtual_pipeline,
        )


@dataclass(frozen=True)
class Machine:
    """Where cells run; names are those of a plan's `launch`."""

    nodes: int = 1
    gpus_per_node: int = 8
    """0: on the CPU."""
    ranks_per_node: int | None = None
    """Of a node without GPUs; None: one."""
    threads: int = 1
    """Of a rank, on a CPU."""

    def __post_init__(self) -> None:
        ranges = {"nodes": (1, 10**5), "gpus_per_node": (0, 1024), "threads": (1, 1024)}
        check_ranges("launch", self, ranges | {"ranks_per_node": (1, 1024)})
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"launch.ranks_per_node: expected gpus_per_node {self.gpus_per_node}, or none, "
                f"got {self.ranks_per_node}"
            )

    @property
    def is_cpu(self) -> bool:
        return self.gpus_per_node == 0

    @property
    def node_ranks(self) -> int:
        return self.gpus_per_node or self.ranks_per_node or 1


@dataclass(frozen=True)
class StudySpec:
    """A throughput study."""

    name: str
    model: ModelSettings
    sizes: Mapping[str, SizeEntry]
    layouts: tuple[LayoutEntry, ...]
    batch: int
    """Sequences of a step; in mode weak those of one data-parallel rank."""
    objectives: tuple[Objective, ...] = (Objective("mle", "mle"), Objective("emo1", "emo1"))
    """Ratios are taken against the first."""
    mode: str = "strong"
    precision: str = "bf16"
    rounds: int = 1
    """Times that every cell is run, objectives in turn."""
    launch: Machine = field(default_factory=Machine)
    loss: LossSettings = field(default_factory=LossSettings)
    assume: Efficiency = field(default_factory=Efficiency)
    """Of `estimate`."""
    arguments: tuple[str, ...] = ()
    """Megatron's flags of every cell."""

    def global_batch(self, data_parallel: int) -> int:
        """Return sequences of a step."""
        return self.batch * (data_parallel if self.mode == "weak" else 1)

    def shape(self, size: str, tensor_parallel: int) -> ModelShape:
        """Return the model of a size.

        Raises:
            ValueError: heads that do not divide the hidden size, and the like.
        """
        return make_shape(self.sizes[size], self.model, tensor_parallel)

    def rules(self, data_parallel: int) -> LayoutRules:
        return LayoutRules(
            self.global_batch(data_parallel), self.launch.node_ranks, self.launch.is_cpu
        )


def read_study_file(path: str | os.PathLike) -> StudySpec:
    """Return the study of a YAML file.

    Raises:
        PlanError: no YAML, an unknown, missing or ill-formed key, with the nearest known one.
        FileNotFoundError: no such file.
    """
    try:
        return parse_study(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PlanError(f"--plan {path}: {error}") from error


@dataclass(frozen=True)
class _Plain:
    """The keys that are values."""

    name: str
    batch: int
    mode: str = "strong"
    precision: str = "bf16"
    rounds: int = 1
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges("study", self, {"batch": (1, 10**9), "rounds": (1, 1000)})
        for name, known in (("mode", MODES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )


def parse_study(content: Any) -> StudySpec:
    """Return the study of plain values.

    Raises:
        PlanError: an unknown, missing or ill-formed key.
    """
    if not isinstance(content, Mapping):
        raise PlanError("study: expected keys and values")
    known = {f.name for f in fields(StudySpec)}
    for key in content:
        if key not in known:
            raise PlanError(f"{key}: unknown; known: {', '.join(sorted(known))}")
    for key in ("model", "sizes", "layouts"):
        if key not in content:
            raise PlanError(f"{key}: missing")
    plain = {f.name for f in fields(_Plain)}
    values = parse_section(_Plain, {k: v for k, v in content.items() if k in plain}, "study")
    sections = (("launch", Machine), ("loss", LossSettings), ("assume", Efficiency))
    spec = StudySpec(
        **vars(values),
        model=parse_section(ModelSettings, content["model"], "model"),
        sizes=_parse_sizes(content["sizes"]),
        layouts=_parse_layouts(content["layouts"]),
        objectives=_parse_objectives(content.get("objectives", ["mle", "emo1"])),
        **{name: parse_section(kind, content.get(name, {}), name) for name, kind in sections},
    )
    _check_study(spec)
    return spec


def _check_study(spec: StudySpec) -> None:
    if spec.launch.is_cpu and spec.precision == "fp8":
        raise PlanError("precision: expected fp32 or bf16 on a CPU, got 'fp8'")
    labels = [objective.label for objective in spec.objectives]
    if len(set(labels)) < len(labels):
        raise PlanError(f"objectives: expected each label once, got {', '.join(labels)}")
    names = [name_layout(entry.to_layout(spec.launch.is_cpu)) for entry in spec.layouts]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"layouts: expected each once, got {name} {names.count(name)} times")
    count = len(names) * len(spec.sizes) * len(labels) * spec.rounds
    if count > MOST_CELLS:
        raise PlanError(f"study: expected at most {MOST_CELLS:,} runs, got {count:,}")


def _parse_sizes(content: Any) -> dict[str, SizeEntry]:
    if not isinstance(content, Mapping) or not content:
        raise PlanError("sizes: expected model shapes by name: layers, hidden, heads, ffn")
    for name in content:
        if not str(name).replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise PlanError(f"sizes: expected names of letters, digits, -, _ and ., got {name!r}")
    return {
        str(name): parse_section(SizeEntry, entry, f"sizes.{name}")
        for name, entry in content.items()
    }


def _parse_objectives(content: Any) -> tuple[Objective, ...]:
    if not isinstance(content, list) or not content:
        raise PlanError("objectives: expected a list of at least one")
    found = []
    for item in content:
        entry = item if isinstance(item, Mapping) else {"objective": item}
        found.append(
            parse_section(Objective, {"label": entry.get("objective"), **entry}, "objectives")
        )
        if found[-1].objective not in OBJECTIVES:
            raise PlanError(f"objectives: expected some of {', '.join(OBJECTIVES)}, got {item!r}")
    return tuple(found)


def _parse_layouts(content: Any) -> tuple[LayoutEntry, ...]:
    """Entries of a list, or all combinations of lists by name."""
    if isinstance(content, Mapping):
        lists = {k: v if isinstance(v, list) else [v] for k, v in content.items()}
        content = [
            dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
        ]
        # Without tensor parallelism there is no sequence parallelism to vary.
        content = [
            entry
            for i, entry in enumerate(content)
            if _without_idle(entry) not in map(_without_idle, content[:i])
        ]
    if not isinstance(content, list) or not content:
        raise PlanError("layouts: expected a list of layouts, or lists of values by name")
    return tuple(parse_section(LayoutEntry, entry, "layouts") for entry in content)


def _without_idle(entry: Mapping[str, Any]) -> dict[str, Any]:
    idle = entry.get("tensor_parallel", 1) == 1
    return {k: v for k, v in entry.items() if not (idle and k == "sequence_parallel")}
