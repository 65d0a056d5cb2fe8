"""Whole training steps, timed by Megatron itself in runs of pretrain_gpt_emo.py.

Every run is a process of its own. In each round all objectives run, one after the other, and their
ratios are taken inside the round; the order rotates.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import megatron_emo
from megatron_emo.benchmark.measure import Ratio, Report, ratio, rotated
from megatron_emo.benchmark.report import load_average, machine_lines
from megatron_emo.cost_embedding import write_cost_embedding
from megatron_emo.objectives import OBJECTIVES, build_objective
from megatron_emo.training_curves import read_scalars

DROPPED = 3
"""First iterations that do not count: allocators, threads and compilers settle in them."""

_VOCAB_SIZE, _COST_DIM = 2048, 128

DEFAULT_FLAGS = f"""
    --num-layers 2 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 16 --global-batch-size 16 --lr 3e-3 --min-lr 3e-4
    --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta2 0.95
    --clip-grad 1.0 --seed 1234 --mock-data --split 98,1,1 --tokenizer-type NullTokenizer
    --vocab-size {_VOCAB_SIZE} --num-workers 0 --eval-iters 0 --eval-interval 1000
""".split()
"""The quickstart's model on Megatron's mock data, which counts upwards: few targets repeat."""

_TIMING_FLAGS = "--log-timers-to-tensorboard --tensorboard-log-interval 1 --log-interval 1".split()
_OURS = ("--objective", "--train-iters", "--tensorboard-dir")
_SHOWN_LINES = 40


@dataclass(frozen=True)
class StepsConfig:
    """What to run."""

    steps: int = 12
    """Iterations of a run, those that are dropped included."""
    objectives: tuple[str, ...] = ("mle", "emo1")
    """Ratios are taken against the first."""
    rounds: int = 3
    nproc_per_node: int | None = None
    """Ranks under torch.distributed.run; None for one rank without it."""
    flags: tuple[str, ...] = ()
    """Of pretrain_gpt_emo.py; none for `DEFAULT_FLAGS` and a random cost embedding."""

    def __post_init__(self) -> None:
        if self.steps <= DROPPED:
            raise ValueError(
                f"--steps: expected more than the {DROPPED} that are dropped, got {self.steps}"
            )
        for name in ("rounds", "nproc_per_node"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: expected at least 1, got {getattr(self, name)}")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise ValueError(f"--objectives: expected {', '.join(OBJECTIVES)}, got {name!r}")
        given = {flag.partition("=")[0] for flag in self.flags}
        for flag in _OURS:
            if flag in given:
                raise ValueError(f"{flag}: the benchmark sets it; expected it not to be given")


@dataclass(frozen=True)
class StepsResult:
    """One objective's runs."""

    seconds: list[list[float]]
    """Per round, of every iteration that counts."""
    medians: list[float]
    """Of each round."""
    ratio: Ratio | None
    """Of the medians over those of the first objective, None for the first."""


def time_steps(config: StepsConfig, report: Report = lambda line: None) -> dict[str, StepsResult]:
    """Return the times of every objective, by name.

    Raises:
        FileNotFoundError: no pretrain_gpt_emo.py beside the package.
        RuntimeError: a run failed, with the last lines it printed, or logged too few iterations.
    """
    names = list(dict.fromkeys(config.objectives))
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        flags = config.flags or _default_flags(Path(folder))
        for i in range(config.rounds):
            for name in rotated(names, i):
                run_folder = Path(folder) / f"{i}-{name}"
                times = _run(config, name, flags, run_folder)
                seconds[name].append(times)
                report(
                    f"round {i + 1}/{config.rounds}, {name}: median {median(times):.4f} s of "
                    f"{len(times)} iterations, load {load_average()[0]}"
                )
    medians = {name: [median(times) for times in seconds[name]] for name in names}
    first = names[0]
    return {
        name: StepsResult(
            seconds[name],
            medians[name],
            None if name == first else ratio(medians[name], medians[first]),
        )
        for name in names
    }


def _default_flags(folder: Path) -> tuple[str, ...]:
    """The quickstart's EMO run has a frozen table of the head's width; any values take as long."""
    path = folder / "cost_embedding.safetensors"
    table = torch.randn(_VOCAB_SIZE, _COST_DIM, generator=torch.Generator().manual_seed(0))
    write_cost_embedding(path, table, source="random", tokenizer_fingerprint="")
    return (*DEFAULT_FLAGS, "--emo-cost-embedding", str(path))


