"""Transformer layers of one pipeline rank and one microbatch, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_emo.scaling.counts.memory import Layout, microbatch_tokens
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.speed.cluster import Cluster

_PASSES = 3
"""Forward, and about twice as much in the backward."""
_FLASH_BACKWARD = 2.5
"""Products of fused attention's backward over its forward's: scores are formed again."""


@dataclass(frozen=True)
class Kernels:
    """How what is no product is carried out."""

    starts: int
    """Kernels of a layer, forward and backward, products aside."""
    hidden_accesses: float
    """Elements of a hidden state read or written by norms and residuals in a forward, a layer."""
    ffn_accesses: float
    """The same of the activation function over an element of its input."""
    score_accesses: float
    """Of each attention score, forward and backward; 0 where attention is fused."""
    weight_bytes: float
    """Moved for a weight's gradient a microbatch, beside its product."""


FUSED = Kernels(30, 10, 1.5, 0, 8)
"""Transformer Engine's: weights' gradients are added to the fp32 ones by the product."""
PLAIN = Kernels(150, 24, 5, 16, 20)
"""Megatron's own on a CPU, one operator of torch at a time; fp32."""


@dataclass(frozen=True)
class LayerCost:
    """Seconds of a microbatch, forward and backward, of a rank's layers."""

    compute: float
    tensor: float
    context: float
    expert: float
    embedding: float
    """Of the first stage alone."""
    forward_share: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context + self.expert

    @property
    def forward(self) -> float:
        return self.forward_share * self.total

    @property
    def backward(self) -> float:
        return self.total - self.forward


def cost_of_layers(shape: ModelShape, layout: Layout, cluster: Cluster) -> LayerCost:
    """Return what the layers of a pipeline rank take, heads for further tokens on the last left
    out.

    Args:
        cluster: after `Cluster.of_ranks`.
    """
    kernels = PLAIN if cluster.is_cpu else FUSED
    per_stage = 1 / layout.pipeline_parallel
    layers = shape.num_layers * per_stage
    with_experts = shape.num_own_expert_layers * per_stage
    attention = _attention(shape, layout, cluster, kernels)
    projections = _projections(shape, layout, cluster)
    dense = _mlp(shape, layout, cluster) * (layers - with_experts)
    routed = _experts(shape, layout, cluster) * with_experts
    other = _passes(shape, layout, cluster, kernels)
    compute = layers * (attention + projections + other) + dense + routed
    return LayerCost(
        compute=compute,
        tensor=layers * _tensor_parallel(shape, layout, cluster),
        context=layers * _context_parallel(shape, layout, cluster, attention),
        expert=with_experts * _expert_parallel(shape, layout, cluster),
        embedding=_embedding(shape, layout, cluster),
        forward_share=1 / _PASSES,
    )


