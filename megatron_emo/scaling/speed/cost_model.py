"""How long a training step of a layout takes: compute, collectives, pipeline, loss, optimizer.

A model, not a measurement. The time of a step is

    (m t_max + (sum t_i - t_max) / v) + data parallelism + optimizer

of m microbatches, stages' times t_i forward and backward, and v virtual stages a rank: one forward
and one backward at a time. With equal stages the bubble is (p - 1) / (v m + p - 1) of the first
part.

References:
    Narayanan et al. (2021), Efficient large-scale language model training on GPU clusters using
    Megatron-LM: schedules, their bubbles, and bytes of tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_emo.scaling.counts.memory import Layout, microbatch_tokens, parameters_of_rank
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.speed.cluster import Cluster
from megatron_emo.scaling.speed.cost_model_layers import LayerCost, cost_of_layers
from megatron_emo.scaling.speed.cost_model_loss import LossTerms, cost_of_loss

GRADIENT_BYTES = 4
"""Of a parameter: Megatron reduces in fp32."""
_GPU_ADAM_BYTES = 34
"""Read and written for a parameter of the optimizer's shard: gradient twice, its norm being taken
first; master weight and moments both ways; the weight of 2 bytes."""
_GPU_ZEROING_BYTES = 4
_CPU_ADAM_BYTES = 100
"""Without a fused kernel; fp32."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what the last pipeline stage does, and what it waits for."""

    compute: float
    """Of layers and embedding."""
    tensor: float
    """Tensor-parallel collectives of layers that nothing hides."""
    context: float
    expert: float
    pipeline: float
    """Activations sent to the next stage and back."""
    loss: float
    """Output layer with its loss, their collectives included."""
    bubble: float
    """Waiting for other stages: filling, emptying, and stages that take longer."""
    data: float
    """Reduction of gradients and gathering of weights that nothing hides."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def estimate_step(
    shape: ModelShape, layout: Layout, batch: int, loss: LossTerms, cluster: Cluster
) -> StepTime:
    """Return the time of one step of `batch` sequences.

    Args:
        batch: a multiple of layout.data_parallel x layout.micro_batch_size.
        loss: of a microbatch; see `LossTerms`.
        cluster: before `Cluster.of_ranks`, which is applied here.
    """
    rank = cluster.of_ranks(layout.gpus)
    layers = cost_of_layers(shape, layout, rank)
    head = cost_of_loss(shape, layout, loss, rank, hidden_by=layers.forward)
    num_microbatches = batch // (layout.micro_batch_size * layout.data_parallel)
    passing = _passing(shape, layout, rank)
    first = layers.embedding if layout.pipeline_parallel > 1 else 0.0
    stages = [layers.total + passing] * layout.pipeline_parallel
    stages[0] += layers.embedding
    stages[-1] += head
    work = num_microbatches * stages[-1]
    running = run_pipeline(stages, num_microbatches, layout.virtual_pipeline)
    num_own = num_microbatches
    return StepTime(
        compute=num_own * (layers.compute + layers.embedding - first),
        tensor=num_own * layers.tensor,
        context=num_own * layers.context,
        expert=num_own * layers.expert,
        pipeline=num_own * passing,
        loss=num_own * head,
        bubble=running - work,
        data=_reduction(shape, layout, rank, layers),
        optimizer=_optimizer(shape, layout, rank),
    )


def run_pipeline(stages: list[float], num_microbatches: int, virtual: int = 1) -> float:
    """Return seconds of all microbatches through stages of these seconds each."""
    slowest = max(stages)
    return num_microbatches * slowest + (sum(stages) - slowest) / virtual


def _passing(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """A microbatch's activations forward and their gradients back, in and out of a rank.

    Sent and received at once, and not under computation, which Megatron does between the two.
    Without sequence parallelism every tensor-parallel rank sends the whole.
    """
    if layout.pipeline_parallel == 1:
        return 0.0
    tokens = microbatch_tokens(shape, layout)
    num_bytes = tokens * shape.hidden_size * cluster.itemsize
    if layout.sequence_parallel:
        num_bytes /= layout.tensor_parallel
    stride = layout.gpus // layout.pipeline_parallel
    return 2 * layout.virtual_pipeline * cluster.send(num_bytes, stride)


def _reduction(shape: ModelShape, layout: Layout, cluster: Cluster, layers: LayerCost) -> float:
    """What of the gradients' reduction (and the weights' gathering) outlasts computation.

    On GPUs, as train.sh sets them, gradients are reduce-scattered under the backward of the last
    microbatch and weights are gathered under the forward of the first; on a CPU gradients are
    all-reduced after it. Tied embeddings are added up between the first and the last stage.
    """
    dense, experts = parameters_of_rank(shape, layout)
    groups = (
        (dense, layout.data_parallel * layout.context_parallel, layout.tensor_parallel),
        (experts, layout.expert_data_parallel, layout.tensor_parallel * layout.expert_parallel),
    )
    reduce = gather = 0.0
    for params, ranks, stride in groups:
        if not params:
            continue
        if layout.distributed_optimizer:
            reduce += cluster.reduce_scatter(GRADIENT_BYTES * params, ranks, stride)
            gather += cluster.all_gather(cluster.itemsize * params, ranks, stride)
        else:
            reduce += cluster.all_reduce(GRADIENT_BYTES * params, ranks, stride)
    tied = 0.0
    if layout.pipeline_parallel > 1 and not shape.untie_embeddings_and_output_weights:
        rows = shape.padded_vocab_size // layout.tensor_parallel * shape.hidden_size
        stride = layout.gpus // layout.pipeline_parallel * (layout.pipeline_parallel - 1)
        tied = cluster.all_reduce(GRADIENT_BYTES * rows, 2, stride)
    if cluster.is_cpu:
        return reduce + gather + tied
    hidden = max(0.0, reduce - layers.backward) + max(0.0, gather - layers.forward)
    return hidden + tied


def _optimizer(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    dense, experts = parameters_of_rank(shape, layout)
    if cluster.is_cpu:
        return cluster.passes(_CPU_ADAM_BYTES * (dense + experts))
    shared = dense + experts
    if layout.distributed_optimizer:
        dense /= layout.data_parallel * layout.context_parallel
        experts /= layout.expert_data_parallel
    own = _GPU_ADAM_BYTES * (dense + experts)
    return cluster.passes(own + _GPU_ZEROING_BYTES * shared)


def list_assumptions(cluster: Cluster) -> list[str]:
    """Return what the model takes for granted beside the machine's rates."""
    lines = [
        "step: m t_max + (sum t_i - t_max) / v of the stages' times, m microbatches, v virtual "
        "stages; then data parallelism and optimizer; no data loading, no checkpoints, no noise",
        "layers: dense products at the same rate forward and backward; experts evenly used, their "
        "tokens sent forward and back twice a layer; nothing is recomputed",
    ]
    if cluster.is_cpu:
        return [
            *lines,
            f"CPU: fp32, whole squares of attention, nothing hidden under anything, gradients "
            f"all-reduced at the end, {_CPU_ADAM_BYTES} bytes a parameter for Adam; ranks beyond "
            f"{cluster.cores} cores share them",
        ]
    return [
        *lines,
        "overlap: half of tensor parallelism's collectives in the backward run under weights' "
        "products; reduce-scatter of fp32 gradients under the last backward, all-gather of "
        "weights under the first forward; context parallelism's sends under attention; sends "
        "between stages under nothing",
        f"optimizer: Adam, {_GPU_ADAM_BYTES} bytes a parameter of the rank's shard",
        "loss: docs/performance.md's roofline; cost rows fetched under the forward, statistics "
        "(20 N bytes, 16 without a cost) gathered by each rank, gradients under dW's last product",
    ]
