"""Mappings that megatron-bridge 0.6.2 lacks: GPT-2, OPT and Mixtral.

Patterns are Bridge's: `*` stands for a layer's (then an expert's) number. Norms have two names, of
Megatron's local layers and of Transformer Engine's, which fuses them into the linear that follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LAYER = "decoder.layers.*."
OPT_POSITION_OFFSET = 2
"""Rows in front of OPT's position table: position p reads row p + 2, no token rows 0 and 1."""

_INPUT_NORM = ("input_layernorm.{}", "self_attention.linear_qkv.layer_norm_{}")
_MLP_NORM = ("pre_mlp_layernorm.{}", "mlp.linear_fc1.layer_norm_{}")


def register() -> None:
    """Add the mappings to Bridge's registry; a second call does nothing."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge as Base
    from megatron.bridge.models.conversion.model_bridge import get_model_bridge
    from megatron.core.models.gpt.gpt_model import GPTModel
    from transformers import GPT2LMHeadModel, MixtralForCausalLM, OPTForCausalLM

    for source, methods in (
        (GPT2LMHeadModel, (_gpt2_registry, _load_gpt2, _export_gpt2)),
        (OPTForCausalLM, (_opt_registry, _load_opt, _export_opt)),
        (MixtralForCausalLM, (_mixtral_registry, None, None)),
    ):
        if source not in get_model_bridge._exact_types:
            mappings = _bridge_class(Base, source.__name__, *methods)
            Base.register_bridge(source=source, target=GPTModel)(mappings)


def _bridge_class(base: type, name: str, registry: Any, load: Any, export: Any) -> type:
    """Return a Bridge: `registry` lists mappings; `load` and `export` change one HF tensor."""

    def maybe_modify_loaded_hf_weight(self, hf_param, hf_state_dict):
        weights = base.maybe_modify_loaded_hf_weight(self, hf_param, hf_state_dict)
        return load(hf_param, weights) if load and isinstance(hf_param, str) else weights

    def maybe_modify_converted_hf_weight(self, task, converted_weights_dict, hf_state_dict):
        if export is None:
            return converted_weights_dict
        return {key: export(key, weight) for key, weight in converted_weights_dict.items()}

    methods = {
        "mapping_registry": registry,
        "maybe_modify_loaded_hf_weight": maybe_modify_loaded_hf_weight,
        "maybe_modify_converted_hf_weight": maybe_modify_converted_hf_weight,
    }
    return type(f"{name}Mappings", (base,), methods)


def _registry(names: dict[str, str], *mappings: Any) -> Any:
    """Return a registry of `names` (Megatron's to HF's), one to one, and of further mappings."""
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping, ReplicatedMapping

    def one_to_one(megatron_name, hf_name):
        is_position_table = megatron_name.endswith("position_embeddings.weight")
        return (ReplicatedMapping if is_position_table else AutoMapping)(megatron_name, hf_name)

    return MegatronMappingRegistry(*(one_to_one(*pair) for pair in names.items()), *mappings)


def _both(megatron_name: str, hf_name: str) -> dict[str, str]:
    """Return the entries of a module's weight and bias."""
    return {f"{megatron_name}.{kind}": f"{hf_name}.{kind}" for kind in ("weight", "bias")}


def _norms(patterns: tuple[str, ...], hf_name: str, kinds: tuple[str, ...]) -> dict[str, str]:
    """Return the entries of a layer's norm, under both of Megatron's names."""
    return {
        LAYER + pattern.format(kind): f"{hf_name}.{kind}" for pattern in patterns for kind in kinds
    }


def _stored_prefix(bridge: Any, prefix: str) -> str:
    """Return `prefix`, or "" where the folder was saved from the model without its head."""
    state = getattr(getattr(bridge, "hf_pretrained", None), "state", None)
    if state is None:
        return prefix
    keys = state.source.get_all_keys()
    return prefix if any(key.startswith(prefix) for key in keys) else ""


