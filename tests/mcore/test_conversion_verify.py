"""The Megatron model in memory: checkpoints of any layout in and out, its logits against HF's."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

VOCAB_SIZE = 131
PADDED = 256
LLAMA = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "max_position_embeddings": 32,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": PADDED,
    # Of a run on GPUs at another layout; they change nothing of the model.
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
    "transformer_impl": "transformer_engine",
    "attention_backend": object(),
    "attention_softmax_in_fp32": True,
}
GPT = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "max_position_embeddings": 32,
    "padded_vocab_size": VOCAB_SIZE,
}


def test_verify_tells_equal_from_different(run_distributed, tmp_path):
    run_distributed(1)(check_verify, folder=str(tmp_path))


def test_rounding_of_one_side_alone_is_no_difference(run_distributed, tmp_path):
    run_distributed(1)(check_rounding, folder=str(tmp_path))


def test_the_process_is_left_as_it_was(run_distributed):
    run_distributed(1)(check_process_state)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_the_one_of_one(
    run_pretraining, run_distributed, from_checkpoint, initial_checkpoint, tmp_path
):
    flags = ["--lr", "0", "--min-lr", "0", "--train-iters", "1", "--eval-iters", "0"]
    for axis in ("tensor", "pipeline"):
        saved = ["--save", str(tmp_path / axis), "--save-interval", "1"]
        layout = [f"--{axis}-model-parallel-size", "2"]
        run_pretraining(2, *from_checkpoint, *flags, *saved, *layout)
    run_distributed(1)(
        check_same_weights,
        one=str(initial_checkpoint),
        others=[str(tmp_path / "tensor"), str(tmp_path / "pipeline")],
    )


@pytest.mark.slow
def test_a_run_starts_from_a_saved_model(
    run_pretraining, run_distributed, from_checkpoint, initial_checkpoint, tmp_path
):
    run_distributed(1)(check_save_again, source=str(initial_checkpoint), target=str(tmp_path / "m"))
    flags = ["--train-iters", "2", "--eval-iters", "0"]
    expected = run_pretraining(1, *from_checkpoint, *flags)["lm loss"]
    for load in (
        ["--load", str(tmp_path / "m"), "--finetune", "--no-load-rng", "--no-load-optim"],
        ["--pretrained-checkpoint", str(tmp_path / "m")],
    ):
        assert run_pretraining(1, *load, *flags)["lm loss"] == expected


def test_padding_comes_and_goes(run_distributed, tmp_path):
    run_distributed(1)(check_padding, folder=str(tmp_path))


def test_the_activation_is_the_runs_own(run_distributed):
    run_distributed(1)(check_activation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"untie_embeddings_and_output_weights": False},
            r"no parameters \['output_layer.weight'\]",
        ),
        ({"qk_layernorm": True}, r"no tensors \['decoder.*q_layernorm.weight'\]"),
        ({"num_layers": 3}, r"has the shape \(2, .*expected \(3, "),
        ({"hidden_size": 32}, r"has the shape .*64.*expected .*32.* from the arguments"),
    ],
)
def test_tensors_that_do_not_fit_are_named(run_distributed, tmp_path, changes, message):
    run_distributed(1)(check_load_error, folder=str(tmp_path), changes=changes, message=message)


def test_other_errors(run_distributed, tmp_path):
    run_distributed(1)(check_other_errors, folder=str(tmp_path))


def test_several_ranks_are_refused(run_distributed):
    run_distributed(2)(check_refused_ranks)


def arguments(base: dict = LLAMA, **changes) -> argparse.Namespace:
    return argparse.Namespace(**base | changes)


def random_model(args: argparse.Namespace, vocab_size: int):
    """Inside one_process(): a model whose norms and biases are random as well."""
    from megatron_emo.conversion import megatron_model

    model = megatron_model.build_model(args, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.ndim == 1))
    return model


def llama_of(model) -> torch.nn.Module:
    """transformers' model with the same weights, mapped here by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    weights = {
        "model.embed_tokens.weight": model.embedding.word_embeddings.weight,
        "model.norm.weight": model.decoder.final_layernorm.weight,
        "lm_head.weight": model.output_layer.weight,
    }
    for number, layer in enumerate(model.decoder.layers):
        at = f"model.layers.{number}."
        # Of each query group: two heads of queries, one of keys, one of values.
        grouped = layer.self_attention.linear_qkv.weight.view(2, 4, 16, 64)
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        weights |= {
            f"{at}input_layernorm.weight": layer.input_layernorm.weight,
            f"{at}self_attn.q_proj.weight": grouped[:, :2].reshape(64, 64),
            f"{at}self_attn.k_proj.weight": grouped[:, 2].reshape(32, 64),
            f"{at}self_attn.v_proj.weight": grouped[:, 3].reshape(32, 64),
            f"{at}self_attn.o_proj.weight": layer.self_attention.linear_proj.weight,
            f"{at}post_attention_layernorm.weight": layer.pre_mlp_layernorm.weight,
            f"{at}mlp.gate_proj.weight": gate,
            f"{at}mlp.up_proj.weight": up,
            f"{at}mlp.down_proj.weight": layer.mlp.linear_fc2.weight,
        }
    hf = LlamaForCausalLM(config)
    hf.load_state_dict(weights)
    return hf


