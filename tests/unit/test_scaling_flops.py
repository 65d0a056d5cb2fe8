"""Counts of parameters and FLOPs: against Megatron's own, a built model and published ratios."""

from __future__ import annotations

import itertools
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_emo.scaling.counts.flops import (
    CONVENTIONS,
    OBJECTIVES,
    chinchilla_ratio,
    choose_loss_path,
    count_flops,
    count_loss_flops,
    flops_per_token,
)
from megatron_emo.scaling.counts.shape import ModelShape, chinchilla_parameters, count_parameters

TINY = ModelShape(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    padded_vocab_size=128,
    seq_length=24,
)
MOE = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 20, "add_bias_linear": False}
# The feed-forward size is 4 x hidden; seq 2048, vocabulary 32,000.
TABLE_A4 = {
    (640, 10, 10): (1.0250, 73_825_280, 929_877_196_800),
    (1024, 16, 20): (1.1008, 305_707_008, 4_135_248_199_680),
    (1280, 10, 24): (1.0829, 552_604_160, 7_353_453_772_800),
    (1792, 14, 26): (1.0441, 1_143_453_696, 14_670_316_437_504),
    (2048, 16, 28): (1.0329, 1_593_126_912, 20_220_437_594_112),
    (3584, 28, 40): (0.9941, 6_796_274_688, 83_021_046_743_040),
}


def chinchilla_shape(hidden, heads, layers):
    return ModelShape(layers, hidden, heads, 4 * hidden, 32000, 2048)


@pytest.mark.parametrize("size", TABLE_A4, ids=str)
def test_the_published_ratios_of_exact_flops_to_6nd(size):
    ratio, params, flops = TABLE_A4[size]
    shape = chinchilla_shape(*size)
    assert round(chinchilla_ratio(shape), 4) == ratio
    # The counts behind them, of one sequence, as published beside the ratios.
    assert chinchilla_parameters(shape) == params
    assert count_flops(shape, 2048, "full_attention") == flops


def megatron_args(shape):
    """The arguments that `num_floating_point_operations` and the memory formulas read."""
    freq = shape.moe_layer_freq
    return Namespace(
        **{name: getattr(shape, name) for name in vars(shape) if name != "moe_layer_freq"}
        | {"kv_channels": shape.head_channels, "mtp_num_layers": shape.mtp_num_layers or None},
        moe_layer_freq=list(freq) if isinstance(freq, tuple) else freq,
        group_query_attention=shape.num_query_groups is not None,
        multi_latent_attention=False,
        hybrid_layer_pattern=None,
        experimental_attention_variant=None,
        position_embedding_type="learned_absolute" if shape.learned_positions else "rope",
        max_position_embeddings=shape.learned_positions,
    )