def _gpt2_registry(self: Any) -> Any:
    from megatron.bridge.models.conversion.param_mapping import ConcatenatedQKVMapping

    root = _stored_prefix(self, "transformer.")
    block = f"{root}h.*."
    names = {
        "embedding.word_embeddings.weight": f"{root}wte.weight",
        "embedding.position_embeddings.weight": f"{root}wpe.weight",
        "output_layer.weight": "lm_head.weight",
        **_both("decoder.final_layernorm", f"{root}ln_f"),
        **_norms(_INPUT_NORM, f"{block}ln_1", ("weight", "bias")),
        **_norms(_MLP_NORM, f"{block}ln_2", ("weight", "bias")),
        **_both(f"{LAYER}self_attention.linear_proj", f"{block}attn.c_proj"),
        **_both(f"{LAYER}mlp.linear_fc1", f"{block}mlp.c_fc"),
        **_both(f"{LAYER}mlp.linear_fc2", f"{block}mlp.c_proj"),
    }
    qkv = _both(f"{LAYER}self_attention.linear_qkv", f"{block}attn.c_attn")
    return _registry(names, *(ConcatenatedQKVMapping(*pair) for pair in qkv.items()))


def _load_gpt2(name: str, weight: Tensor) -> Tensor:
    """GPT-2's Conv1D holds [in, out], a linear layer [out, in]."""
    return weight.t().contiguous() if _is_conv1d(name) else weight


_export_gpt2 = _load_gpt2


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _opt_registry(self: Any) -> Any:
    from megatron.bridge.models.conversion.param_mapping import QKVMapping

    root = _stored_prefix(self, "model.") + "decoder."
    block = f"{root}layers.*."
    names = {
        "embedding.word_embeddings.weight": f"{root}embed_tokens.weight",
        "embedding.position_embeddings.weight": f"{root}embed_positions.weight",
        "output_layer.weight": "lm_head.weight",
        **_both("decoder.final_layernorm", f"{root}final_layer_norm"),
        **_norms(_INPUT_NORM, f"{block}self_attn_layer_norm", ("weight", "bias")),
        **_norms(_MLP_NORM, f"{block}final_layer_norm", ("weight", "bias")),
        **_both(f"{LAYER}self_attention.linear_proj", f"{block}self_attn.out_proj"),
        **_both(f"{LAYER}mlp.linear_fc1", f"{block}fc1"),
        **_both(f"{LAYER}mlp.linear_fc2", f"{block}fc2"),
    }
    parts = {part: f"{block}self_attn.{part}_proj." for part in "qkv"}
    qkv = [
        QKVMapping(
            f"{LAYER}self_attention.linear_qkv.{kind}",
            **{part: prefix + kind for part, prefix in parts.items()},
        )
        for kind in ("weight", "bias")
    ]
    return _registry(names, *qkv)


def _load_opt(name: str, weight: Tensor) -> Tensor:
    return weight[OPT_POSITION_OFFSET:] if name.endswith("embed_positions.weight") else weight


def _export_opt(name: str, weight: Tensor) -> Tensor:
    if not name.endswith("embed_positions.weight"):
        return weight
    return torch.cat([weight.new_zeros(OPT_POSITION_OFFSET, weight.shape[1]), weight])


def _mixtral_registry(self: Any) -> Any:
    from megatron.bridge.models.conversion.param_mapping import (
        AutoMapping,
        GatedMLPMapping,
        QKVMapping,
    )

    block = "model.layers.*."
    expert = f"{block}block_sparse_moe.experts.*."
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        **_norms(_INPUT_NORM, f"{block}input_layernorm", ("weight",)),
        **_norms(_MLP_NORM[:1], f"{block}post_attention_layernorm", ("weight",)),
        f"{LAYER}self_attention.linear_proj.weight": f"{block}self_attn.o_proj.weight",
        f"{LAYER}mlp.router.weight": f"{block}block_sparse_moe.gate.weight",
    }
    parts = {part: f"{block}self_attn.{part}_proj.weight" for part in "qkv"}
    mappings = [QKVMapping(f"{LAYER}self_attention.linear_qkv.weight", **parts)]
    # One module per expert, and the grouped product's numbered weights.
    for linear in ("local_experts.*.linear_fc{}.weight", "linear_fc{}.weight*"):
        gated, down = (f"{LAYER}mlp.experts.{linear.format(number)}" for number in (1, 2))
        mappings.append(GatedMLPMapping(gated, gate=f"{expert}w1.weight", up=f"{expert}w3.weight"))
        mappings.append(AutoMapping(down, f"{expert}w2.weight"))
    return _registry(names, *mappings)
