"""Checkpoints: resume equals the uninterrupted run, the table stays outside, another table is
refused."""

from __future__ import annotations

import re

import pytest
import torch
from pretraining import VOCAB_SIZE

from megatron_emo.cost_embedding import CostEmbeddingInfo, write_cost_embedding
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir, tensor_shapes

TP2 = ("--tensor-model-parallel-size", "2")
RAMP = ("--emo-start-iter", "3", "--emo-ramp-iters", "5")


@pytest.fixture
def saved_at_5(run_pretraining, tmp_path):
    """A TP=2 run with a ramp that saved and ended at iteration 5 of 10, and the one that went
    on."""
    folder = str(tmp_path / "checkpoint")
    whole = run_pretraining(2, *TP2, *RAMP, "--save", folder, "--save-interval", "5")
    tracker = tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "10"
    tracker.write_text("5")
    return folder, whole


@pytest.mark.parametrize(("world_size", "layout"), [(1, ()), (2, TP2)], ids=["tp1", "tp2"])
def test_resume_continues_the_run(run_pretraining, saved_at_5, world_size, layout):
    folder, whole = saved_at_5
    resumed = run_pretraining(world_size, *layout, *RAMP, "--load", folder)
    for name in ("lm loss", "emo loss", "objective", "objective weight"):
        assert sorted(resumed[name]) == [6, 7, 8, 9, 10]
        for iteration, value in resumed[name].items():
            assert value == pytest.approx(whole[name][iteration], abs=1e-5), (name, iteration)
    # The ramp went on from where it stood: its end changes the objective, not the cross-entropy.
    assert whole["objective"][3] == pytest.approx(whole["lm loss"][3], abs=1e-6)


def test_checkpoint_names_the_table_and_does_not_hold_it(saved_at_5, cost_embedding):
    folder = resolve_checkpoint_dir(saved_at_5[0])
    info = CostEmbeddingInfo.from_file(cost_embedding)
    assert read_arguments(folder).emo_cost_embedding_id == info.sha256
    assert not any(VOCAB_SIZE in shape or 10 in shape for shape in tensor_shapes(folder).values())


def other_table(tmp_path):
    path = tmp_path / "other.safetensors"
    write_cost_embedding(path, torch.randn(VOCAB_SIZE, 6), source="other", tokenizer_fingerprint="")
    return str(path)


def test_another_table_is_refused_by_both_names(
    run_pretraining, saved_at_5, tmp_path, cost_embedding
):
    other = other_table(tmp_path)
    message = (
        f"--emo-cost-embedding {re.escape(other)} has id "
        f"{CostEmbeddingInfo.from_file(other).sha256}, the checkpoint .* was trained with "
        f"{re.escape(str(cost_embedding))}, id "
    )
    run_pretraining(2, *TP2, *RAMP, "--load", saved_at_5[0], cost=other, error=message)
    finetuned = run_pretraining(
        1,
        *RAMP,
        "--load",
        saved_at_5[0],
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
        cost=other,
    )
    assert sorted(finetuned["lm loss"])[0] == 1


def test_a_table_of_another_vocabulary_is_refused_before_the_model(run_pretraining, tmp_path):
    path = tmp_path / "wrong.safetensors"
    write_cost_embedding(path, torch.randn(7, 6), source="wrong", tokenizer_fingerprint="")
    message = "it has 7 rows, the model's vocabulary.*has 123"
    run_pretraining(1, cost=str(path), error=message)