def many_shapes():
    dense = [(2, 64, 4, 96), (12, 768, 12, 3072), (32, 4096, 32, 14336), (80, 8192, 64, 28672)]
    for layers, hidden, heads, ffn in dense:
        for swiglu, groups, vocab, seq in itertools.product(
            (True, False), (None, heads // 2, 1), (1024, 50304, 128256), (128, 8192)
        ):
            yield ModelShape(
                *(layers, hidden, heads, ffn, vocab, seq), num_query_groups=groups, swiglu=swiglu
            )
    wide = ModelShape(6, 512, 8, 2048, 32000, 1024, kv_channels=128)
    yield from (wide, replace(wide, attention_output_gate=True), replace(wide, mtp_num_layers=2))
    for swiglu, freq, shared, latent, mtp in itertools.product(
        (True, False), (1, 2, (0, 1, 1, 0, 1, 1)), (None, 640), (None, 256), (0, 1)
    ):
        yield replace(
            wide,
            num_experts=8,
            moe_router_topk=3,
            moe_ffn_hidden_size=None if shared is None else 384,
            moe_shared_expert_intermediate_size=shared,
            moe_layer_freq=freq,
            moe_latent_size=latent,
            swiglu=swiglu,
            mtp_num_layers=mtp,
        )


def test_flops_are_those_of_megatrons_own_function():
    pytest.importorskip("megatron.training")
    from megatron.training.training import num_floating_point_operations

    shapes = list(many_shapes())
    for shape, batch in itertools.product(shapes, (1, 480)):
        theirs = num_floating_point_operations(megatron_args(shape), batch)
        ours = count_flops(shape, batch * shape.seq_length)
        # Theirs is a float: equal but for its rounding above 2**53.
        assert abs(ours - theirs) <= 2 * 2**-53 * theirs, shape
    assert len(shapes) == 195


def test_the_shape_of_megatrons_arguments():
    for shape in many_shapes():
        assert count_flops(ModelShape.from_args(megatron_args(shape)), 4096) == count_flops(
            shape, 4096
        )
    args = megatron_args(replace(TINY, learned_positions=24, num_query_groups=2))
    assert ModelShape.from_args(args) == replace(
        TINY, learned_positions=24, num_query_groups=2, kv_channels=8
    )
    args.multi_latent_attention = True
    with pytest.raises(ValueError, match="--multi-latent-attention: expected False, got True"):
        ModelShape.from_args(args)


def test_flops_by_hand():
    # 2 layers, h = 8, f = 16, 2 heads in 1 group of 4 channels, V = 10, seq 4; 3 passes of 2.
    shape = ModelShape(2, 8, 2, 16, 10, 4, num_query_groups=1, swiglu=True)
    assert flops_per_token(shape) == {
        "attention": 6 * 2 * 8 * (8 + 4 + 4 + 8),
        "core_attention": 6 * 2 * 8 * 4,
        "mlp": 6 * 2 * 3 * 8 * 16,
        "experts": 0,
        "mtp": 0,
        "logits": 6 * 8 * 10,
    }
    # Summed over a sequence, token i sees i + 1 others: 6 L q s (s + 1) / 2 x 2, without the + 1.
    assert count_flops(shape, 4) == 4 * sum(flops_per_token(shape).values())
    params = count_parameters(shape)
    assert count_flops(shape, 7, "6nd") == 42 * params.total
    assert count_flops(shape, 7, "6nd_non_embedding") == 42 * params.non_embedding
    with pytest.raises(ValueError, match="convention: expected one of .*'megatron'.*, got '6n'"):
        count_flops(shape, 7, "6n")
    assert set(CONVENTIONS) == {"megatron", "full_attention", "6nd", "6nd_non_embedding"}


def test_the_loss_adds_its_products():
    shape = replace(TINY, hidden_size=32, padded_vocab_size=100)
    # 40 tokens of 12 distinct targets, a table of 24 columns.
    products = 2 * 12 * 24 * 100
    for path, times, again in (("logits", 1, 0), ("forward", 1, 0), ("recompute", 2, 1)):
        found = count_loss_flops(shape, 40, path, num_distinct=12, cost_dim=24)
        assert found.cost_products == times * products
        assert found.repeated_logits == again * 2 * 40 * 32 * 100
        # docs/design.md: 3 + r, or 4 + 2r, of N h V with r = U D / (N h); 3 are the model's own.
        r = 12 * 24 / (40 * 32)
        assert found.total / (2 * 40 * 32 * 100) == pytest.approx(again + times * r)
    assert count_loss_flops(shape, 40, "logits").total == 0
    with pytest.raises(ValueError, match="path: expected logits, recompute or forward, got 'auto'"):
        count_loss_flops(shape, 40, "auto")


def test_paths_and_objectives_are_the_packages():
    from megatron_emo.loss.fused_linear import auto_path
    from megatron_emo.objectives import OBJECTIVES as TRAINED

    assert {name: entry.uses_cost for name, entry in TRAINED.items()} == OBJECTIVES
    chosen = set()
    for sizes in itertools.product((1, 512, 8192), (0, 100), (1000, 50304, 128256), (64, 512)):
        chosen.add(choose_loss_path(*sizes))
        assert choose_loss_path(*sizes) == auto_path(*sizes[:3], 2, sizes[3])[0]
    assert chosen == {"logits", "recompute"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size 32"),
        ({"num_query_groups": 3}, "num_query_groups: expected a divisor of num_attention_heads 4"),
        ({"num_layers": 0}, "num_layers: expected 1 to 1,000,000,000, got 0"),
        ({"normalization": "Batch"}, "normalization: expected one of .*, got 'Batch'"),
        ({"hidden_size": 10**12}, "hidden_size: expected 1 to 1,000,000,000, got 10"),
        ({"num_experts": 2, "moe_router_topk": 3}, "moe_router_topk: expected at most num_experts"),
        ({"moe_layer_freq": 0}, "moe_layer_freq: expected at least 1, got 0"),
        ({"num_experts": 2, "moe_layer_freq": (1, 0)}, "moe_layer_freq: expected 4 layers, got 2"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


VARIANTS = {
    "gpt2": {"learned_positions": 24},
    "llama": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "num_query_groups": 2,
    },
    "qwen": {"add_bias_linear": False, "add_qkv_bias": True, "swiglu": True, "qk_layernorm": True},
    "wide heads, gated": {"kv_channels": 16, "num_query_groups": 1, "attention_output_gate": True},
    "experts": {**MOE, "swiglu": True},
    "experts with biases": {**MOE, "add_bias_linear": True},
    "shared expert": {
        **MOE,
        "moe_shared_expert_intermediate_size": 12,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": (0, 1, 0, 1),
    },
    "further tokens": {"mtp_num_layers": 2, "normalization": "RMSNorm"},
}


def build_gpt(shape):
    """Megatron's own GPTModel of a shape, on the CPU."""
    import torch
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    freq = shape.moe_layer_freq
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn_hidden_size,
        gated_linear_unit=shape.swiglu,
        activation_func=torch.nn.functional.silu if shape.swiglu else torch.nn.functional.gelu,
        normalization=shape.normalization,
        add_bias_linear=shape.add_bias_linear,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        attention_output_gate=shape.attention_output_gate,
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.moe_router_topk,
        moe_layer_freq=list(freq) if isinstance(freq, tuple) else freq,
        moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=shape.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=shape.moe_shared_expert_gate,
        moe_latent_size=shape.moe_latent_size,
        mtp_num_layers=shape.mtp_num_layers or None,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        cuda_graph_modules=[],
    )
    layers = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    mtp = None
    if shape.mtp_num_layers:
        mtp = specs.get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False)
    return GPTModel(
        config,
        layers,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.learned_positions or shape.seq_length,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        position_embedding_type="learned_absolute" if shape.learned_positions else "rope",
        mtp_block_spec=mtp,
    )


@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_parameters_are_those_of_megatrons_model(change):
    pytest.importorskip("megatron.training")
    from megatron_emo.conversion.megatron_model import one_process

    shape = replace(TINY, **change)
    counts = count_parameters(shape)
    with one_process():
        model = build_gpt(shape)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts.total == sum(sizes.values())
    assert counts.embedding == sum(n for name, n in sizes.items() if name.startswith("embedding."))
    assert counts.output == sum(n for name, n in sizes.items() if name.startswith("output_layer."))
    experts = sum(n for name, n in sizes.items() if ".local_experts." in name)
    if shape.num_experts:
        assert counts.idle_experts == experts * (1 - shape.moe_router_topk / shape.num_experts) > 0
    assert counts.active == counts.total - counts.idle_experts
