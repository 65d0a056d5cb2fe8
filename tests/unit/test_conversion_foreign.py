"""Checkpoints of other people's Megatron-LM, built by hand: their names, arguments and pickles.

Nothing of ours writes them: Megatron's tensors are put together here, head by head, and saved by
torch.distributed.checkpoint.
"""

from __future__ import annotations

import argparse
import enum
import functools
import pickle
import random
import shutil
import signal
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_models import POSITIONS, VOCAB_SIZE, save_model
from safetensors.torch import load_file
from torch.distributed.checkpoint import DefaultSavePlanner

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import ExportOptions, export_hf

Tensors = dict[str, torch.Tensor]
LAYERS, HEADS, SIZE, HIDDEN, EXPERTS, PADDED = 2, 4, 16, 64, 4, 192
KNOWN = ExportOptions(vocab_size=VOCAB_SIZE)

# What Megatron 0.5 saved, in early 2024: no rotary_base, and the older name of the epsilon.
OLD = {
    "num_layers": LAYERS,
    "encoder_num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 96,
    "num_attention_heads": HEADS,
    "kv_channels": SIZE,
    "group_query_attention": False,
    "num_query_groups": 1,
    "seq_length": POSITIONS,
    "max_position_embeddings": POSITIONS,
    "padded_vocab_size": PADDED,
    "make_vocab_size_divisible_by": 64,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "params_dtype": torch.float32,
    "untie_embeddings_and_output_weights": True,
    "transformer_impl": "transformer_engine",
    "tokenizer_type": "Llama2Tokenizer",
    "tokenizer_model": "/elsewhere/tokenizer.model",
    "tensor_model_parallel_size": 8,
    "pipeline_model_parallel_size": 4,
    "data_path": [0.3, "/elsewhere/part_1", 0.7, "/elsewhere/part_2"],
    "use_mcore_models": True,
    "iteration": 10,
}
LLAMA = OLD | {
    "norm_epsilon": 1e-6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": True,
    "add_bias_linear": False,
}
ARGUMENTS = {
    "llama": LLAMA,
    # What later versions added, of which nothing here is known.
    "llama-newer": LLAMA
    | {
        "layernorm_epsilon": 1e-6,
        "rotary_base": 10000,
        "num_layers_per_stage_v2": [1, 1],
        "fine_grained_callables": {"mlp": {"overlap": True}},
        "vocab_size": None,
    },
    "mixtral": LLAMA
    | {
        "norm_epsilon": 1e-5,
        "num_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_grouped_gemm": True,
    },
    "gpt2": OLD
    | {
        "layernorm_epsilon": 1e-5,
        "ffn_hidden_size": None,
        "kv_channels": None,
        "untie_embeddings_and_output_weights": False,
        "tokenizer_type": "GPT2BPETokenizer",
        "tokenizer_model": None,
        "vocab_file": "/elsewhere/vocab.json",
        "merge_file": "/elsewhere/merges.txt",
    },
}
MODEL_OF = {"llama-newer": "llama"}


def padded(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table, torch.randn(PADDED - len(table), table.shape[1])])


def by_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The rows of a group's heads, then its key's, then its value's, group after group."""
    groups = len(key) // SIZE
    width = len(query) // groups
    rows: list[torch.Tensor] = []
    for group in range(groups):
        rows += query[group * width : (group + 1) * width]
        rows += key[group * SIZE : (group + 1) * SIZE]
        rows += value[group * SIZE : (group + 1) * SIZE]
    return torch.stack(rows)


def llama_layer(weights: Tensors, layer: int, num_experts: int) -> dict[str, torch.Tensor]:
    def of(name: str) -> torch.Tensor:
        return weights[f"model.layers.{layer}.{name}.weight"]

    attention = "self_attn."
    found = {
        "self_attention.linear_qkv.layer_norm_weight": of("input_layernorm"),
        "self_attention.linear_qkv.weight": by_groups(
            *(of(f"{attention}{name}_proj") for name in "qkv")
        ),
        "self_attention.linear_proj.weight": of("self_attn.o_proj"),
    }
    if not num_experts:
        found["mlp.linear_fc1.layer_norm_weight"] = of("post_attention_layernorm")
        gate_up = [of("mlp.gate_proj"), of("mlp.up_proj")]
        found["mlp.linear_fc1.weight"] = torch.cat(gate_up)
        return found | {"mlp.linear_fc2.weight": of("mlp.down_proj")}
    moe = "block_sparse_moe"
    experts = [f"{moe}.experts.{expert}." for expert in range(num_experts)]
    gate_up = [torch.cat([of(name + "w1"), of(name + "w3")]) for name in experts]
    return found | {
        "pre_mlp_layernorm.weight": of("post_attention_layernorm"),
        "mlp.router.weight": of(f"{moe}.gate"),
        "mlp.experts.experts.linear_fc1.weight": torch.stack(gate_up),
        "mlp.experts.experts.linear_fc2.weight": torch.stack([of(n + "w2") for n in experts]),
    }


