"""OPT: learned positions behind two unused rows, LayerNorm before each block, ReLU."""

from __future__ import annotations

from typing import Any

from megatron_emo.conversion.architectures.common import layer_norm_rules, unexpected_values
from megatron_emo.conversion.errors import UnsupportedModelError
from megatron_emo.conversion.mapping import (
    EMBEDDING,
    LAYERS,
    OUTPUT,
    POSITIONS,
    QKV,
    SAME,
    Rule,
)
from megatron_emo.conversion.settings import ModelSettings

TYPES = ("opt",)
POSITION_OFFSET = 2
"""Rows for padding to the left, which a causal model never looks at."""
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_SUPPORTED = (
    "layer norms before the blocks and a final one, biases, word_embed_proj_dim equal to "
    f"hidden_size, activation_function {', '.join(_ACTIVATIONS)}"
)


def settings_of_config(config: Any, where: str) -> ModelSettings:
    """Read an OPTConfig."""
    expected = {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": config.hidden_size,
    }
    problems = unexpected_values(config, expected)
    if config.activation_function not in _ACTIVATIONS:
        problems.append(f"activation_function {config.activation_function!r}")
    if problems:
        raise UnsupportedModelError(where, problems, _SUPPORTED)
    return ModelSettings(
        model_type="opt",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_dim,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_attention_heads,
        kv_channels=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=1e-5,  # not in the config: torch's default
        tied=config.tie_word_embeddings,
        activation=_ACTIVATIONS[config.activation_function],
        normalization="LayerNorm",
        learned_positions=True,
        linear_bias=True,
        qkv_bias=True,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.dropout,
    )


def config_values(settings: ModelSettings, where: str) -> dict[str, Any]:
    """Return the keyword arguments of OPTConfig."""
    problems = settings.mismatches(
        activation=("relu", "gelu", "gelu_tanh"),
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        learned_positions=True,
        linear_bias=True,
        qk_layernorm=False,
        num_experts=None,
        num_query_groups=settings.num_attention_heads,
        kv_channels=settings.hidden_size // settings.num_attention_heads,
    )
    if problems:
        raise UnsupportedModelError(f"{where} as opt", problems, _SUPPORTED)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "word_embed_proj_dim": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "ffn_dim": settings.ffn_hidden_size,
        "num_attention_heads": settings.num_attention_heads,
        "max_position_embeddings": settings.max_position_embeddings,
        "activation_function": names[settings.activation],
        "tie_word_embeddings": settings.tied,
        "attention_dropout": settings.attention_dropout,
        "dropout": settings.hidden_dropout,
    }


def rules(settings: ModelSettings) -> list[Rule]:
    """Return the table of rules."""
    body = "model.decoder."
    layer = body + "layers.{layer}."
    qkv = tuple(f"{layer}self_attn.{name}_proj" for name in "qkv")
    table = [
        Rule(EMBEDDING, (body + "embed_tokens.weight",), ("vocab", "hidden"), SAME),
        Rule(
            POSITIONS,
            (body + "embed_positions.weight",),
            ("positions", "hidden"),
            SAME,
            leading_rows=POSITION_OFFSET,
        ),
    ]
    table += layer_norm_rules(
        LAYERS + "self_attention.linear_qkv.layer_norm_", layer + "self_attn_layer_norm."
    )
    table += _linear("self_attention.linear_qkv", qkv, "qkv hidden")
    table += _linear(
        "self_attention.linear_proj", (layer + "self_attn.out_proj",), "hidden attention"
    )
    table += layer_norm_rules(LAYERS + "mlp.linear_fc1.layer_norm_", layer + "final_layer_norm.")
    table += _linear("mlp.linear_fc1", (layer + "fc1",), "ffn hidden")
    table += _linear("mlp.linear_fc2", (layer + "fc2",), "hidden ffn")
    table += layer_norm_rules("decoder.final_layernorm.", body + "final_layer_norm.")
    if not settings.tied:
        table.append(Rule(OUTPUT, ("lm_head.weight",), ("vocab", "hidden"), SAME))
    return table


def _linear(megatron: str, hf: tuple[str, ...], shape: str) -> list[Rule]:
    rows, columns = shape.split()
    transform = QKV if len(hf) == 3 else SAME
    return [
        Rule(
            f"{LAYERS}{megatron}.weight",
            tuple(f"{name}.weight" for name in hf),
            (rows, columns),
            transform,
        ),
        Rule(f"{LAYERS}{megatron}.bias", tuple(f"{name}.bias" for name in hf), (rows,), transform),
    ]
