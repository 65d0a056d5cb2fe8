"""Model settings to and from the arguments that Megatron stores in a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_emo.conversion.errors import ConversionError, UnsupportedModelError
from megatron_emo.conversion.settings import ModelSettings

_OFF = {
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "layernorm_zero_centered_gamma": False,
    "moe_latent_size": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_group_topk": None,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "quick_geglu": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "squared_relu": False,
    "use_mup": False,
    "window_size": None,
}
"""What no supported Hugging Face architecture has. Arguments of other versions lack some."""


def arguments_of(
    settings: ModelSettings, *, padded_vocab_size: int, dtype: torch.dtype
) -> argparse.Namespace:
    """Return Megatron's arguments: what --use-checkpoint-args takes over, and what it leaves out.

    The latter (the epsilon, the activation, layer norms of queries and keys, rotary scaling) is
    read by `training.model_arguments`.
    """
    moe = settings.num_experts is not None
    values: dict[str, Any] = dict.fromkeys(("spec", "tiktoken_pattern", "mtp_num_layers"))
    values |= {name: value for name, value in _OFF.items() if name != "softmax_scale"}
    values |= {
        "num_layers": settings.num_layers,
        "hidden_size": settings.hidden_size,
        "ffn_hidden_size": settings.ffn_hidden_size,
        "num_attention_heads": settings.num_attention_heads,
        "group_query_attention": settings.num_query_groups != settings.num_attention_heads,
        "num_query_groups": settings.num_query_groups,
        "kv_channels": settings.kv_channels,
        "seq_length": settings.max_position_embeddings,
        "max_position_embeddings": settings.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if settings.learned_positions else "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": settings.rotary_base,
        "rotary_seq_len_interpolation_factor": settings.rope_interpolation,
        "use_rope_scaling": settings.llama3_rope_factor is not None,
        "rope_scaling_factor": settings.llama3_rope_factor or 8.0,
        "add_bias_linear": settings.linear_bias,
        "add_qkv_bias": settings.qkv_bias and not settings.linear_bias,
        "swiglu": settings.activation == "swiglu",
        "openai_gelu": settings.activation == "gelu_tanh",
        "relu": settings.activation == "relu",
        "bias_gelu_fusion": settings.activation == "gelu_tanh",
        "untie_embeddings_and_output_weights": not settings.tied,
        "normalization": settings.normalization,
        "layernorm_epsilon": settings.norm_epsilon,
        "qk_layernorm": settings.qk_layernorm,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": settings.attention_dropout,
        "hidden_dropout": settings.hidden_dropout,
        "num_experts": settings.num_experts,
        "moe_ffn_hidden_size": settings.ffn_hidden_size if moe else None,
        "moe_layer_freq": 1,
        "moe_router_topk": settings.moe_topk,
        "moe_grouped_gemm": False,
        "moe_aux_loss_coeff": settings.moe_aux_loss,
        "moe_single_grouped_weight": False,
        "moe_single_grouped_bias": False,
        "vocab_size": settings.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**values)


def settings_of_arguments(
    args: argparse.Namespace, *, model_type: str, vocab_size: int, where: str
) -> ModelSettings:
    """Return the settings of a model trained with `args`, this project's or another Megatron's.

    Raises:
        ConversionError: arguments without the sizes of the model, or a setting that no supported
            architecture has.
    """
    values = vars(args)
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    absent = [name for name in sizes if values.get(name) is None]
    if absent:
        raise ConversionError(f"{where}: its arguments lack {', '.join(absent)}")
    _refuse_unsupported(values, where)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    grouped = values.get("group_query_attention", False)
    experts = values.get("num_experts")
    ffn = values.get("moe_ffn_hidden_size") if experts else None
    biased = values.get("add_bias_linear", not values.get("disable_bias_linear", False))
    scaled = values.get("use_rope_scaling", False)
    return ModelSettings(
        model_type=model_type,
        num_layers=values["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=ffn or values.get("ffn_hidden_size") or 4 * hidden,
        num_attention_heads=heads,
        num_query_groups=values["num_query_groups"] if grouped else heads,
        kv_channels=values.get("kv_channels") or hidden // heads,
        vocab_size=vocab_size,
        max_position_embeddings=values["max_position_embeddings"],
        norm_epsilon=values.get("layernorm_epsilon", values.get("norm_epsilon", 1e-5)),
        tied=not values.get("untie_embeddings_and_output_weights", False),
        activation=_activation(values, biased),
        normalization=values.get("normalization", "LayerNorm"),
        learned_positions=_position_type(values) == "learned_absolute",
        linear_bias=biased,
        qkv_bias=biased or values.get("add_qkv_bias", False),
        qk_layernorm=values.get("qk_layernorm", False),
        rotary_base=values.get("rotary_base", 10000),
        llama3_rope_factor=float(values.get("rope_scaling_factor", 8.0)) if scaled else None,
        rope_interpolation=values.get("rotary_seq_len_interpolation_factor"),
        num_experts=experts,
        moe_topk=values.get("moe_router_topk", 2),
        moe_aux_loss=values.get("moe_aux_loss_coeff", 0.0),
        # Llama's config knows no dropout behind the blocks; it is off in use anyway.
        attention_dropout=values.get("attention_dropout", 0.0),
        hidden_dropout=(
            values.get("hidden_dropout", 0.0)
            if _position_type(values) == "learned_absolute"
            else 0.0
        ),
    )


def _activation(values: dict[str, Any], biased: bool) -> str:
    if values.get("swiglu", False):
        return "swiglu"
    if values.get("relu", False):
        return "relu"
    # Megatron's fused kernel is the tanh approximation, its unfused function is not.
    fused = values.get("bias_gelu_fusion", True) and biased
    return "gelu_tanh" if fused or values.get("openai_gelu", False) else "gelu"


def _position_type(values: dict[str, Any]) -> str:
    kind = values.get("position_embedding_type", "learned_absolute")
    return "rope" if values.get("use_rotary_position_embeddings", False) else kind


def _refuse_unsupported(values: dict[str, Any], where: str) -> None:
    problems = [
        f"{name} {values[name]!r}" for name, off in _OFF.items() if values.get(name, off) != off
    ]
    if _position_type(values) not in ("rope", "learned_absolute"):
        problems.append(f"position_embedding_type {_position_type(values)!r}")
    if not values.get("add_position_embedding", True):
        problems.append("add_position_embedding False")
    if values.get("moe_layer_freq", 1) != 1 and values.get("num_experts"):
        problems.append(f"moe_layer_freq {values['moe_layer_freq']!r}")
    if problems:
        raise UnsupportedModelError(
            where,
            problems,
            "GPT-2, OPT, Llama, Mistral, Qwen2, Qwen3 and Mixtral as Megatron has them",
        )
