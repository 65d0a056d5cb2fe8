"""The shape of a GPT model, in Megatron's words, and how many parameters it has."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

NORMALIZATIONS = ("LayerNorm", "RMSNorm")

LARGEST = 10**9
"""Of every size: beyond it, counts would leave what a float holds."""
_COUNTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size"),
    *("seq_length", "num_query_groups", "kv_channels", "num_experts", "moe_router_topk"),
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size"),
)

# Megatron's arguments that make another kind of model: (name, value that does not, flag).
_OTHER_MODELS = (
    ("multi_latent_attention", False, "--multi-latent-attention"),
    ("hybrid_layer_pattern", None, "--hybrid-layer-pattern"),
    ("experimental_attention_variant", None, "--experimental-attention-variant"),
    ("heterogeneous_layers_config_path", None, "--heterogeneous-layers-config-path"),
)


@dataclass(frozen=True)
class ModelShape:
    """All of a decoder that parameters and FLOPs depend on; names and defaults are Megatron's."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    padded_vocab_size: int
    """Rows of the embedding, the padding that tensor parallelism asks for included."""
    seq_length: int
    num_query_groups: int | None = None
    """Of grouped-query attention; None: as many as heads."""
    kv_channels: int | None = None
    """Of a head; None: hidden_size / num_attention_heads."""
    swiglu: bool = False
    normalization: str = "LayerNorm"
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    attention_output_gate: bool = False
    untie_embeddings_and_output_weights: bool = False
    learned_positions: int = 0
    """--max-position-embeddings of learned absolute positions; 0 for rotary or none."""
    num_experts: int | None = None
    """None: dense."""
    moe_router_topk: int = 2
    moe_layer_freq: int | tuple[int, ...] = 1
    """Every how many layers one has experts, or 1 and 0 for each layer."""
    moe_ffn_hidden_size: int | None = None
    """Of one expert; None: ffn_hidden_size."""
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_latent_size: int | None = None
    mtp_num_layers: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"{name}: expected 1 to {LARGEST:,}, got {value}")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_query_groups: expected a divisor of num_attention_heads "
                f"{self.num_attention_heads}, got {self.groups}"
            )
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization: expected one of {NORMALIZATIONS}, got {self.normalization!r}"
            )
        freq = self.moe_layer_freq
        if not isinstance(freq, int) and len(freq) != self.num_layers:
            raise ValueError(f"moe_layer_freq: expected {self.num_layers} layers, got {len(freq)}")
        if isinstance(freq, int) and freq < 1:
            raise ValueError(f"moe_layer_freq: expected at least 1, got {freq}")
        if self.num_experts is not None and self.moe_router_topk > self.num_experts:
            raise ValueError(
                f"moe_router_topk: expected at most num_experts {self.num_experts}, got "
                f"{self.moe_router_topk}"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelShape:
        """Return the shape of Megatron's arguments.

        Raises:
            ValueError: arguments of a model that is no plain GPT, its flag named.
        """
        for name, plain, flag in _OTHER_MODELS:
            if getattr(args, name, plain) not in (plain, False):
                raise ValueError(f"{flag}: expected {plain}, got {getattr(args, name)}")
        derived = {"learned_positions", "num_query_groups", "moe_layer_freq", "mtp_num_layers"}
        values = {
            field.name: getattr(args, field.name, field.default)
            for field in fields(cls)
            if field.name not in derived
        }
        freq = getattr(args, "moe_layer_freq", 1)
        learned = getattr(args, "position_embedding_type", None) == "learned_absolute"
        return cls(
            **values,
            num_query_groups=args.num_query_groups if args.group_query_attention else None,
            moe_layer_freq=tuple(freq) if isinstance(freq, list) else freq,
            mtp_num_layers=getattr(args, "mtp_num_layers", None) or 0,
            learned_positions=args.max_position_embeddings if learned else 0,
        )

    @property
    def head_channels(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Of all heads together."""
        return self.head_channels * self.num_attention_heads

    @property
    def qkv_size(self) -> int:
        """Columns of the first projection of attention."""
        gate = self.query_size if self.attention_output_gate else 0
        return self.query_size + 2 * self.head_channels * self.groups + gate

    @property
    def num_own_expert_layers(self) -> int:
        """Without the heads for further tokens."""
        if self.num_experts is None:
            return 0
        if isinstance(self.moe_layer_freq, int):
            return -(-self.num_layers // self.moe_layer_freq)
        return sum(self.moe_layer_freq)

    @property
    def num_mtp_expert_layers(self) -> int:
        """Of the heads for further tokens, which are as the last layer."""
        if self.num_experts is None:
            return 0
        freq, last = self.moe_layer_freq, self.num_layers - 1
        has_experts = last % freq == 0 if isinstance(freq, int) else freq[last]
        return self.mtp_num_layers * has_experts

    @property
    def num_expert_layers(self) -> int:
        return self.num_own_expert_layers + self.num_mtp_expert_layers

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers + self.mtp_num_layers - self.num_expert_layers

    @property
    def expert_ffn(self) -> int:
        return self.moe_ffn_hidden_size or self.ffn_hidden_size


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by what they are for."""

    layers: int
    """Of the transformer and its last norm; all experts."""
    idle_experts: int
    """Of the experts that a token does not go through."""
    embedding: int
    """Of tokens and learned positions."""
    output: int
    """Of the output layer, 0 where it is the embedding."""

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.output

    @property
    def non_embedding(self) -> int:
        """Without input embedding and output layer."""
        return self.layers

    @property
    def active(self) -> int:
        """What a token goes through: the N of 6 N D, the total of a dense model."""
        return self.total - self.idle_experts

    @property
    def active_non_embedding(self) -> int:
        return self.layers - self.idle_experts


def count_parameters(shape: ModelShape) -> ParameterCounts:
    """Return exact counts: those of Megatron's GPTModel, megatron-core 0.19.2."""
    hidden = shape.hidden_size
    norm = hidden * _norm_weights(shape)
    idle_mlp = 0
    experts = 0
    if shape.num_experts is not None:
        width = shape.moe_latent_size or hidden
        routed = _mlp(shape, width, shape.expert_ffn)
        idle_mlp = routed * (shape.num_experts - shape.moe_router_topk)
        experts = routed * shape.num_experts + _router(shape) + _shared_expert(shape)
        if shape.moe_latent_size:
            experts += 2 * hidden * width
            experts += (hidden + width) if shape.add_bias_linear else 0
    num_layers = shape.num_layers + shape.mtp_num_layers
    layers = (
        num_layers * (_attention(shape) + 2 * norm)
        + shape.num_dense_layers * _mlp(shape, hidden, shape.ffn_hidden_size)
        + shape.num_expert_layers * experts
        + norm
        + shape.mtp_num_layers * (3 * norm + 2 * hidden * hidden)
    )
    vocabulary = shape.padded_vocab_size * hidden
    return ParameterCounts(
        layers=layers,
        idle_experts=idle_mlp * shape.num_expert_layers,
        embedding=vocabulary + shape.learned_positions * hidden,
        output=vocabulary if shape.untie_embeddings_and_output_weights else 0,
    )


def _norm_weights(shape: ModelShape) -> int:
    return 1 if shape.normalization == "RMSNorm" else 2


def _attention(shape: ModelShape) -> int:
    hidden = shape.hidden_size
    count = hidden * shape.qkv_size + shape.query_size * hidden
    if shape.add_bias_linear or shape.add_qkv_bias:
        count += shape.qkv_size
    if shape.add_bias_linear:
        count += hidden
    if shape.qk_layernorm:
        count += 2 * shape.head_channels * _norm_weights(shape)
    return count


def _mlp(shape: ModelShape, width: int, ffn: int) -> int:
    first = 2 * ffn if shape.swiglu else ffn
    bias = first + width if shape.add_bias_linear else 0
    return width * (first + ffn) + bias


def _router(shape: ModelShape) -> int:
    return shape.num_experts * (shape.hidden_size + (1 if shape.add_bias_linear else 0))


def _shared_expert(shape: ModelShape) -> int:
    if not shape.moe_shared_expert_intermediate_size:
        return 0
    gate = shape.hidden_size if shape.moe_shared_expert_gate else 0
    return _mlp(shape, shape.hidden_size, shape.moe_shared_expert_intermediate_size) + gate


def chinchilla_parameters(shape: ModelShape) -> int:
    """Return N as Table A4 of Hoffmann et al. counts it.

    Biases everywhere, LayerNorm, relative positions (a matrix and two vectors a layer) and the
    output layer, but not the input embedding. Attention has as many channels as the hidden state.

    References:
        Hoffmann et al. (2022), tables A4 and A9, as reproduced by nanoGPT's scaling_laws.ipynb.
    """
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    attention = 4 * hidden * hidden + 4 * hidden
    positions = hidden * hidden + 2 * hidden
    mlp = 2 * hidden * ffn + ffn + hidden
    layer = attention + positions + mlp + 4 * hidden
    return shape.num_layers * layer + 2 * hidden + hidden * shape.padded_vocab_size
