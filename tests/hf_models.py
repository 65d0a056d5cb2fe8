"""Tiny random Hugging Face models of the architectures that are converted, written to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 131
"""Prime, so that every padding shows."""
POSITIONS = 48

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": POSITIONS,
}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **_NO_IDS,
}
_OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "ffn_dim": 96,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    **_NO_IDS,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "llama-tied": ("llama", _SIZES | {"tie_word_embeddings": True}),
    "llama-biases": ("llama", _SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", _SIZES | {"head_dim": 24, "num_key_value_heads": 1}),
    "llama3-rope": ("llama", _SIZES | {"rope_parameters": _LLAMA3, "num_hidden_layers": 3}),
    "llama-linear-rope": (
        "llama",
        _SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", _SIZES | {"sliding_window": None}),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES | {"head_dim": 32, "rms_norm_eps": 1e-3}),
    "mixtral": ("mixtral", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": (
        "gpt2",
        _GPT2 | {"tie_word_embeddings": False, "n_inner": 80, "activation_function": "gelu"},
    ),
    "opt": ("opt", _OPT),
}


def save_model(name: str, folder: Path, **changes: Any) -> torch.nn.Module:
    """Write the model of CONFIGS[name], changed, into `folder` and return it.

    All parameters are random, norms and biases too: a missing one would show.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{**values, **_NO_IDS, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if "norm" in parameter_name or ".ln_" in parameter_name:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return model
