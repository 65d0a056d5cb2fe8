"""Bytes that training takes on the fullest GPU: Megatron's own formulas, and the loss's part.

A model, not a measurement: what fragments, NCCL's buffers and temporaries are not in it. Megatron's
are in megatron/training/theoretical_memory_usage.py (megatron-core 0.19.2): bf16 weights, fp32
gradients, master weights and Adam's two moments; activations by Korthikanti et al. (2022).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_emo.scaling.counts.flops import choose_loss_path
from megatron_emo.scaling.counts.shape import ModelShape

MOST_GPUS = 10**6


@dataclass(frozen=True)
class Layout:
    """How a run lies on GPUs."""

    gpus: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    micro_batch_size: int = 1
    distributed_optimizer: bool = True
    sequence_parallel: bool = True
    """With selective recomputation, as Megatron's formula has them; else neither."""
    virtual_pipeline: int = 1
    """Stages of a pipeline rank, of the interleaved schedule."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not 1 <= value <= MOST_GPUS:
                raise ValueError(f"layout.{name}: expected 1 to {MOST_GPUS:,}, got {value}")
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        if self.gpus % model:
            raise ValueError(
                f"layout.gpus: expected a multiple of tensor x pipeline x context parallel = "
                f"{model}, got {self.gpus}"
            )

    @property
    def data_parallel(self) -> int:
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        return self.gpus // model

    @property
    def expert_data_parallel(self) -> int:
        """As Megatron's, whose experts are cut over tensor-parallel ranks too unless told."""
        cut = self.tensor_parallel * self.expert_parallel * self.pipeline_parallel
        return max(1, self.gpus // cut)


@dataclass(frozen=True)
class LossMemory:
    """What the memory of the loss depends on."""

    path: str
    """logits, recompute or forward."""
    num_distinct: int = 0
    """Of the targets of a microbatch; 0 without a cost."""
    cost_dim: int = 0
    cost_bytes: int = 4
    """Of an entry of the cost table: 4, 2 or 1."""
    workspace_mb: int = 512


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest GPU, by what they are for."""

    model_state: float
    """Weights, gradients and optimizer."""
    activations: float
    """Of the layers and the embedding, of all microbatches in flight."""
    loss: float
    """Logits, or chunks of them, and cost rows."""
    cost_embedding: float
    """The frozen table's shard, and the rows of a microbatch's targets."""

    @property
    def total(self) -> float:
        return self.model_state + self.activations + self.loss + self.cost_embedding


def estimate_memory(
    shape: ModelShape, layout: Layout, num_microbatches: int, loss: LossMemory
) -> MemoryEstimate:
    """Return what the fullest pipeline stage holds: the first, or the last with its loss.

    Args:
        num_microbatches: of a step on a data-parallel rank.
    """
    first = activation_bytes(shape, layout, num_microbatches)
    in_flight = min(num_microbatches, layout.pipeline_parallel)
    loss_part = _loss_bytes(shape, layout, loss)
    rows = loss.num_distinct * loss.cost_dim * 4
    table = shape.padded_vocab_size // layout.tensor_parallel * loss.cost_dim * loss.cost_bytes
    cost = table + rows if loss.num_distinct else 0
    last = first / in_flight
    if layout.pipeline_parallel == 1 or last + loss_part + cost >= first:
        return MemoryEstimate(model_state_bytes(shape, layout), last, loss_part, cost)
    return MemoryEstimate(model_state_bytes(shape, layout), first, 0.0, 0.0)


def model_state_bytes(shape: ModelShape, layout: Layout) -> float:
    """Return bytes of weights, gradients and optimizer of the fullest stage.

    `compute_weight_and_optimizer_memory`: 18 a parameter, or 6 and 12 over the data-parallel ranks
    with the distributed optimizer.
    """
    dense, experts = parameters_of_rank(shape, layout)
    return dense * _bytes_per_parameter(layout, layout.data_parallel * layout.context_parallel) + (
        experts * _bytes_per_parameter(layout, layout.expert_data_parallel)
    )


def parameters_of_rank(shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """Return parameters of a rank of the fullest stage: without experts, and theirs.

    As `compute_weight_and_optimizer_memory` counts them, which leaves out biases and learned
    positions.
    """
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    hidden = shape.hidden_size
    norm = 1 if shape.normalization == "RMSNorm" else 2
    gated = 3 if shape.swiglu else 2
    embedding = hidden * shape.padded_vocab_size
    # Megatron's term has no output gate.
    attention = hidden * 2 * (shape.query_size + shape.head_channels * shape.groups)
    shared = hidden * (shape.moe_shared_expert_intermediate_size or 0) * gated
    routed = replicated = 0
    if shape.num_experts is not None:
        width = shape.moe_latent_size or hidden
        routed = gated * width * shape.expert_ffn * shape.num_experts
        replicated = shape.num_experts * (hidden + (1 if shape.add_bias_linear else 0))
        replicated += 2 * hidden * (shape.moe_latent_size or 0)
        if shared and shape.moe_shared_expert_gate:
            replicated += hidden

    def parts(dense: int, expert: int) -> tuple[int, int, int]:
        """Parameters of that many layers: cut over TP, on every rank, of experts."""
        mlp = hidden * shape.ffn_hidden_size * gated
        cut = (attention + mlp) * dense + (attention + shared) * expert
        return cut, 2 * hidden * norm * (dense + expert) + replicated * expert, routed * expert

    expert = shape.num_own_expert_layers
    own = parts(shape.num_layers - expert, expert)
    expert = shape.num_mtp_expert_layers
    mtp = parts(shape.mtp_num_layers - expert, expert)
    ends = 1 + int(shape.untie_embeddings_and_output_weights and pp == 1)
    cut = (own[0] / pp + mtp[0] + ends * embedding) / tp
    cut += (own[1] + norm * hidden) / pp + mtp[1]
    return cut, (own[2] / pp + mtp[2]) / (tp * layout.expert_parallel)


def _bytes_per_parameter(layout: Layout, ranks: int) -> float:
    """`ranks` share the optimizer's state, those of context parallelism too."""
    return 6 + 12 / ranks if layout.distributed_optimizer else 18


def activation_bytes(shape: ModelShape, layout: Layout, num_microbatches: int) -> float:
    """Return bytes of activations of the first stage, the output layer's and loss's left out.

    `compute_activation_memory` with sequence parallelism (which goes with selective
    recomputation), else `compute_activation_memory_without_sp`. Context parallelism, of which they
    do not know, cuts the sequence; the 5% that the second adds for temporaries are kept.
    """
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    tokens = shape.seq_length * layout.micro_batch_size / layout.context_parallel
    hidden = shape.hidden_size
    if layout.sequence_parallel:
        layer = tokens * (18 * hidden + 4 * shape.ffn_hidden_size)
    else:
        layer = tokens * hidden * (10 + 24 / tp)
    total = layer * shape.num_layers + tokens * pp * (8 + hidden)
    if layout.virtual_pipeline > 1:
        total *= 1 + (pp - 1) / (pp * layout.virtual_pipeline)
    elif pp > 1:
        total *= min(1, num_microbatches / pp)
    return total / tp if layout.sequence_parallel else 1.05 * total


def _loss_bytes(shape: ModelShape, layout: Layout, loss: LossMemory) -> float:
    """Return bytes of hidden states, logits and cost rows of one microbatch, bf16 training."""
    tokens = microbatch_tokens(shape, layout)
    vocab = shape.padded_vocab_size // layout.tensor_parallel
    hidden_states = 2 * 2 * tokens * shape.hidden_size
    rows = vocab * 4 * tokens * (2 if loss.num_distinct else 1)
    chunk = min(rows, loss.workspace_mb << 20)
    if loss.path == "logits":
        return hidden_states + vocab * (tokens * 2 + loss.num_distinct * 4)
    weight_gradient = 4 * vocab * shape.hidden_size if loss.path == "forward" else 0
    return hidden_states + chunk + weight_gradient


def microbatch_tokens(shape: ModelShape, layout: Layout) -> int:
    """Return tokens of a microbatch on one context-parallel rank."""
    return shape.seq_length * layout.micro_batch_size // layout.context_parallel


def resolve_loss_path(
    path: str, shape: ModelShape, layout: Layout, num_distinct: int, workspace_mb: int
) -> str:
    """Return the path that a run takes."""
    if path != "auto":
        return path
    vocab = shape.padded_vocab_size // layout.tensor_parallel
    return choose_loss_path(microbatch_tokens(shape, layout), num_distinct, vocab, workspace_mb)
