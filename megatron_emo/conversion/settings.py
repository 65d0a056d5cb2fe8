"""What defines a model, in one vocabulary between Hugging Face's and Megatron's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSettings:
    """A decoder as both sides can express it; `vocab_size` is without padding."""

    model_type: str
    """Of the Hugging Face config class, for example "llama"."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied: bool
    """Whether the output layer is the embedding."""
    activation: str = "swiglu"
    """swiglu, gelu_tanh, gelu or relu."""
    normalization: str = "RMSNorm"
    learned_positions: bool = False
    """An embedding of positions; else rotary ones over the whole head."""
    linear_bias: bool = False
    """Biases in every linear layer but the output layer."""
    qkv_bias: bool = False
    """Biases in the query, key and value projection."""
    qk_layernorm: bool = False
    rotary_base: int = 10000
    llama3_rope_factor: float | None = None
    """Of the scaling of Llama 3.1 with its constants 1, 4 and 8192."""
    rope_interpolation: int | None = None
    """Positions are divided by it."""
    num_experts: int | None = None
    moe_topk: int = 2
    moe_aux_loss: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    @property
    def dims(self) -> dict[str, int]:
        """The sizes that the rules name."""
        heads = self.num_attention_heads + 2 * self.num_query_groups
        return {
            "hidden": self.hidden_size,
            "vocab": self.vocab_size,
            "positions": self.max_position_embeddings,
            "head": self.kv_channels,
            "attention": self.num_attention_heads * self.kv_channels,
            "qkv": heads * self.kv_channels,
            "ffn": self.ffn_hidden_size,
            "ffn_in": self.ffn_hidden_size * (2 if self.activation == "swiglu" else 1),
            "experts": self.num_experts or 0,
        }

    def mismatches(self, **expected: object) -> list[str]:
        """Return "name value (expected ...)" of the fields that differ from `expected`.

        A tuple names all the values that are allowed.
        """
        problems = []
        for name, wanted in expected.items():
            value = getattr(self, name)
            choices = wanted if isinstance(wanted, tuple) else (wanted,)
            if value not in choices:
                problems.append(f"{name} {value!r} (expected {' or '.join(map(repr, choices))})")
        return problems
