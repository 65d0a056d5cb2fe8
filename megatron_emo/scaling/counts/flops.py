"""Training FLOPs of a model, counted as Megatron counts them, and what the loss adds.

Every count is of one pass forward and its backward, products alone: a product of [m, n] and [n, k]
is 2 m n k, and each is made three times, since the backward makes one for the input's gradient and
one for the weight's.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_emo.scaling.counts.shape import ModelShape, chinchilla_parameters, count_parameters
from megatron_emo.scaling.laws.surfaces import FLOPS_PER_PARAM_TOKEN

PASSES = 3
"""Products of a training step for each of the forward pass."""
CONVENTIONS = {
    "megatron": "Megatron's num_floating_point_operations: causal half of attention, logits",
    "full_attention": "Chinchilla's table A4: the whole square of attention and its softmax, "
    "neither embedding nor logits",
    "6nd": "6 N D, N all parameters that a token goes through",
    "6nd_non_embedding": "6 N D, N without input embedding and output layer",
}
OBJECTIVES = {
    **dict.fromkeys(("emo1", "emo2", "emo"), True),
    **dict.fromkeys(("mle", "mixce", "tailr", "tvd", "focal"), False),
}
"""The package's objectives, and whether they have a cost embedding."""


@dataclass(frozen=True)
class LossFlops:
    """What a loss adds to the products of the model, of one microbatch."""

    cost_products: int
    """EMO's own: costs of every token of the vocabulary for the distinct targets."""
    repeated_logits: int
    """Logits formed again in the backward, whatever the objective; 0 but for `recompute`."""

    @property
    def total(self) -> int:
        return self.cost_products + self.repeated_logits


def count_flops(shape: ModelShape, num_tokens: int, convention: str = "megatron") -> int:
    """Return the FLOPs of training on `num_tokens`, sequences of `seq_length` without padding.

    Args:
        num_tokens: a multiple of seq_length, or attention's square is counted in proportion.
        convention: one of CONVENTIONS.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {list(CONVENTIONS)}, got {convention!r}")
    if convention == "6nd":
        return FLOPS_PER_PARAM_TOKEN * count_parameters(shape).active * num_tokens
    if convention == "6nd_non_embedding":
        return FLOPS_PER_PARAM_TOKEN * count_parameters(shape).active_non_embedding * num_tokens
    if convention == "full_attention":
        return _full_attention_flops(shape) * num_tokens
    return sum(flops_per_token(shape).values()) * num_tokens


def flops_per_token(shape: ModelShape) -> dict[str, int]:
    """Return training FLOPs of one token by part, Megatron's count.

    Equal to `num_floating_point_operations` of megatron/training/training.py in megatron-core
    0.19.2 over the tokens of a batch: grouped queries, SwiGLU, experts, shared experts, latent
    experts, heads for further tokens. Of a causal square of attention half is counted; of experts
    those that a token goes to; norms, softmax, router and activations not at all.
    """
    hidden, products = shape.hidden_size, 2 * PASSES
    mlp = 3 if shape.swiglu else 2
    layers = shape.num_layers + shape.mtp_num_layers
    experts = 0
    if shape.num_experts is not None:
        width = shape.moe_latent_size or hidden
        experts = shape.expert_ffn * shape.moe_router_topk * mlp * width
        experts += 2 * width * hidden if shape.moe_latent_size else 0
        experts += (shape.moe_shared_expert_intermediate_size or 0) * mlp * hidden
    return {
        "attention": products * layers * hidden * (shape.qkv_size + shape.query_size),
        # Scores and their sum over values: 2 of them, of which half is masked.
        "core_attention": products * layers * shape.query_size * shape.seq_length,
        "mlp": products * shape.num_dense_layers * shape.ffn_hidden_size * mlp * hidden,
        "experts": products * shape.num_expert_layers * experts,
        "mtp": products * shape.mtp_num_layers * (3 * hidden + 2 * hidden * hidden),
        "logits": products * hidden * shape.padded_vocab_size * (shape.mtp_num_layers + 1),
    }


def _full_attention_flops(shape: ModelShape) -> int:
    """Return training FLOPs of one token by Hoffmann et al., appendix F, of a dense model.

    Embedding and logits are left out, as their table A4 does (their formulas list both), and the
    softmax is 3 per score and head.
    """
    hidden, length = shape.hidden_size, shape.seq_length
    projections = 2 * hidden * (shape.qkv_size + shape.query_size)
    scores = 4 * length * shape.query_size + 3 * shape.num_attention_heads * length
    mlp = 2 * hidden * shape.ffn_hidden_size * (3 if shape.swiglu else 2)
    return PASSES * shape.num_layers * (projections + scores + mlp)


def chinchilla_ratio(shape: ModelShape) -> float:
    """Return exact FLOPs over 6 N D as Table A4 of Hoffmann et al. has them.

    FLOPs are `full_attention`; N is `chinchilla_parameters`, which has the output layer and
    relative positions but not the input embedding.
    """
    return _full_attention_flops(shape) / (FLOPS_PER_PARAM_TOKEN * chinchilla_parameters(shape))


def choose_loss_path(
    num_tokens: int, num_distinct: int, partition_vocab_size: int, workspace_mb: int
) -> str:
    """Return the path that `--emo-loss-path auto` takes with 2-byte logits.

    As `loss.fused_linear.auto_path`: logits where they and fp32 cost rows fit, else recompute.
    """
    kept = partition_vocab_size * (num_tokens * 2 + num_distinct * 4)
    return "logits" if kept <= workspace_mb << 20 else "recompute"


def count_loss_flops(
    shape: ModelShape, num_tokens: int, path: str, *, num_distinct: int = 0, cost_dim: int = 0
) -> LossFlops:
    """Return what the loss adds for a microbatch, over all tensor-parallel ranks.

    The cost rows 1 - E e_t are one product [U, D] x [D, V], of U distinct targets and a frozen
    table of D columns, which no backward follows: 2 U D V, and once more where the path `recompute`
    forms logits again, 2 N h V. What is elementwise over [N, V], the expected cost d and its
    gradient, is left out, as softmax is.

    Args:
        path: logits, recompute or forward.
        num_distinct: U, 0 for an objective without a cost.
        cost_dim: D.

    Raises:
        ValueError: an unknown path.
    """
    if path not in ("logits", "recompute", "forward"):
        raise ValueError(f"path: expected logits, recompute or forward, got {path!r}")
    times = 2 if path == "recompute" else 1
    vocab = shape.padded_vocab_size
    return LossFlops(
        cost_products=times * 2 * num_distinct * cost_dim * vocab,
        repeated_logits=(times - 1) * 2 * num_tokens * shape.hidden_size * vocab,
    )
