"""Layouts of a model ranked by the step time that the cost model expects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_emo.scaling.counts.flops import count_flops
from megatron_emo.scaling.counts.memory import Layout, MemoryEstimate, estimate_memory
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.plans.plan_checks import USABLE_MEMORY
from megatron_emo.scaling.plans.plan_file import Objective, PlanError
from megatron_emo.scaling.speed.cluster import Cluster
from megatron_emo.scaling.speed.cluster_layouts import (
    LayoutRules,
    enumerate_layouts,
    find_obstacle,
    name_layout,
)
from megatron_emo.scaling.speed.cost_model import StepTime, estimate_step
from megatron_emo.scaling.speed.cost_model_loss import make_loss_terms
from megatron_emo.scaling.speed.throughput_file import StudySpec


@dataclass(frozen=True)
class Estimate:
    """One layout with its expected step."""

    layout: Layout
    shape: ModelShape
    batch: int
    """Sequences of a step."""
    step: StepTime
    memory: MemoryEstimate

    @property
    def name(self) -> str:
        return name_layout(self.layout)

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.batch * self.shape.seq_length

    @property
    def flops_per_gpu(self) -> float:
        """FLOP/s, Megatron's count, the loss's own products left out."""
        return count_flops(self.shape, self.num_tokens) / self.layout.gpus / self.step.total


@dataclass(frozen=True)
class Ranking:
    """What fits, fastest first, and what does not."""

    fitting: tuple[Estimate, ...]
    too_large: tuple[Estimate, ...]
    """More than a device's memory."""


def estimate_layout(
    spec: StudySpec, size: str, objective: Objective, layout: Layout, cluster: Cluster
) -> Estimate:
    """Return the estimate of one layout, which may need more memory than there is."""
    shape = spec.shape(size, layout.tensor_parallel)
    batch = spec.global_batch(layout.data_parallel)
    loss = make_loss_terms(shape, layout, objective.objective, spec.loss, spec.model.vocab_size)
    num_microbatches = batch // (layout.micro_batch_size * layout.data_parallel)
    return Estimate(
        layout,
        shape,
        batch,
        estimate_step(shape, layout, batch, loss, cluster),
        estimate_memory(shape, layout, num_microbatches, loss.memory),
    )


def rank_layouts(
    spec: StudySpec,
    size: str,
    objective: Objective,
    cluster: Cluster,
    layouts: Iterable[Layout],
) -> Ranking:
    """Return estimates of layouts by step time, those that do not fit apart."""
    found = [estimate_layout(spec, size, objective, layout, cluster) for layout in layouts]
    found.sort(key=lambda one: one.step.total)
    if cluster.memory is None:
        return Ranking(tuple(found), ())
    most = USABLE_MEMORY * cluster.memory
    return Ranking(
        tuple(one for one in found if one.memory.total <= most),
        tuple(one for one in found if one.memory.total > most),
    )


def find_layouts(spec: StudySpec, size: str, gpus: int, cluster: Cluster) -> list[Layout]:
    """Return all layouts of a size on so many GPUs.

    Raises:
        PlanError: none that can be, or mode weak, whose layouts take different steps.
    """
    if spec.mode == "weak":
        raise PlanError("mode: expected strong, one step's batch for all layouts, got 'weak'")
    shape = spec.shape(size, 1)
    rules = LayoutRules(spec.batch, cluster.ranks_per_node, cluster.is_cpu)
    found = list(enumerate_layouts(shape, gpus, rules))
    # The vocabulary's padding goes with tensor parallelism.
    found = [
        layout
        for layout in found
        if not find_obstacle(spec.shape(size, layout.tensor_parallel), layout, rules)
    ]
    if not found:
        raise PlanError(
            f"--gpus {gpus}: size {size}: expected a layout that divides batch {spec.batch}, "
            f"{shape.num_layers} layers, {shape.num_attention_heads} heads and "
            f"{shape.groups} query groups, with as many GPUs on each node of up to "
            f"{cluster.ranks_per_node}, got none"
        )
    return found
