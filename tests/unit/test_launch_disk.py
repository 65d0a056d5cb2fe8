"""Room for the next checkpoint, and leave to write it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from megatron_emo.launch import disk
from megatron_emo.launch.exit_codes import DiskError


def free(monkeypatch, count):
    monkeypatch.setattr(
        "os.statvfs", lambda folder: SimpleNamespace(f_bavail=count // 4096, f_frsize=4096)
    )


def checkpoint(root, iteration, size, is_whole=True):
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"\0" * size)
    if is_whole:
        (folder / ".metadata").write_bytes(b"")


def test_the_newest_whole_checkpoint_decides(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1, 100_000)
    checkpoint(tmp_path, 2, 50_000)
    checkpoint(tmp_path, 3, 10, is_whole=False)
    assert disk.newest_checkpoint_bytes(tmp_path) == 50_000
    free(monkeypatch, 102_400)
    disk.check_save_folder(tmp_path, num_checkpoints=2, estimated_bytes=1e12)
    free(monkeypatch, 98_304)
    with pytest.raises(DiskError, match="--save .*: 96 KiB free, expected 97.7 KiB: room for 2 "):
        disk.check_save_folder(tmp_path, num_checkpoints=2, estimated_bytes=0)


def test_the_estimate_serves_a_first_start_and_the_flag_turns_it_off(tmp_path, monkeypatch):
    free(monkeypatch, 1 << 20)
    folder = tmp_path / "new" / "run"
    with pytest.raises(DiskError, match=r"\(estimated\); .*--emo-disk-checkpoints") as caught:
        disk.check_save_folder(folder, num_checkpoints=2, estimated_bytes=1 << 20)
    assert caught.value.exit_code == 74
    disk.check_save_folder(folder, num_checkpoints=0, estimated_bytes=1 << 20)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="--save .*file/run: cannot be written: Not a directory"):
        disk.check_save_folder(tmp_path / "file" / "run", num_checkpoints=0, estimated_bytes=0)


def arguments(**changes):
    values = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "kv_channels": 8,
        "num_query_groups": 2,
        "group_query_attention": True,
        "swiglu": True,
        "ffn_hidden_size": 96,
        "num_experts": None,
        "num_layers": 3,
        "padded_vocab_size": 128,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 32,
        "position_embedding_type": "rope",
        "bf16": True,
        "fp16": False,
        "no_save_optim": False,
    }
    return argparse.Namespace(**values | changes)


def test_parameters_by_hand():
    # q and o: 64 x 64 each; k and v: 64 x 16 each; three matrices of 64 x 96.
    layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 96
    embeddings = 2 * 128 * 64
    assert disk.estimate_num_parameters(arguments()) == 3 * layer + embeddings
    assert disk.estimate_checkpoint_bytes(arguments()) == 14 * (3 * layer + embeddings)
    assert disk.estimate_checkpoint_bytes(arguments(no_save_optim=True)) == 2 * (
        3 * layer + embeddings
    )


def test_parameters_with_experts_by_hand():
    experts = {
        "num_experts": 4,
        "moe_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 16,
        "moe_layer_freq": 2,
        "bf16": False,
        "untie_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute",
    }
    attention = 2 * 64 * 64 + 2 * 64 * 16
    expert_layer = 3 * 64 * (4 * 32 + 16) + 64 * 4
    total = 3 * attention + 2 * expert_layer + 3 * 64 * 96 + 128 * 64 + 32 * 64
    assert disk.estimate_num_parameters(arguments(**experts)) == total
    assert disk.estimate_checkpoint_bytes(arguments(**experts)) == 12 * total
    listed = experts | {"moe_layer_freq": [1, 0, 1]}
    assert disk.estimate_num_parameters(arguments(**listed)) == total
