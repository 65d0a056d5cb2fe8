"""From a throughput study to its cells: the runs of train.sh that are to be timed."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import megatron_emo
from megatron_emo.scaling.counts.flops import OBJECTIVES
from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.plans.plan_file import Objective, PlanError
from megatron_emo.scaling.plans.recipe import make_shape
from megatron_emo.scaling.plans.run_arguments import model_arguments, parallel_arguments
from megatron_emo.scaling.speed.cluster_layouts import count_nodes, find_obstacle, name_layout
from megatron_emo.scaling.speed.throughput_file import StudySpec

_OPTIMIZER = (
    "--lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 1 --weight-decay 0.1 "
    "--adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.02 --seed 1234"
)
MANY_SHOWN = 20


@dataclass(frozen=True)
class Timing:
    """Which steps count."""

    steps: int = 20
    """Timed, after the warm-up."""
    warmup: int = 5
    """Dropped: allocators, compilers and connections settle in them."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("warmup", 2)):
            if getattr(self, name) < least:
                raise PlanError(f"--{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cell:
    """One run: a model, a layout, an objective, a round."""

    size: str
    layout: Layout
    objective: Objective
    round: int
    shape: ModelShape
    batch: int
    """Sequences of a step."""
    vocab_size: int
    make_vocab_size_divisible_by: int

    @property
    def layout_name(self) -> str:
        return name_layout(self.layout)

    @property
    def name(self) -> str:
        return f"{self.size}_{self.layout_name}_{self.objective.label}_r{self.round}"

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.batch * self.shape.seq_length


def make_cells(spec: StudySpec, skip_impossible: bool = False) -> tuple[list[Cell], list[str]]:
    """Return (cells in the order in which they run, layouts that cannot be, in words).

    Within a round the objectives of a layout follow each other, in another order each round, so
    that what else the machine does hits them alike.

    Raises:
        PlanError: layouts that cannot be, all of them, unless they are to be skipped; none left.
    """
    obstacles: list[str] = []
    possible: list[tuple[str, Layout, ModelShape]] = []
    for size in spec.sizes:
        for entry in spec.layouts:
            layout = entry.to_layout(spec.launch.is_cpu)
            shape = make_shape(spec.sizes[size], spec.model, layout.tensor_parallel)
            why = find_obstacle(shape, layout, spec.rules(layout.data_parallel))
            most = spec.launch.nodes * spec.launch.node_ranks
            if layout.gpus > most:
                why = why or f"{layout.gpus} ranks: expected at most {most}, of `launch`"
            if why:
                obstacles.append(f"{size}, {name_layout(layout)}: {why}")
            else:
                possible.append((size, layout, shape))
    if obstacles and not skip_impossible:
        shown = "\n  ".join(obstacles[:MANY_SHOWN])
        more = f"\n  and {len(obstacles) - MANY_SHOWN} more" if obstacles[MANY_SHOWN:] else ""
        raise PlanError(
            f"{len(obstacles)} layouts cannot be (--skip-impossible goes on without them):\n  "
            f"{shown}{more}"
        )
    if not possible:
        raise PlanError("layouts: expected at least one that can be, got none")
    count = len(spec.objectives)
    cells = [
        Cell(
            size,
            layout,
            spec.objectives[(turn + index + round) % count],
            round,
            shape,
            spec.global_batch(layout.data_parallel),
            spec.model.vocab_size,
            spec.model.make_vocab_size_divisible_by,
        )
        for round in range(spec.rounds)
        for index, (size, layout, shape) in enumerate(possible)
        for turn in range(count)
    ]
    return cells, obstacles


def recipe_text(cell: Cell, spec: StudySpec, timing: Timing) -> str:
    """Return a recipe for train.sh: bash arrays as those of examples/multinode/recipes."""
    layout = cell.layout
    training = [
        *("--micro-batch-size", layout.micro_batch_size, "--global-batch-size", cell.batch),
        *("--train-iters", timing.warmup + timing.steps, *_OPTIMIZER.split()),
    ]
    if spec.precision != "fp32":
        training.append("--bf16")
    if spec.precision == "fp8":
        training += ["--fp8-format", "hybrid"]
    arrays = {
        "MODEL_ARGS": model_arguments(cell),
        "TRAINING_ARGS": training,
        "MODEL_PARALLEL_ARGS": parallel_arguments(layout),
    }
    lines = ["# shellcheck shell=bash disable=SC2034  # train.sh reads these", f"# {cell.name}"]
    lines += [f"{name}=({shlex.join(map(str, words))})" for name, words in arrays.items()]
    return "\n".join([*lines, f"VOCAB_SIZE={cell.vocab_size}", ""])


def command_of(cell: Cell, spec: StudySpec, recipe: Path) -> tuple[str, ...]:
    """Return the command of a cell; over several nodes through srun, within an allocation."""
    script = Path(megatron_emo.__file__).parents[1] / "examples" / "multinode" / "train.sh"
    if not script.is_file():
        raise PlanError(f"throughput: expected a checkout with {script.name}, found no {script}")
    flags = [
        *("--make-vocab-size-divisible-by", str(cell.make_vocab_size_divisible_by)),
        *("--emo-time-loss", *spec.arguments, *cell.objective.arguments),
    ]
    command = ("bash", str(script), str(recipe), *flags)
    nodes = nodes_of(cell, spec)
    if nodes == 1:
        return command
    return ("srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--cpu-bind=none", *command)


def nodes_of(cell: Cell, spec: StudySpec) -> int:
    """Return nodes of a cell.

    Raises:
        PlanError: more than one without a Slurm allocation and the address of its first node.
    """
    nodes = count_nodes(cell.layout.gpus, spec.launch.node_ranks)
    if nodes > 1 and not (os.environ.get("SLURM_JOB_ID") and os.environ.get("MASTER_ADDR")):
        raise PlanError(
            f"{cell.name}: {nodes} nodes: expected a Slurm allocation (SLURM_JOB_ID) and "
            "MASTER_ADDR, the name of its first node"
        )
    return nodes


def environment_of(cell: Cell, spec: StudySpec, folder: Path) -> dict[str, str]:
    """Return train.sh's variables of a cell that keeps its files in `folder`."""
    nodes = nodes_of(cell, spec)
    ranks = cell.layout.gpus // nodes
    values = {
        "NNODES": nodes,
        "GPUS_PER_NODE": 0 if spec.launch.is_cpu else ranks,
        "RANKS_PER_NODE": ranks,
        "RUN_DIR": folder / "train",
        "DATA_PATH": "MOCK",
        "OBJECTIVE": cell.objective.objective,
        "CHECKPOINTS": 0,  # a step's time is asked for, not a model
        "EVAL_ITERS": 0,
        "LOG_INTERVAL": 1,
        "EMO_LOSS_PATH": spec.loss.path,
        "EMO_WORKSPACE_MB": spec.loss.workspace_mb,
    }
    if spec.launch.is_cpu:
        values["OMP_NUM_THREADS"] = spec.launch.threads
    if OBJECTIVES[cell.objective.objective]:
        values["EMO_COST_DTYPE"] = {4: "fp32", 2: "bf16", 1: "fp8"}[spec.loss.cost_bytes]
    return {name: str(value) for name, value in values.items()}