def write_both(folder: str, dtype=torch.float32, hf_dtype=torch.float32):
    """Write a checkpoint and its HF folder; return their paths and the HF model."""
    from megatron_emo.conversion import megatron_model

    checkpoint, hf_dir = Path(folder, "checkpoint"), Path(folder, "hf")
    args = arguments(bf16=dtype == torch.bfloat16)
    with megatron_model.one_process():
        built = megatron_model.build_model(args, VOCAB_SIZE)
        assert {parameter.dtype for parameter in built.parameters()} == {dtype}
        model = random_model(arguments(), VOCAB_SIZE)
        megatron_model.save_checkpoint(model.to(dtype), checkpoint, args, iteration=3)
        # From the rounded weights where they are rounded, else from the full ones.
        hf = llama_of(model.float()).to(hf_dtype)
    hf.save_pretrained(hf_dir)
    return checkpoint, hf_dir, hf


def check_verify(folder: str) -> None:
    from megatron_emo.conversion.verify import verify

    checkpoint, hf_dir, hf = write_both(folder)
    for _ in range(2):
        result = verify(checkpoint, hf_dir)
        assert result.is_equal
        assert result.max_logit_difference <= 1e-5
        assert result.max_logit > 1
        assert result.num_tokens == 64
    assert verify(checkpoint, hf_dir, token_ids=[[5, 7, 9]], iteration=3).num_tokens == 3

    # The wrong order of rotary halves: the mistake that conversions make.
    weight = hf.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight.copy_(weight.view(2, 8, 2, 64).transpose(1, 2).reshape(32, 64))
    hf.save_pretrained(hf_dir)
    assert not verify(checkpoint, hf_dir).is_equal


