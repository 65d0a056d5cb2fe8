"""Import, then export: the same weights bit by bit, and a folder that transformers loads."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_models import CONFIGS, POSITIONS, VOCAB_SIZE, save_model
from safetensors.torch import load_file

from megatron_emo.conversion.export_hf import ExportOptions, export_hf
from megatron_emo.conversion.import_hf import ImportOptions, import_hf
from megatron_emo.conversion.mapping import pad_vocabulary
from megatron_emo.torch_dist import read_arguments


def quiet(line: str) -> None:
    pass


def load_folder(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_logits_come_back(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = save_model(name, tmp_path / "hf")
    shards = {"max_shard_size": "60KB"}
    imported = import_hf(tmp_path / "hf", tmp_path / "mg", ImportOptions(**shards), say=quiet)
    exported = export_hf(tmp_path / "mg", tmp_path / "out", ExportOptions(**shards), say=quiet)
    assert imported.differing == exported.differing == ()

    before, after = load_folder(tmp_path / "hf"), load_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    assert imported.num_tensors == len(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    tokens = torch.randint(VOCAB_SIZE, (2, POSITIONS))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert type(again) is type(model)


def test_plain_torch_reads_megatrons_layout(tmp_path):
    """The written tensors by torch's own reader, against loops over heads and layers."""
    model = save_model("llama", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "mg", ImportOptions(max_shard_size="60KB"), say=quiet)
    weights = model.state_dict()
    layers, heads, groups, size = 2, 4, 2, 16
    state = {
        "decoder.layers.self_attention.linear_qkv.weight": torch.empty(layers, 128, 64),
        "decoder.layers.mlp.linear_fc1.weight": torch.empty(layers, 192, 64),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": torch.empty(layers, 64),
        "embedding.word_embeddings.weight": torch.empty(256, 64),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.FileSystemReader(tmp_path / "mg" / "release")
        dcp.load(state, storage_reader=reader, no_dist=True)
    for layer in range(layers):
        attention = f"model.layers.{layer}.self_attn."
        rows = []
        for group in range(groups):
            per_group = heads // groups
            for head in range(group * per_group, (group + 1) * per_group):
                rows += list(weights[attention + "q_proj.weight"][head * size : (head + 1) * size])
            rows += list(weights[attention + "k_proj.weight"][group * size : (group + 1) * size])
            rows += list(weights[attention + "v_proj.weight"][group * size : (group + 1) * size])
        qkv = state["decoder.layers.self_attention.linear_qkv.weight"][layer]
        assert torch.equal(qkv, torch.stack(rows))
        fc1 = state["decoder.layers.mlp.linear_fc1.weight"][layer]
        assert torch.equal(fc1[:96], weights[f"model.layers.{layer}.mlp.gate_proj.weight"])
        assert torch.equal(fc1[96:], weights[f"model.layers.{layer}.mlp.up_proj.weight"])
        norm = state["decoder.layers.self_attention.linear_qkv.layer_norm_weight"][layer]
        assert torch.equal(norm, weights[f"model.layers.{layer}.input_layernorm.weight"])
    embedding = state["embedding.word_embeddings.weight"]
    assert torch.equal(embedding[:VOCAB_SIZE], weights["model.embed_tokens.weight"])
    mean = weights["model.embed_tokens.weight"].mean(0)
    torch.testing.assert_close(embedding[VOCAB_SIZE:], mean.expand(256 - VOCAB_SIZE, -1))


def test_arguments_say_what_the_model_is(tmp_path):
    save_model("llama3-rope", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "mg", say=quiet)
    args = read_arguments(tmp_path / "mg" / "release")
    assert (args.num_layers, args.num_query_groups, args.group_query_attention) == (3, 2, True)
    assert (args.use_rope_scaling, args.rope_scaling_factor) == (True, 32.0)
    assert (args.vocab_size, args.padded_vocab_size) == (VOCAB_SIZE, 256)
    assert args.layernorm_epsilon == 1e-6
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_padding_is_the_mean_row():
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    padded = pad_vocabulary(table, 7)
    assert torch.equal(padded[:5], table)
    assert torch.equal(padded[5], padded[6])
    torch.testing.assert_close(padded[5].double(), table.double().mean(0), rtol=0.01, atol=0.01)
    assert pad_vocabulary(table, 5) is table


def test_vocabulary_is_padded_for_the_ranks_asked_for(tmp_path):
    save_model("llama-tied", tmp_path / "hf")
    options = ImportOptions(make_vocab_size_divisible_by=10, tensor_model_parallel_size=3)
    import_hf(tmp_path / "hf", tmp_path / "mg", options, say=quiet)
    assert read_arguments(tmp_path / "mg" / "release").padded_vocab_size == 150
    export_hf(tmp_path / "mg", tmp_path / "out", say=quiet)
    assert len(load_folder(tmp_path / "out")["model.embed_tokens.weight"]) == VOCAB_SIZE


def test_dtype_rounds_once(tmp_path):
    save_model("gpt2", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "mg", ImportOptions(dtype=torch.bfloat16), say=quiet)
    assert read_arguments(tmp_path / "mg" / "release").params_dtype == torch.bfloat16
    export_hf(tmp_path / "mg", tmp_path / "out", ExportOptions(dtype=torch.float16), say=quiet)
    before, after = load_folder(tmp_path / "hf"), load_folder(tmp_path / "out")
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor.bfloat16().half()), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_smaller_context_avoids_the_sliding_window(tmp_path):
    save_model("mistral", tmp_path / "hf", sliding_window=16)
    options = ImportOptions(max_position_embeddings=16)
    import_hf(tmp_path / "hf", tmp_path / "mg", options, say=quiet)
    export_hf(tmp_path / "mg", tmp_path / "out", say=quiet)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["sliding_window"]) == (16, None)


def test_transformer_engine_names_the_norm_before_experts(tmp_path):
    from megatron_emo.torch_dist import tensor_shapes

    save_model("mixtral", tmp_path / "hf")
    for impl, key in (
        ("local", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
        ("transformer_engine", "decoder.layers.pre_mlp_layernorm.weight"),
    ):
        options = ImportOptions(transformer_impl=impl)
        import_hf(tmp_path / "hf", tmp_path / impl, options, say=quiet)
        assert tensor_shapes(tmp_path / impl / "release")[key] == (2, 64)
        export_hf(tmp_path / impl, tmp_path / f"out_{impl}", say=quiet)
    ours, theirs = load_folder(tmp_path / "out_local"), load_folder(tmp_path / "hf")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_of_the_body_alone_and_old_buffers_are_read(tmp_path):
    """As gpt2 on the hub: no prefix, no head, masks among the weights."""
    from safetensors.torch import save_file

    save_model("gpt2", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(weights, file)
    assert import_hf(tmp_path / "hf", tmp_path / "mg", say=quiet).differing == ()