def gpt2_layer(weights: Tensors, layer: int) -> dict[str, torch.Tensor]:
    found = {}
    for kind in ("weight", "bias"):

        def of(name: str, kind: str = kind) -> torch.Tensor:
            tensor = weights[f"transformer.h.{layer}.{name}.{kind}"]
            return tensor.t().contiguous() if tensor.dim() == 2 else tensor

        found |= {
            f"self_attention.linear_qkv.layer_norm_{kind}": of("ln_1"),
            f"self_attention.linear_qkv.{kind}": by_groups(*of("attn.c_attn").chunk(3)),
            f"self_attention.linear_proj.{kind}": of("attn.c_proj"),
            f"mlp.linear_fc1.layer_norm_{kind}": of("ln_2"),
            f"mlp.linear_fc1.{kind}": of("mlp.c_fc"),
            f"mlp.linear_fc2.{kind}": of("mlp.c_proj"),
        }
    return found


def megatron_tensors(name: str, weights: Tensors) -> tuple[Tensors, list[Tensors]]:
    """(what is outside the layers, the tensors of each layer), as Transformer Engine names them."""
    if name == "gpt2":
        outside = {
            "embedding.word_embeddings.weight": padded(weights["transformer.wte.weight"]),
            "embedding.position_embeddings.weight": weights["transformer.wpe.weight"],
            "decoder.final_layernorm.weight": weights["transformer.ln_f.weight"],
            "decoder.final_layernorm.bias": weights["transformer.ln_f.bias"],
        }
        return outside, [gpt2_layer(weights, layer) for layer in range(LAYERS)]
    outside = {
        "embedding.word_embeddings.weight": padded(weights["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": padded(weights["lm_head.weight"]),
    }
    experts = EXPERTS if name == "mixtral" else 0
    return outside, [llama_layer(weights, layer, experts) for layer in range(LAYERS)]


def stacked(layers: list[Tensors]) -> Tensors:
    names = layers[0]
    return {f"decoder.layers.{n}": torch.stack([layer[n] for layer in layers]) for n in names}


def one_by_one(layers: list[Tensors]) -> Tensors:
    """As checkpoints of layers that are not all alike."""
    return {
        f"decoder.layers.{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.items()
    }


def singletons(layers: list[Tensors]) -> Tensors:
    """As with singleton_local_shards: layers, experts and the halves of gated layers apart."""
    found: Tensors = {}
    for key, tensor in one_by_one(layers).items():
        parts = {key: tensor}
        if ".experts.experts." in key:
            names = [
                key.replace("experts.experts.", f"experts.experts.{i}.") for i in range(EXPERTS)
            ]
            parts = dict(zip(names, tensor, strict=True))
        for name, part in parts.items():
            is_gated = name.endswith("linear_fc1.weight") and len(part) == 2 * 96
            halves = part.chunk(2) if is_gated else [part]
            ends = ["_w", "_v"] if is_gated else [""]
            found |= {name + end: half.clone() for end, half in zip(ends, halves, strict=True)}
    return found


@pytest.fixture
def foreign(tmp_path) -> Callable[..., Path]:
    """Return make(name, layout, write_common=, **tensors) -> folder of one iteration."""

    def make(
        name: str,
        layout: Callable[[list[Tensors]], Tensors] = stacked,
        write_common: Callable[..., dict] | None = None,
        **more: torch.Tensor,
    ) -> Path:
        model = MODEL_OF.get(name, name)
        save_model(model, tmp_path / "hf")
        outside, layers = megatron_tensors(model, load_file(tmp_path / "hf" / "model.safetensors"))
        folder = tmp_path / "iter_0000010"
        args = argparse.Namespace(**ARGUMENTS[name])
        state: dict = outside | layout(layers) | more
        state["decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"] = [b"scales"]
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 10}
        folder.mkdir()
        if write_common is None:
            torch.save(common, folder / "common.pt")
        else:
            state |= write_common(folder, common)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
        return folder

    return make


def quiet(line: str) -> None:
    pass


def check_same(folder: Path, options: ExportOptions = KNOWN) -> None:
    output = folder.parent / "out"
    export_hf(folder, output, options, say=quiet)
    before, after = (load_file(folder.parent / n / "model.safetensors") for n in ("hf", "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("layout", [stacked, one_by_one, singletons])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_weights_come_out_bit_by_bit(foreign, name, layout):
    check_same(foreign(name, layout))


def test_the_exported_folder_is_the_model(foreign, tmp_path):
    from transformers import AutoModelForCausalLM

    check_same(foreign("llama"))
    tokens = torch.arange(40)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "out")]
    with torch.no_grad():
        first, second = (model(tokens).logits for model in models)
    assert torch.equal(first, second)


def in_common_state(folder: Path, common: dict) -> dict:
    """Where megatron-core keeps it from 0.19 on."""
    return {"common_state/shard_0_1": [common]}


class Run:
    """Writes a file when it is unpickled in earnest."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self):
        return shutil.copyfile, (__file__, self.file)


def with_objects(folder: Path, common: dict, made: Path) -> None:
    """What such pickles hold beside numbers, some of classes that are nowhere to be found."""
    module = types.ModuleType("megatron_of_another_day")
    backend = enum.Enum("AttnBackend", {"flash": 1, "fused": 2}, module=module.__name__)
    config = type("Config", (), {"__module__": module.__name__})
    module.AttnBackend, module.Config = backend, config
    sys.modules[module.__name__] = module
    vars(common["args"]).update(
        attention_backend=backend.fused,
        exit_signal=signal.SIGTERM,
        model_config=config(),
        loss=functools.partial(max, 3),
        save_path=folder,
        hook=Run(made),
    )
    common["rng_state"] = [
        {
            "random": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
    ]
    common["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": np.int64(7)}


@pytest.fixture(params=["nothing registered", "as Megatron registers"])
def registered(request):
    """Classes that torch.load takes in the whole process; numpy's of an array, not of its dtype."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    if request.param != "nothing registered":
        classes = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, signal.Signals]
        torch.serialization.add_safe_globals(classes)
    yield (now := torch.serialization.get_safe_globals())
    # More are there where a module that declares some was imported meanwhile.
    assert set(now) <= set(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("place", ["common.pt", "common_state"])
def test_pickled_objects_are_passed_over_and_no_code_runs(foreign, tmp_path, place, registered):
    made = tmp_path / "made"

    def write(folder: Path, common: dict) -> dict:
        with_objects(folder, common, made)
        if place == "common_state":
            return in_common_state(folder, common)
        torch.save(common, folder / "common.pt")
        return {}

    try:
        folder = foreign("llama", write_common=write)
    finally:
        sys.modules.pop("megatron_of_another_day", None)
    check_same(folder)
    assert not made.exists()
    pickle.loads(pickle.dumps(Run(made)))
    assert made.exists()


def test_an_unknown_vocabulary_is_asked_for_by_name(foreign, tmp_path):
    folder = foreign("llama-newer")
    message = "padded.*give --vocab-size, --tokenizer-model or --hf-config"
    with pytest.raises(ConversionError, match=message):
        export_hf(folder, tmp_path / "out", say=quiet)
    with pytest.raises(
        ConversionError, match=r"has shape \[192, 64\], expected \[193, 64\] or mor"
    ):
        export_hf(folder, tmp_path / "out", ExportOptions(vocab_size=PADDED + 1), say=quiet)
    assert not (tmp_path / "out").exists()


def test_the_vocabulary_is_that_of_the_tokenizer_given(foreign, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(
        tmp_path / "tokenizer"
    )
    check_same(foreign("llama-newer"), ExportOptions(tokenizer=str(tmp_path / "tokenizer")))


def test_the_optimizer_beside_is_passed_over(foreign):
    more = {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.ones(3),
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(a, b).bucket_idx_0.param": (
            torch.ones(5)
        ),
    }
    check_same(foreign("llama", **more))


def test_pickled_arguments_that_are_no_arguments_are_refused(foreign, tmp_path):
    def write(folder: Path, common: dict) -> dict:
        torch.save({"args": {"num_layers": 2}}, folder / "common.pt")
        return {}

    folder = foreign("llama", write_common=write)
    with pytest.raises(ConversionError, match="iter_0000010: expected Megatron's arguments"):
        export_hf(folder, tmp_path / "out", KNOWN, say=quiet)


def test_more_layers_than_the_arguments_say_are_named(foreign, tmp_path):
    extra = {"decoder.layers.2.mlp.linear_fc2.weight": torch.ones(HIDDEN, 96)}
    for layout, more, message in (
        (
            one_by_one,
            extra,
            r"1 tensors have no place in llama.*layers\.2\.mlp\.linear_fc2\.weight",
        ),
        (
            lambda layers: stacked([*layers, layers[0]]),
            {},
            "it has 3 layers, the arguments say 2",
        ),
    ):
        folder = foreign("llama", layout, **more)
        with pytest.raises(ConversionError, match=message):
            export_hf(folder, tmp_path / "out", KNOWN, say=quiet)
        folder.rename(tmp_path / f"seen_{layout.__name__}")
