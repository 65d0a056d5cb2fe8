"""Llama 1 to 3, Mistral, Qwen2 and 2.5, Qwen3, Mixtral: rotary positions, RMSNorm, SwiGLU."""

from __future__ import annotations

from typing import Any

from megatron_emo.conversion.errors import UnsupportedModelError
from megatron_emo.conversion.mapping import EMBEDDING, GATE_UP, LAYERS, OUTPUT, QKV, SAME, Rule
from megatron_emo.conversion.settings import ModelSettings

TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
_SUPPORTED = (
    "silu, full attention, rope types default, linear (whole factor) and llama3 (low 1, high 4, "
    "original 8192), attention_bias and mlp_bias both or neither (Llama)"
)
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def settings_of_config(config: Any, where: str) -> ModelSettings:
    """Read LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config or MixtralConfig."""
    kind = config.model_type
    rotary, problems = _read_rope(config)
    problems += _read_attention(config)
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act!r}")
    biased = bool(getattr(config, "attention_bias", False))
    if biased and kind == "qwen3":
        problems.append("attention_bias True without mlp_bias")
    if kind == "llama" and biased != bool(config.mlp_bias):
        problems.append(f"attention_bias {biased} with mlp_bias {config.mlp_bias}")
    if problems:
        raise UnsupportedModelError(where, problems, _SUPPORTED)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = {}
    if kind == "mixtral":
        experts = {
            "num_experts": config.num_local_experts,
            "moe_topk": config.num_experts_per_tok,
            "moe_aux_loss": config.router_aux_loss_coef,
        }
    return ModelSettings(
        model_type=kind,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        kv_channels=head,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        linear_bias=biased,
        qkv_bias=biased or kind == "qwen2",
        qk_layernorm=kind == "qwen3",
        attention_dropout=config.attention_dropout,
        **rotary,
        **experts,
    )


def config_values(settings: ModelSettings, where: str) -> dict[str, Any]:
    """Return the keyword arguments of the config class."""
    kind = settings.model_type
    problems = settings.mismatches(
        activation="swiglu",
        normalization="RMSNorm",
        learned_positions=False,
        linear_bias=(False, True) if kind == "llama" else False,
        qkv_bias=settings.linear_bias if kind != "qwen2" else True,
        qk_layernorm=kind == "qwen3",
        hidden_dropout=0.0,
    )
    if bool(settings.num_experts) != (kind == "mixtral"):
        problems.append(f"num_experts {settings.num_experts}")
    if kind == "qwen2" and settings.kv_channels * settings.num_attention_heads != (
        settings.hidden_size
    ):
        problems.append(f"kv_channels {settings.kv_channels} (Qwen2 has no head_dim)")
    if problems:
        raise UnsupportedModelError(f"{where} as {kind}", problems, _SUPPORTED)
    values = {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.ffn_hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_query_groups,
        "max_position_embeddings": settings.max_position_embeddings,
        "rms_norm_eps": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied,
        "attention_dropout": settings.attention_dropout,
        "hidden_act": "silu",
        "rope_parameters": _rope_parameters(settings),
    }
    if kind != "qwen2":
        values["head_dim"] = settings.kv_channels
    if kind == "llama":
        values |= {"attention_bias": settings.linear_bias, "mlp_bias": settings.linear_bias}
    if kind in ("mistral", "mixtral"):
        values["sliding_window"] = None
    if kind == "mixtral":
        values |= {
            "num_local_experts": settings.num_experts,
            "num_experts_per_tok": settings.moe_topk,
            "router_aux_loss_coef": settings.moe_aux_loss,
        }
    return values


