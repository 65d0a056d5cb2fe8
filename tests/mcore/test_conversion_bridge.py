"""Megatron-Bridge's mappings on our own GPTModel: weights there and back, logits against HF's."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from distributed_pool import DistributedPool
from hf_models import save_model
from safetensors.torch import load_file, save_file

from megatron_emo.conversion import bridge

pytestmark = pytest.mark.skipif(
    not bridge.is_available(), reason=f"megatron-bridge is absent: {bridge.INSTALL_COMMAND}"
)

VOCAB_SIZE = 131
LENGTH = 24
SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "layernorm_epsilon": 1e-6,
    "params_dtype": torch.float32,
}
GATED = {
    **SIZES,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
}
TIED = {"untie_embeddings_and_output_weights": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Name -> transformers' class, what its config adds to the sizes, Megatron's arguments.
MODELS: dict[str, tuple[str, dict, dict]] = {
    "llama": ("LlamaForCausalLM", {}, GATED),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, {**GATED, **TIED}),
    "llama3": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3},
        {
            **GATED,
            "rotary_base": 500000,
            "use_rope_scaling": True,
            "rope_scaling_factor": 32.0,
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}, GATED),
    "qwen2": ("Qwen2ForCausalLM", {}, {**GATED, "add_qkv_bias": True}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"head_dim": 24},
        {**GATED, "kv_channels": 24, "qk_layernorm": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "rope_theta": 10000.0},
        {
            **GATED,
            "num_experts": 4,
            "moe_ffn_hidden_size": 96,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {}, {**SIZES, "bias_gelu_fusion": True}),
    "opt": ("OPTForCausalLM", {}, {**SIZES, "relu": True}),
}

# Of hf_models.CONFIGS, one of each that Bridge knows or is taught here.
ARCHITECTURES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "mixtral")

# What is done to a folder, and what the error says.
ERRORS = {
    "missing key": r"no tensors \['model.layers.1.mlp.up_proj.weight'\]",
    "fewer layers": r"no tensors \['model.layers.1.input_layernorm.weight'",
    "extra layer": r"no parameter of the model takes \['model.layers.2.input_layernorm.weight'",
    "wrong vocabulary": r"give \(131, 64\) for .*, expected \(256, 64\)",
    "two output layers": r"lm_head.weight and model.embed_tokens.weight differ",
    "unknown architecture": r"architectures \['BloomForCausalLM'\]: expected one of .*Llama",
    "no safetensors": r"expected \*.safetensors in it, found none",
    "custom code": r"auto_map .* custom code is not run",
}


@pytest.fixture(scope="module")
def run_with_bridge() -> Iterator[Callable]:
    """A rank of its own: Bridge's import takes ten seconds and registers much."""
    pool = DistributedPool(1)
    yield pool.run
    pool.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("llama", "gpt2") else pytest.mark.slow) for n in MODELS],
)
def test_weights_and_logits_survive(run_with_bridge, tmp_path, name):
    run_with_bridge(check_weights_and_logits, name=name, folder=str(tmp_path))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_routes_store_and_export_the_same(run_with_bridge, tmp_path, name):
    run_with_bridge(check_routes, name=name, folder=str(tmp_path))


@pytest.mark.parametrize("change", ERRORS)
def test_what_does_not_fit_is_named(run_with_bridge, tmp_path, change):
    run_with_bridge(check_error, folder=str(tmp_path), change=change)


def test_names_without_the_head_and_other_dtypes(run_with_bridge, tmp_path):
    run_with_bridge(check_variants, folder=str(tmp_path))


def hf_model(name: str):
    """A random HF model in fp32: also norms, biases and the position table differ from 0 and 1."""
    import transformers

    class_name, extra, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "ffn_dim": 96,
        "n_inner": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-6,
        "layer_norm_epsilon": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **extra,
    }
    if name in ("gpt2", "opt"):
        values["tie_word_embeddings"] = True
    else:
        values.setdefault("tie_word_embeddings", False)
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if name == "opt":
            # No token reads these rows; Megatron's table has no place for them.
            model.model.decoder.embed_positions.weight[:2] = 0
            for norm in model.modules():
                if isinstance(norm, torch.nn.LayerNorm):
                    norm.eps = 1e-6
    return model


