"""From a plan's file to its runs: each with its steps, tokens, FLOPs, hours and memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from megatron_emo.scaling.counts.devices import Device
from megatron_emo.scaling.counts.flops import OBJECTIVES, LossFlops, count_flops, count_loss_flops
from megatron_emo.scaling.counts.memory import (
    Layout,
    LossMemory,
    MemoryEstimate,
    estimate_memory,
    microbatch_tokens,
    resolve_loss_path,
)
from megatron_emo.scaling.counts.shape import ModelShape, ParameterCounts, count_parameters
from megatron_emo.scaling.plans.plan_file import Objective, PlanSpec
from megatron_emo.scaling.plans.recipe import Optimizer, SizeEntry, make_shape

HASH_DIGITS = 10


@dataclass(frozen=True)
class Problem:
    """Why a plan is refused, or what is doubtful about it."""

    name: str
    """What `allow` takes, for those that are a judgement."""
    message: str


class Refused(ValueError):
    """One run that cannot be."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(name, message)


@dataclass(frozen=True)
class Run:
    """One training run."""

    objective: Objective
    seed: int
    size: int | str
    budget: float | None
    """FLOPs asked for."""
    tokens_per_param: float | None
    """Asked for, where no budget is."""
    shape: ModelShape
    params: ParameterCounts
    batch: int
    """Sequences."""
    micro_batch: int
    """Sequences of a rank at once: layout.micro_batch_size, or less where a batch is small."""
    steps: int
    optimizer: Optimizer
    loss_path: str
    """What `auto` comes to."""
    flops: int
    """Exact, Megatron's count, the loss's share left out."""
    loss_flops: LossFlops
    """Of the whole run."""
    memory: MemoryEstimate
    vocab_size: int
    """Of the tokenizer."""
    make_vocab_size_divisible_by: int
    arguments: tuple[str, ...]
    """Further flags of every run and of the objective."""

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.shape.seq_length

    @property
    def emo_share(self) -> float:
        """EMO's own products over the exact FLOPs."""
        return self.loss_flops.cost_products / self.flops

    def approximate_flops(self, convention: str) -> int:
        """Return the run's FLOPs under another convention."""
        return count_flops(self.shape, self.tokens, convention)

    @property
    def all_flops(self) -> int:
        """With what the loss adds."""
        return self.flops + self.loss_flops.total

    def config(self) -> dict:
        """Return all that decides what is trained, as plain values.

        The layout does not, but for the padding of the vocabulary. Of the shape's fields those that
        are not Megatron's defaults are here, so that a field added later moves no name.
        """
        return {
            "objective": self.objective.objective,
            "seed": self.seed,
            "model": {
                **{
                    f.name: getattr(self.shape, f.name)
                    for f in fields(ModelShape)
                    if getattr(self.shape, f.name) != f.default
                },
                "vocab_size": self.vocab_size,
                "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by,
            },
            "batch": self.batch,
            "steps": self.steps,
            "optimizer": asdict(self.optimizer),
            "arguments": list(self.arguments),
        }

    @property
    def hash(self) -> str:
        """Of `config`, in hex."""
        text = json.dumps(self.config(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]

    @property
    def name(self) -> str:
        """Stable: what decides the training decides the name, wherever and whenever it is made."""
        goal = (
            f"C{self.budget:.2e}".replace("+", "")
            if self.budget is not None
            else f"r{self.tokens_per_param:g}"
        )
        size = self.size if isinstance(self.size, str) else f"h{self.size}"
        return f"{self.objective.label}_{size}_{goal}_s{self.seed}_{self.hash}"

    def gpu_hours(self, device: Device, precision: str, mfu: float) -> float:
        """Return GPU-hours at an assumed MFU, the loss's products as fast as the model's."""
        return self.all_flops / (device.peak_flops(precision) * mfu) / 3600


@dataclass(frozen=True)
class Plan:
    """Runs, and what speaks against them."""

    spec: PlanSpec
    runs: tuple[Run, ...]
    problems: tuple[Problem, ...]
    """Runs that cannot be; they are not in `runs`."""


def make_plan(spec: PlanSpec) -> Plan:
    """Return the runs of a plan, in the order of budgets, sizes, objectives, seeds.

    Cells that cannot be, as a size whose heads do not divide it, are in `problems`.
    """
    runs: list[Run] = []
    problems: list[Problem] = []
    for goal, size, objective in _cells(spec):
        try:
            first = _make_run(spec, goal, size, objective)
        except Refused as refused:
            if refused.problem not in problems:
                problems.append(refused.problem)
            continue
        runs += [replace(first, seed=seed) for seed in spec.seeds]
    return Plan(spec, tuple(runs), tuple(problems))


def _cells(spec: PlanSpec) -> Iterator[tuple[float, int | str, Objective]]:
    for goal in spec.budgets or spec.tokens_per_param:
        for size in spec.sizes:
            for objective in spec.objectives:
                yield goal, size, objective


def _make_run(spec: PlanSpec, goal: float, size: int | str, objective: Objective) -> Run:
    """Return the run of the first batch that meets the goal.

    Raises:
        Refused: no model of this size, or no batch.
    """
    try:
        entry = spec.recipe.entry(size)
        shape = make_shape(entry, spec.model, spec.layout.tensor_parallel)
    except ValueError as error:
        raise Refused("shape", f"size {size}: {error}") from error
    _check_layout(spec.layout, shape, size)
    cell = _Cell(spec, goal, size, objective, entry, shape)
    refused = None
    for batch in cell.batches():
        try:
            return cell.make_run(batch)
        except Refused as error:
            refused = error
    raise refused


def _check_layout(layout: Layout, shape: ModelShape, size: int | str) -> None:
    if layout.expert_parallel > 1 and shape.num_experts is None:
        raise Refused("layout", "layout.expert_parallel: expected 1 without model.num_experts")
    for flag, name, whole in (
        ("tensor_parallel", "heads", shape.num_attention_heads),
        ("tensor_parallel", "ffn", shape.ffn_hidden_size),
        ("pipeline_parallel", "layers", shape.num_layers),
        ("expert_parallel", "experts", shape.num_experts or 1),
        ("context_parallel", "half of seq_length", shape.seq_length // 2),
    ):
        cut = getattr(layout, flag)
        if cut > 1 and whole % cut:
            raise Refused(
                "layout", f"size {size}: layout.{flag} {cut}: expected a divisor of {name} {whole}"
            )


@dataclass(frozen=True)
class _Cell:
    """One size, budget and objective on the way to a run."""

    spec: PlanSpec
    goal: float
    size: int | str
    objective: Objective
    entry: SizeEntry
    shape: ModelShape

    def __str__(self) -> str:
        goal = f"budget {self.goal:.3g}" if self.spec.budgets else f"{self.goal:g} tokens/parameter"
        return f"{goal}, size {self.size}"

    def batches(self) -> list[int]:
        """Return batches to try: the given one, or powers of two, that of recipe.steps first."""
        recipe = self.spec.recipe
        if given := self.entry.batch or recipe.batch:
            return [given]
        steps = self.entry.steps or recipe.steps
        best = 2 ** round(math.log2(max(1.0, self._sequences(0) / steps)))
        best = max(recipe.min_batch, min(best, recipe.max_batch))
        smaller = [best >> i for i in range(best.bit_length())]
        return [batch for batch in smaller if batch >= recipe.min_batch]

    def make_run(self, batch: int) -> Run:
        """Return the run of a batch.

        Raises:
            Refused: the batch does not suit the layout, the goal or the learning rate.
        """
        spec, shape = self.spec, self.shape
        layout = self._fit_micro_batch(batch)
        path, distinct, cost_dim = self._loss_settings(layout)
        tokens_at_once = microbatch_tokens(shape, layout)
        per_microbatch = count_loss_flops(
            shape, tokens_at_once, path, num_distinct=distinct, cost_dim=cost_dim
        )
        share = per_microbatch.total * shape.seq_length / tokens_at_once
        steps = self._steps(batch, share if spec.equal == "flops" else 0)
        tokens = steps * batch * shape.seq_length
        count = tokens // tokens_at_once
        memory = LossMemory(path, distinct, cost_dim, spec.loss.cost_bytes, spec.loss.workspace_mb)
        num_microbatches = batch // (layout.micro_batch_size * layout.data_parallel)
        return Run(
            objective=self.objective,
            seed=spec.seeds[0],
            size=self.size,
            budget=self.goal if spec.budgets else None,
            tokens_per_param=None if spec.budgets else self.goal,
            shape=shape,
            params=count_parameters(shape),
            batch=batch,
            micro_batch=layout.micro_batch_size,
            steps=steps,
            optimizer=spec.recipe.optimizer(self.entry, batch, steps, tokens),
            loss_path=path,
            flops=count_flops(shape, tokens),
            loss_flops=LossFlops(
                per_microbatch.cost_products * count, per_microbatch.repeated_logits * count
            ),
            memory=estimate_memory(shape, layout, num_microbatches, memory),
            vocab_size=spec.model.vocab_size,
            make_vocab_size_divisible_by=spec.model.make_vocab_size_divisible_by,
            arguments=(*spec.arguments, *self.objective.arguments),
        )

    def _sequences(self, share: float) -> float:
        """Sequences that meet the goal, `share` being the loss's FLOPs of one."""
        if self.spec.budgets:
            per_sequence = count_flops(self.shape, self.shape.seq_length, self.spec.flops)
            return self.goal / (per_sequence + share)
        counts = count_parameters(self.shape)
        is_total = self.spec.params == "total"
        params = counts.active if is_total else counts.active_non_embedding
        return self.goal * params / self.shape.seq_length

    def _fit_micro_batch(self, batch: int) -> Layout:
        """Return the layout with the largest micro-batch that divides a rank's sequences."""
        layout = self.spec.layout
        per_rank, rest = divmod(batch, layout.data_parallel)
        if rest:
            raise Refused(
                "batch",
                f"{self}: batch {batch}: expected a multiple of the {layout.data_parallel} data-"
                "parallel ranks",
            )
        sizes = range(min(layout.micro_batch_size, per_rank), 0, -1)
        return replace(layout, micro_batch_size=next(s for s in sizes if per_rank % s == 0))

    def _loss_settings(self, layout: Layout) -> tuple[str, int, int]:
        """Return (path, U, D) of a microbatch."""
        loss, distinct, cost_dim = self.spec.loss, 0, 0
        if OBJECTIVES[self.objective.objective]:
            tokens = microbatch_tokens(self.shape, layout)
            distinct = loss.num_distinct(tokens, self.spec.model.vocab_size)
            cost_dim = loss.cost_dim or self.shape.hidden_size
        path = resolve_loss_path(loss.path, self.shape, layout, distinct, loss.workspace_mb)
        return path, distinct, cost_dim

    def _steps(self, batch: int, share: float) -> int:
        spec, recipe = self.spec, self.spec.recipe
        sequences = self._sequences(share)
        tokens = sequences * self.shape.seq_length
        steps = round(sequences / batch)
        if sequences < batch:
            raise Refused(
                "tokens-below-batch",
                f"{self}: {tokens:.3g} tokens are below one batch of "
                f"{batch * self.shape.seq_length} tokens",
            )
        if (missed := abs(steps * batch / sequences - 1)) > spec.tolerance:
            raise Refused(
                "tolerance",
                f"{self}: {steps} steps of {batch} sequences miss it by {missed:.1%}, expected at "
                f"most {spec.tolerance:.1%}",
            )
        rate = self.entry.learning_rate or recipe.learning_rate(self.entry.hidden, batch, tokens)
        if rate > recipe.lr_max and "learning-rate" not in spec.allow:
            raise Refused(
                "learning-rate",
                f"{self}: batch {batch} has a learning rate of {rate:.3g}, expected at most "
                f"{recipe.lr_max:g}",
            )
        return steps
