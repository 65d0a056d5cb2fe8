"""Keys and shapes of a checkpoint against the model's; flags that would hide damage."""

from __future__ import annotations

import argparse

import pytest

from megatron_emo.checkpoints import check_vocabulary, compare_keys
from megatron_emo.launch.exit_codes import ConfigError, ExitCode
from megatron_emo.training.checkpointing import prepare

MODEL = {
    "embedding.word_embeddings.weight": (128, 32),
    "decoder.layers.mlp.linear_fc1.weight": (4, 96, 32),
    "decoder.final_layernorm.weight": (32,),
}
OPTIMIZER = {f"optimizer.state.exp_avg.{name}": shape for name, shape in MODEL.items()}
OTHERS = {"rng_state": None, "rerun_state_machine_state": None, "common_state": None}


def test_the_same_keys_are_no_problem_whatever_else_is_stored():
    assert compare_keys(MODEL | OPTIMIZER, MODEL | OPTIMIZER | OTHERS) == []
    assert compare_keys(MODEL | OPTIMIZER | {"rng_state": None}, MODEL | OPTIMIZER) == []


def test_the_optimizers_are_not_missed_where_none_is_loaded():
    assert compare_keys(MODEL, MODEL | OPTIMIZER | OTHERS) == []
    left = {"optimizer.state.exp_avg.other": (5,)}
    (problem,) = compare_keys(MODEL | OPTIMIZER, MODEL | OPTIMIZER | left)
    assert problem == (
        "in the checkpoint, and of no part of this model: optimizer.state.exp_avg.other [5]"
    )


def test_a_renamed_key_is_named_twice():
    name = "decoder.final_layernorm.weight"
    stored = {x.replace("layernorm", "layer_norm"): shape for x, shape in MODEL.items()}
    assert compare_keys(MODEL, stored) == [
        f"not in the checkpoint: {name} [32] (renamed from decoder.final_layer_norm.weight?)",
        "in the checkpoint, and of no part of this model: decoder.final_layer_norm.weight [32]",
    ]


def test_missing_and_left_over_keys_are_named_up_to_a_number():
    many = {f"decoder.extra.{number:02d}": (1,) for number in range(30)}
    (missing,) = compare_keys(MODEL | many, MODEL)
    assert "decoder.extra.00 [1], " in missing and missing.endswith("and 20 more")
    (left,) = compare_keys(MODEL, MODEL | many)
    assert "decoder.extra.09 [1], and 20 more" in left


def test_shapes_are_compared_where_both_have_one():
    name = "decoder.final_layernorm.weight"
    assert compare_keys(MODEL, MODEL | {name: (48,)}) == [
        f"{name} is [48] in the checkpoint, [32] in the model"
    ]
    assert compare_keys(MODEL | {name: None}, MODEL) == []


def test_scales_of_fp8_may_be_left_but_not_missing():
    extra = {"decoder.layers.mlp.linear_fc1._extra_state": None}
    assert compare_keys(MODEL, MODEL | extra) == []
    assert compare_keys(MODEL | extra, MODEL) == [
        "not in the checkpoint: decoder.layers.mlp.linear_fc1._extra_state"
    ]


@pytest.mark.parametrize(
    ("rows", "vocab_size", "multiple", "fits"),
    [
        (128, 123, 16, True),  # padded by another layout
        (123, 123, 1, True),
        (144, 123, 16, False),  # could not have been padded so far
        (112, 123, 16, False),  # tokens without a row
        (112, 123, None, False),
        (4096, 123, None, True),  # nothing is known of its layout
    ],
)
def test_rows_must_be_of_this_vocabulary(rows, vocab_size, multiple, fits):
    problem = check_vocabulary("embedding.weight", rows, vocab_size, multiple)
    assert (problem is None) == fits
    if not fits:
        assert f"embedding.weight has {rows} rows in the checkpoint, expected 123" in problem


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ckpt_format": "torch"}, "--ckpt-format torch: expected torch_dist"),
        (
            {"ckpt_assume_constant_structure": True, "async_save": True},
            "--ckpt-assume-constant-structure with --async-save",
        ),
        ({"dist_ckpt_strictness": "return_all"}, "--dist-ckpt-strictness return_all"),
    ],
)
def test_flags_that_would_hide_damage_are_refused(flags, message):
    plain = {
        "ckpt_format": "torch_dist",
        "ckpt_assume_constant_structure": False,
        "async_save": False,
        "dist_ckpt_strictness": "assume_ok_unexpected",
    }
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(argparse.Namespace(**plain | flags))
    assert caught.value.exit_code == ExitCode.CONFIG