def check_rounding(folder: str) -> None:
    from megatron_emo.conversion.verify import verify

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for ours, theirs in (("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "fp32")):
        place = f"{folder}/{ours}_{theirs}"
        checkpoint, hf_dir, hf = write_both(place, dtypes[ours], dtypes[theirs])
        if theirs == "fp32":
            # A folder in fp32 that an import rounded: within half a step of bf16.
            with torch.no_grad():
                for parameter in hf.parameters():
                    parameter.mul_(1 + 2.0**-10)
            hf.save_pretrained(hf_dir)
        result = verify(checkpoint, hf_dir)
        assert (result.megatron_dtype, result.hf_dtype) == (dtypes[ours], dtypes[theirs])
        assert result.is_equal, str(result)


def check_process_state() -> None:
    from megatron.core import parallel_state

    from megatron_emo.conversion import megatron_model

    assert not parallel_state.model_parallel_is_initialized()
    os.environ["NVTE_FLASH_ATTN"] = "0"  # as a run with another attention leaves it
    environment, random = dict(os.environ), torch.get_rng_state()
    for _ in range(2):
        with megatron_model.one_process(), megatron_model.one_process():
            random_model(arguments(), VOCAB_SIZE)
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.distributed.is_initialized()
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(os.environ) == environment
    del os.environ["NVTE_FLASH_ATTN"]


def check_same_weights(one: str, others: list[str]) -> None:
    from megatron_emo.conversion import megatron_model
    from megatron_emo.torch_dist import read_arguments, read_tensor, resolve_checkpoint_dir

    folder = resolve_checkpoint_dir(one)
    tokens = torch.arange(24)[None]
    with megatron_model.one_process():
        model = megatron_model.build_model(read_arguments(folder))
        megatron_model.load_checkpoint(model, one)
        expected = {name: value.clone() for name, value in model.named_parameters()}
        logits = megatron_model.model_logits(model, tokens)
        stacked = read_tensor(folder, "decoder.layers.mlp.linear_fc2.weight")
        for number, layer in enumerate(model.decoder.layers):
            assert torch.equal(layer.mlp.linear_fc2.weight, stacked[number])
        for other in others:
            args = read_arguments(resolve_checkpoint_dir(other))
            assert args.tensor_model_parallel_size * args.pipeline_model_parallel_size == 2
            model = megatron_model.build_model(args)
            megatron_model.load_checkpoint(model, other)
            for name, value in model.named_parameters():
                assert torch.equal(value, expected[name]), name
            assert torch.equal(megatron_model.model_logits(model, tokens), logits)


def check_save_again(source: str, target: str) -> None:
    from megatron_emo.conversion import megatron_model
    from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir

    args = read_arguments(resolve_checkpoint_dir(source))
    with megatron_model.one_process():
        model = megatron_model.build_model(args)
        megatron_model.load_checkpoint(model, source)
        megatron_model.save_checkpoint(model, target, args)


def check_padding(folder: str) -> None:
    from megatron_emo.conversion import megatron_model

    with megatron_model.one_process():
        model = random_model(arguments(), VOCAB_SIZE)
        path = megatron_model.save_checkpoint(model, f"{folder}/true", arguments())
        assert (path.parent / "latest_checkpointed_iteration.txt").read_text() == "release"
        padded = megatron_model.build_model(arguments())
        megatron_model.load_checkpoint(padded, f"{folder}/true")
        for rows in (padded.embedding.word_embeddings.weight, padded.output_layer.weight):
            assert rows.shape == (PADDED, 64)
            assert torch.count_nonzero(rows[VOCAB_SIZE:]) == 0
        megatron_model.save_checkpoint(padded, f"{folder}/padded", arguments())
        # Also into another dtype: bf16 in, fp32 out is exact.
        megatron_model.save_checkpoint(padded.bfloat16(), f"{folder}/bf16", arguments())
        for name in ("padded", "bf16"):
            again = megatron_model.build_model(arguments(), VOCAB_SIZE)
            megatron_model.load_checkpoint(again, f"{folder}/{name}")
            for (key, found), expected in zip(
                again.named_parameters(), model.parameters(), strict=True
            ):
                assert found.dtype == torch.float32
                expected = expected.bfloat16().float() if name == "bf16" else expected
                assert torch.equal(found, expected), (name, key)


def check_activation() -> None:
    from megatron_emo.conversion import megatron_model

    functional = torch.nn.functional
    x = torch.linspace(-3, 3, 50)
    tanh = functional.gelu(x, approximate="tanh")
    assert (tanh - functional.gelu(x)).abs().max() > 1e-4
    cases = (
        ({}, tanh),  # the fused kernel is the default
        ({"bias_gelu_fusion": False}, functional.gelu(x)),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, tanh),
        ({"add_bias_linear": False}, functional.gelu(x)),
        ({"disable_bias_linear": True}, functional.gelu(x)),
        ({"relu": True}, functional.relu(x)),
        ({"squared_relu": True, "bias_gelu_fusion": False}, functional.relu(x) ** 2),
    )
    with megatron_model.one_process():
        for changes, expected in cases:
            model = megatron_model.build_model(arguments(GPT, **changes))
            assert torch.equal(model.decoder.layers[0].mlp.activation_func(x), expected), changes


def check_load_error(folder: str, changes: dict, message: str) -> None:
    from megatron_emo.conversion import megatron_model

    with megatron_model.one_process():
        model = random_model(arguments(), VOCAB_SIZE)
        megatron_model.save_checkpoint(model, folder, arguments())
        other = megatron_model.build_model(arguments(**changes), VOCAB_SIZE)
        with pytest.raises(ValueError, match=message):
            megatron_model.load_checkpoint(other, folder)


def check_other_errors(folder: str) -> None:
    from megatron_emo.conversion import megatron_model
    from megatron_emo.conversion.verify import verify

    with megatron_model.one_process():
        with pytest.raises(ValueError, match="--mtp-num-layers 1: expected none"):
            megatron_model.build_model(arguments(mtp_num_layers=1))
        with pytest.raises(ValueError, match="--padded-vocab-size: not among the arguments"):
            megatron_model.build_model(arguments(padded_vocab_size=None))
        model = random_model(arguments(), VOCAB_SIZE)
        megatron_model.save_checkpoint(model, folder, None, iteration=5)
        with pytest.raises(FileExistsError, match="iter_0000005: expected an empty or no folder"):
            megatron_model.save_checkpoint(model, folder, None, iteration=5)
    with pytest.raises(ValueError, match="expected Megatron's arguments in it, found none"):
        verify(folder, folder)
    with pytest.raises(FileNotFoundError):
        verify(f"{folder}/nowhere", folder)


def check_refused_ranks() -> None:
    from megatron_emo.conversion import megatron_model

    with pytest.raises(RuntimeError, match="WORLD_SIZE 2: expected 1"):
        with megatron_model.one_process():
            pass