def _run(config: StepsConfig, name: str, flags: Sequence[str], folder: Path) -> list[float]:
    """Return the seconds of each iteration that counts."""
    folder.mkdir()
    command = [sys.executable]
    if config.nproc_per_node is not None:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(config.nproc_per_node)]
    command += [str(_script()), *flags_for(name, flags), "--objective", name, *_TIMING_FLAGS]
    command += ["--train-iters", str(config.steps), "--tensorboard-dir", str(folder)]
    done = subprocess.run(
        command,
        env=_environment(config),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])
        raise RuntimeError(
            f"{name}: pretrain_gpt_emo.py ended with exit code {done.returncode}:\n{tail}"
        )
    times = read_scalars(folder).get("iteration-time", {})
    counted = [value for iteration, value in times.items() if iteration > DROPPED]
    if len(counted) != config.steps - DROPPED:
        raise RuntimeError(
            f"{name}: expected 'iteration-time' of {config.steps - DROPPED} iterations in "
            f"TensorBoard, got {len(counted)}"
        )
    return counted


def _script() -> Path:
    path = Path(megatron_emo.__file__).parents[1] / "pretrain_gpt_emo.py"
    if not path.is_file():
        raise FileNotFoundError(f"--steps: expected a checkout with {path.name}, found no {path}")
    return path


def _environment(config: StepsConfig) -> dict[str, str]:
    environment = dict(os.environ)
    if config.nproc_per_node is None:
        # What torch.distributed.run would say of one rank; port 0 takes a free one.
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return environment


def flags_for(objective_name: str, flags: Sequence[str]) -> list[str]:
    """Return the flags without those an objective does not have.

    A run of MLE with a cost embedding would compute the expected cost for the log, and one with
    another objective's settings would not start.
    """
    objective = build_objective(objective_name)
    settings = {name for entry in OBJECTIVES.values() for name in entry.defaults}
    foreign = {
        # The one setting whose flag does not repeat its name.
        "--emo-scale" if name == "emo_scale" else "--emo-" + name.replace("_", "-")
        for name in settings - set(objective.settings)
    }
    switches = {"--emo-half", "--emo-detach-target"}
    kept, skip_value = [], False
    for word in flags:
        flag, equals, _ = word.partition("=")
        if flag.startswith("--"):
            is_cost = flag.startswith("--emo-cost-") and not objective.uses_cost
            positive = flag.replace("--no-emo-", "--emo-")
            skip = is_cost or positive in foreign
            skip_value = skip and not equals and positive not in switches
            if skip:
                continue
        elif skip_value:
            skip_value = False
            continue
        kept.append(word)
    return kept


def describe_steps(config: StepsConfig) -> dict[str, Any]:
    """Return what was run."""
    return {
        "mode": "whole training steps",
        "steps": config.steps,
        "dropped": DROPPED,
        "objectives": list(config.objectives),
        "rounds": config.rounds,
        "nproc_per_node": config.nproc_per_node,
        "flags": list(config.flags) or [*DEFAULT_FLAGS, "--emo-cost-embedding", "random"],
    }


def format_steps(run: Mapping[str, Any], results: Mapping[str, StepsResult]) -> str:
    """Return the header, and a row per objective."""
    width, first = max(8, *map(len, results)), next(iter(results))
    counted = run["steps"] - run["dropped"]
    lines = [
        f"training steps: {counted} iterations a run after {run['dropped']}, {run['rounds']} "
        f"rounds, {run['nproc_per_node'] or 1} ranks",
        *machine_lines(run),
        "flags " + " ".join(run["flags"]),
        "",
        f"{'':<{width}}  median s     min s  ratio over {first}: median     min  of minima",
    ]
    for name, result in results.items():
        line = f"{name:<{width}}{median(result.medians):>10.4f}{min(result.medians):>10.4f}"
        if result.ratio is not None:
            each = result.ratio
            line += f"{each.median:>{len(first) + 20}.3f}{each.min:>8.3f}{each.of_minima:>11.3f}"
        lines.append(line)
    return "\n".join(lines)
