"""The flags that --use-checkpoint-args forgets, taken from the checkpoint's arguments."""

from __future__ import annotations

import argparse

import pytest

from megatron_emo.conversion.torch_dist_writer import (
    PieceWriter,
    common_state,
    write_index,
    write_tracker,
)
from megatron_emo.training.model_arguments import with_checkpoint_arguments

SAVED = {
    "iteration": 0,
    "layernorm_epsilon": 1e-6,
    "qk_layernorm": True,
    "openai_gelu": False,
    "use_rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "rotary_seq_len_interpolation_factor": None,
}
ADDED = ["--norm-epsilon", "1e-06", "--rope-scaling-factor", "32.0"]
ADDED += ["--qk-layernorm", "--use-rope-scaling"]


@pytest.fixture
def checkpoint(tmp_path) -> str:
    folder = tmp_path / "checkpoint" / "release"
    folder.mkdir(parents=True)
    with open(folder / "__0_0.distcp", "wb") as stream:
        writer = PieceWriter(stream, "__0_0.distcp")
        writer.write_object(*common_state(argparse.Namespace(**SAVED)))
    write_index(folder, writer.pieces)
    write_tracker(folder.parent)
    return str(folder.parent)


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_forgotten_flags_follow(checkpoint, flag):
    argv = ["--use-checkpoint-args", f"{flag}={checkpoint}", "--lr", "1e-3"]
    assert with_checkpoint_arguments(argv) == [*argv, *ADDED]


def test_typed_flags_stay(checkpoint):
    argv = ["--use-checkpoint-args", "--load", checkpoint, "--norm-epsilon", "1e-3"]
    assert with_checkpoint_arguments(argv) == [*argv, *ADDED[2:]]


def test_a_typed_tokenizer_is_not_replaced(checkpoint):
    argv = ["--use-checkpoint-args", "--load", checkpoint, "--tokenizer-type", "NullTokenizer"]
    expected = [*argv, *ADDED, "--no-use-tokenizer-model-from-checkpoint-args"]
    assert with_checkpoint_arguments(argv) == expected


def test_what_cannot_be_read_is_left_to_megatron(checkpoint, tmp_path):
    for argv in (
        ["--load", checkpoint],
        ["--use-checkpoint-args"],
        ["--use-checkpoint-args", "--load", str(tmp_path / "none")],
        ["--use-checkpoint-args", "--load", checkpoint, "--ckpt-step", "3"],
    ):
        assert with_checkpoint_arguments(argv) == argv