def _projections(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    tokens, tp, hidden = microbatch_tokens(shape, layout), layout.tensor_parallel, shape.hidden_size
    return _PASSES * (
        cluster.product(tokens, shape.qkv_size / tp, hidden)
        + cluster.product(tokens, hidden, shape.query_size / tp)
    )


def _mlp(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    tokens, tp, hidden = microbatch_tokens(shape, layout), layout.tensor_parallel, shape.hidden_size
    ffn = shape.ffn_hidden_size / tp
    wide = 2 * ffn if shape.swiglu else ffn
    return _PASSES * (cluster.product(tokens, wide, hidden) + cluster.product(tokens, hidden, ffn))


def _experts(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Routed and shared experts; tokens spread evenly, experts' products in one launch."""
    if shape.num_experts is None:
        return 0.0
    tokens, tp = microbatch_tokens(shape, layout), layout.tensor_parallel
    hidden, width = shape.hidden_size, shape.moe_latent_size or shape.hidden_size
    gated = 2 if shape.swiglu else 1
    routed, ffn = tokens * shape.moe_router_topk, shape.expert_ffn / tp
    seconds = cluster.product(routed, gated * ffn, width) + cluster.product(routed, width, ffn)
    if shape.moe_shared_expert_intermediate_size:
        ffn = shape.moe_shared_expert_intermediate_size / tp
        seconds += cluster.product(tokens, gated * ffn, hidden)
        seconds += cluster.product(tokens, hidden, ffn)
    return _PASSES * seconds


def _attention(shape: ModelShape, layout: Layout, cluster: Cluster, kernels: Kernels) -> float:
    """Scores and their sums over values: half the square where fused, all of it otherwise."""
    tokens = microbatch_tokens(shape, layout)
    query = shape.query_size / layout.tensor_parallel
    if not kernels.score_accesses:
        forward = 2.0 * tokens * shape.seq_length * query
        flops = forward * (1 + _FLASH_BACKWARD)
        return flops / cluster.attention_flops + 3 * cluster.start_s
    flops = _PASSES * 4.0 * tokens * shape.seq_length * query
    heads = shape.num_attention_heads / layout.tensor_parallel
    scores = tokens * shape.seq_length * heads
    moved = cluster.itemsize * kernels.score_accesses * scores
    return flops / cluster.attention_flops + cluster.passes(moved)


def _passes(shape: ModelShape, layout: Layout, cluster: Cluster, kernels: Kernels) -> float:
    """Norms, residuals, rotations, activation functions, and gradients added to the weights'."""
    tokens, tp, hidden = microbatch_tokens(shape, layout), layout.tensor_parallel, shape.hidden_size
    parts = tp if layout.sequence_parallel else 1
    ffn = shape.ffn_hidden_size * (2 if shape.swiglu else 1)
    elements = kernels.hidden_accesses * hidden / parts
    elements += 2 * shape.qkv_size / tp + kernels.ffn_accesses * ffn / tp
    weights = hidden * (shape.qkv_size + shape.query_size + ffn + shape.ffn_hidden_size) / tp
    moved = _PASSES * tokens * elements * cluster.itemsize + weights * kernels.weight_bytes
    return cluster.passes(moved, kernels.starts)


def _embedding(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Rows looked up and their gradients, added up over tensor-parallel ranks in the forward."""
    tokens, tp = microbatch_tokens(shape, layout), layout.tensor_parallel
    num_bytes = tokens * shape.hidden_size * cluster.itemsize
    rows = shape.padded_vocab_size / tp * shape.hidden_size
    # torch's gradient of an embedding is as large as its table, and is added to the sum.
    moved = 6 * num_bytes + (16 * rows if cluster.is_cpu else 0)
    seconds = cluster.passes(moved, 10)
    if layout.sequence_parallel:
        return seconds + 2 * cluster.reduce_scatter(num_bytes, tp)
    return seconds + cluster.all_reduce(num_bytes, tp)


def _tensor_parallel(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Two all-reduces forward and two backward of a hidden state, or gather and scatter pairs.

    The backward's run under a product of weights on a GPU; those of sequence parallelism's further
    gather in the backward are taken as wholly hidden.
    """
    tokens, tp = microbatch_tokens(shape, layout), layout.tensor_parallel
    if tp == 1:
        return 0.0
    num_bytes = tokens * shape.hidden_size * cluster.itemsize
    if layout.sequence_parallel:
        gather = cluster.all_gather(num_bytes, tp)
        scatter = cluster.reduce_scatter(num_bytes, tp)
        forward = backward = 2 * (gather + scatter)
        if cluster.is_cpu:
            backward += 2 * gather
        under = 2 * scatter
    else:
        forward = backward = 2 * cluster.all_reduce(num_bytes, tp)
        under = backward
    if cluster.is_cpu:
        return forward + backward
    ffn = shape.ffn_hidden_size * (2 if shape.swiglu else 1) / tp
    weights = cluster.product(shape.hidden_size, ffn, tokens)
    weights += cluster.product(shape.hidden_size, shape.qkv_size / tp, tokens)
    return forward + backward - min(under, weights)


def _context_parallel(
    shape: ModelShape, layout: Layout, cluster: Cluster, attention: float
) -> float:
    """Keys and values around a ring, and with their gradients once more, under attention."""
    ranks = layout.context_parallel
    if ranks == 1:
        return 0.0
    tokens, tp = microbatch_tokens(shape, layout), layout.tensor_parallel
    keys_values = 2 * tokens * shape.head_channels * shape.groups / tp * cluster.itemsize
    link = cluster.link(ranks, tp)
    steps = ranks - 1
    seconds = link.seconds("send", 3 * steps, 3 * steps * keys_values)
    return max(steps * 3 * link.latency, seconds - attention)


def _expert_parallel(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Tokens to their experts and back, forward and backward: four all-to-alls."""
    if shape.num_experts is None:
        return 0.0
    width = shape.moe_latent_size or shape.hidden_size
    tokens = microbatch_tokens(shape, layout) / layout.tensor_parallel
    num_bytes = tokens * shape.moe_router_topk * width * cluster.itemsize
    return 4 * cluster.all_to_all(num_bytes, layout.expert_parallel, layout.tensor_parallel)