def check_weights_and_logits(name: str, folder: str) -> None:
    from megatron_emo.conversion import megatron_model

    model = hf_model(name)
    model.save_pretrained(folder)
    stored = load_file(Path(folder, "model.safetensors"))
    args = argparse.Namespace(**MODELS[name][2])
    tokens = torch.randint(VOCAB_SIZE, (2, LENGTH))
    with torch.no_grad():
        expected = model(tokens).logits
    with megatron_model.one_process():
        built = megatron_model.build_model(args, VOCAB_SIZE)
        bridge.hf_to_model(folder, built)
        found = megatron_model.model_logits(built, tokens)
        exported = dict(bridge.model_to_hf(built, model.config))
        inv_freq = getattr(getattr(built, "rotary_pos_emb", None), "inv_freq", None)
    assert exported.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(exported[key], tensor), key
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= 1e-5
    if inv_freq is not None:
        torch.testing.assert_close(inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def check_routes(name: str, folder: str) -> None:
    """Plain against Bridge: the stored tensors, and the folders that either exports of either."""
    from megatron_emo.conversion.export_hf import ExportOptions, export_hf
    from megatron_emo.conversion.import_hf import ImportOptions, import_hf
    from megatron_emo.torch_dist import TensorReader

    root = Path(folder)
    save_model(name, root / "hf")
    stored, exported = {}, {}
    for engine in ("plain", "bridge"):
        import_hf(root / "hf", root / engine, ImportOptions(engine=engine), say=len)
        reader = TensorReader(root / engine / "release")
        stored[engine] = {key: reader.read(key) for key in reader.shapes}
    same_tensors(stored["plain"], stored["bridge"])
    for checkpoint in ("plain", "bridge"):
        for engine in ("plain", "bridge"):
            output = root / f"{checkpoint}_by_{engine}"
            export_hf(root / checkpoint, output, ExportOptions(engine=engine), say=len)
            exported[checkpoint, engine] = load_file(output / "model.safetensors")
    for tensors in exported.values():
        same_tensors(load_file(root / "hf" / "model.safetensors"), tensors)


def same_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def check_variants(folder: str) -> None:
    """GPT-2's own files have no prefix, and its causal mask in each layer."""
    from megatron_emo.conversion import megatron_model

    model = hf_model("gpt2")
    model.save_pretrained(folder)
    path = Path(folder, "model.safetensors")
    stored = load_file(path)
    bare = {key.removeprefix("transformer."): value for key, value in stored.items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(bare, path, metadata={"format": "pt"})
    with megatron_model.one_process():
        args = argparse.Namespace(**MODELS["gpt2"][2])
        built = megatron_model.build_model(args, VOCAB_SIZE)
        bridge.hf_to_model(folder, built)
        exported = dict(bridge.model_to_hf(built, model.config, torch.bfloat16))
    assert exported.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(exported[key], tensor.bfloat16()), key


def check_error(folder: str, change: str) -> None:
    from megatron_emo.conversion import megatron_model

    hf_model("llama").save_pretrained(folder)
    path, config_path = Path(folder, "model.safetensors"), Path(folder, "config.json")
    tensors, config = load_file(path), json.loads(config_path.read_text())
    args = argparse.Namespace(**GATED)
    vocab_size = VOCAB_SIZE
    if change == "missing key":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif change == "extra layer":
        for key in [key for key in tensors if ".layers.1." in key]:
            tensors[key.replace(".1.", ".2.")] = tensors[key].clone()
    elif change == "fewer layers":
        tensors = {key: value for key, value in tensors.items() if ".layers.1." not in key}
    elif change == "wrong vocabulary":
        vocab_size = 256
    elif change == "two output layers":
        config["tie_word_embeddings"] = True
        args = argparse.Namespace(**GATED | TIED)
    elif change == "unknown architecture":
        config.update(architectures=["BloomForCausalLM"])
    elif change == "custom code":
        config.update(auto_map={"AutoModelForCausalLM": "modeling.Model"})
    save_file(tensors, path, metadata={"format": "pt"})
    config_path.write_text(json.dumps(config))
    if change == "no safetensors":
        path.rename(path.with_name("pytorch_model.bin"))
    with megatron_model.one_process():
        built = megatron_model.build_model(args, vocab_size)
        with pytest.raises(ValueError, match=ERRORS[change]):
            bridge.hf_to_model(folder, built)
    shutil.rmtree(folder)
