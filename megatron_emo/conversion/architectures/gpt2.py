"""GPT-2: learned positions, LayerNorm, GELU, weights of linear layers stored transposed."""

from __future__ import annotations

from typing import Any

from megatron_emo.conversion.architectures.common import layer_norm_rules, unexpected_values
from megatron_emo.conversion.errors import UnsupportedModelError
from megatron_emo.conversion.mapping import (
    CONV1D,
    CONV1D_QKV,
    EMBEDDING,
    LAYERS,
    OUTPUT,
    POSITIONS,
    SAME,
    Rule,
    Transform,
)
from megatron_emo.conversion.settings import ModelSettings

TYPES = ("gpt2",)
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_SUPPORTED = (
    f"activation_function {', '.join(_ACTIVATIONS)}; scaled attention; one embedding dropout"
)


def settings_of_config(config: Any, where: str) -> ModelSettings:
    """Read a GPT2Config."""
    expected = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "embd_pdrop": config.resid_pdrop,
    }
    problems = unexpected_values(config, expected)
    if config.activation_function not in _ACTIVATIONS:
        problems.append(f"activation_function {config.activation_function!r}")
    if problems:
        raise UnsupportedModelError(where, problems, _SUPPORTED)
    return ModelSettings(
        model_type="gpt2",
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        ffn_hidden_size=config.n_inner or 4 * config.n_embd,
        num_attention_heads=config.n_head,
        num_query_groups=config.n_head,
        kv_channels=config.n_embd // config.n_head,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.n_positions,
        norm_epsilon=config.layer_norm_epsilon,
        tied=config.tie_word_embeddings,
        activation=_ACTIVATIONS[config.activation_function],
        normalization="LayerNorm",
        learned_positions=True,
        linear_bias=True,
        qkv_bias=True,
        attention_dropout=config.attn_pdrop,
        hidden_dropout=config.resid_pdrop,
    )


def config_values(settings: ModelSettings, where: str) -> dict[str, Any]:
    """Return the keyword arguments of GPT2Config."""
    problems = settings.mismatches(
        activation=("gelu_tanh", "gelu"),
        normalization="LayerNorm",
        learned_positions=True,
        linear_bias=True,
        qk_layernorm=False,
        num_experts=None,
        num_query_groups=settings.num_attention_heads,
        kv_channels=settings.hidden_size // settings.num_attention_heads,
    )
    if problems:
        raise UnsupportedModelError(f"{where} as gpt2", problems, _SUPPORTED)
    return {
        "vocab_size": settings.vocab_size,
        "n_positions": settings.max_position_embeddings,
        "n_embd": settings.hidden_size,
        "n_layer": settings.num_layers,
        "n_head": settings.num_attention_heads,
        "n_inner": settings.ffn_hidden_size,
        "activation_function": "gelu_new" if settings.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied,
        "attn_pdrop": settings.attention_dropout,
        "resid_pdrop": settings.hidden_dropout,
        "embd_pdrop": settings.hidden_dropout,
    }


def rules(settings: ModelSettings) -> list[Rule]:
    """Return the table of rules."""
    layer = "transformer.h.{layer}."
    table = [
        Rule(EMBEDDING, ("transformer.wte.weight",), ("vocab", "hidden"), SAME),
        Rule(POSITIONS, ("transformer.wpe.weight",), ("positions", "hidden"), SAME),
    ]
    table += layer_norm_rules(LAYERS + "self_attention.linear_qkv.layer_norm_", layer + "ln_1.")
    table += _linear("self_attention.linear_qkv", layer + "attn.c_attn", "qkv hidden", CONV1D_QKV)
    table += _linear("self_attention.linear_proj", layer + "attn.c_proj", "hidden attention")
    table += layer_norm_rules(LAYERS + "mlp.linear_fc1.layer_norm_", layer + "ln_2.")
    table += _linear("mlp.linear_fc1", layer + "mlp.c_fc", "ffn hidden")
    table += _linear("mlp.linear_fc2", layer + "mlp.c_proj", "hidden ffn")
    table += layer_norm_rules("decoder.final_layernorm.", "transformer.ln_f.")
    if not settings.tied:
        table.append(Rule(OUTPUT, ("lm_head.weight",), ("vocab", "hidden"), SAME))
    return table


def _linear(megatron: str, hf: str, shape: str, transform: Transform = CONV1D) -> list[Rule]:
    rows, columns = shape.split()
    # A bias has no second dimension to exchange; that of queries, keys and values is regrouped.
    of_bias = transform if transform is CONV1D_QKV else SAME
    return [
        Rule(f"{LAYERS}{megatron}.weight", (f"{hf}.weight",), (rows, columns), transform),
        Rule(f"{LAYERS}{megatron}.bias", (f"{hf}.bias",), (rows,), of_bias),
    ]