def rules(settings: ModelSettings) -> list[Rule]:
    """Return the table of rules."""
    attention, layer = "model.layers.{layer}.self_attn.", "model.layers.{layer}."
    qkv = tuple(f"{attention}{name}_proj." for name in "qkv")
    table = [
        Rule(EMBEDDING, ("model.embed_tokens.weight",), ("vocab", "hidden"), SAME),
        _norm("self_attention.linear_qkv.layer_norm_weight", layer + "input_layernorm.weight"),
        Rule(
            LAYERS + "self_attention.linear_qkv.weight",
            tuple(name + "weight" for name in qkv),
            ("qkv", "hidden"),
            QKV,
        ),
    ]
    if settings.qkv_bias:
        bias = tuple(name + "bias" for name in qkv)
        table.append(Rule(LAYERS + "self_attention.linear_qkv.bias", bias, ("qkv",), QKV))
    if settings.qk_layernorm:
        for name in "qk":
            norm = f"{LAYERS}self_attention.{name}_layernorm.weight"
            table.append(Rule(norm, (f"{attention}{name}_norm.weight",), ("head",), SAME))
    table += _linear(
        "self_attention.linear_proj", (attention + "o_proj",), "hidden", "attention", settings
    )
    table.append(
        _norm("mlp.linear_fc1.layer_norm_weight", layer + "post_attention_layernorm.weight")
    )
    table += _experts() if settings.num_experts else _mlp(settings)
    table.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",), SAME))
    if not settings.tied:
        table.append(Rule(OUTPUT, ("lm_head.weight",), ("vocab", "hidden"), SAME))
    return table


def _norm(megatron: str, hf: str) -> Rule:
    return Rule(LAYERS + megatron, (hf,), ("hidden",), SAME)


def _linear(
    megatron: str, hf: tuple[str, ...], rows: str, columns: str, settings: ModelSettings
) -> list[Rule]:
    transform = GATE_UP if len(hf) == 2 else SAME
    weight = tuple(f"{name}.weight" for name in hf)
    table = [Rule(f"{LAYERS}{megatron}.weight", weight, (rows, columns), transform)]
    if settings.linear_bias:
        bias = tuple(f"{name}.bias" for name in hf)
        table.append(Rule(f"{LAYERS}{megatron}.bias", bias, (rows,), transform))
    return table


def _mlp(settings: ModelSettings) -> list[Rule]:
    mlp = "model.layers.{layer}.mlp."
    gate_up = (mlp + "gate_proj", mlp + "up_proj")
    return _linear("mlp.linear_fc1", gate_up, "ffn_in", "hidden", settings) + _linear(
        "mlp.linear_fc2", (mlp + "down_proj",), "hidden", "ffn", settings
    )


def _experts() -> list[Rule]:
    moe = "model.layers.{layer}.block_sparse_moe."
    expert = moe + "experts.{expert}."
    fc1, fc2 = (f"{LAYERS}mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
    return [
        Rule(LAYERS + "mlp.router.weight", (moe + "gate.weight",), ("experts", "hidden"), SAME),
        Rule(fc1, (expert + "w1.weight", expert + "w3.weight"), ("ffn_in", "hidden"), GATE_UP),
        Rule(fc2, (expert + "w2.weight",), ("hidden", "ffn"), SAME),
    ]


def _read_rope(config: Any) -> tuple[dict[str, Any], list[str]]:
    """What the rotary positions are in Megatron's words, and what it has no words for."""
    rope = config.rope_parameters
    kind, theta, problems = rope["rope_type"], rope["rope_theta"], []
    values: dict[str, Any] = {"rotary_base": int(theta)}
    if theta != int(theta):
        problems.append(f"rope_theta {theta} (--rotary-base is a whole number)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']}")
    if kind == "llama3":
        values["llama3_rope_factor"] = float(rope["factor"])
        for name, constant in _LLAMA3.items():
            if rope.get(name) != constant:
                problems.append(f"rope type llama3 with {name} {rope.get(name)}")
    elif kind == "linear" and rope["factor"] == int(rope["factor"]):
        values["rope_interpolation"] = int(rope["factor"])
    elif kind != "default":
        problems.append(f"rope type {kind!r} with {rope}")
    return values, problems


def _rope_parameters(settings: ModelSettings) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(settings.rotary_base), "rope_type": "default"}
    if settings.llama3_rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": settings.llama3_rope_factor, **_LLAMA3}
    elif settings.rope_interpolation is not None:
        rope |= {"rope_type": "linear", "factor": float(settings.rope_interpolation)}
    return rope


def _read_attention(config: Any) -> list[str]:
    """Windows that would hide something from a position in reach."""
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", window is not None)
    if used and window is not None and window < config.max_position_embeddings:
        return [
            f"sliding_window {window} below max_position_embeddings "
            f"{config.max_position_embeddings} (--max-position-embeddings {window} keeps within it)"
        ]
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} and used:
        return [f"layer_types {sorted(layers)}"]
    return []
