"""EMO through pretrain(): every layout trains as one rank does, and MLE trains as Megatron's own
loss."""

from __future__ import annotations

import pytest

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "tp2": TP2,
    "tp2 sp": (*TP2, "--sequence-parallel"),
    "pp2": PP2,
    "pp2 vpp2": (*PP2, "--num-layers-per-virtual-pipeline-stage", "1"),
    "dp2": (),
    "dp2 distributed optimizer": ("--use-distributed-optimizer",),
    "tp2 per-token loss": (*TP2, "--calculate-per-token-loss"),
}
LOGGED = ("lm loss", "emo loss", "objective", "objective weight", "entropy", "lm loss validation")


def assert_same_curves(run, reference, names, tolerance):
    for name in names:
        assert run[name].keys() == reference[name].keys(), name
        for iteration, value in reference[name].items():
            assert run[name][iteration] == pytest.approx(value, abs=tolerance), (name, iteration)


@pytest.fixture(scope="module")
def one_rank():
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_rank(run_pretraining, from_checkpoint, one_rank, layout):
    if not one_rank:
        one_rank.update(run_pretraining(1, *from_checkpoint))
    run = run_pretraining(2, *from_checkpoint, *LAYOUTS[layout])
    assert len(run["lm loss"]) == 10
    assert_same_curves(run, one_rank, LOGGED, 1e-5)
    assert run["emo loss"][1] > 0.5
    assert run["lm loss"][10] < run["lm loss"][1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_mle_trains_as_megatrons_own_loss(run_pretraining, world_size):
    layout = TP2 if world_size == 2 else ()
    ours = run_pretraining(world_size, *layout, objective="mle", cost=None)
    theirs = run_pretraining(world_size, *layout, use_megatron_loss=True)
    assert len(ours["lm loss"]) == 10
    assert_same_curves(ours, theirs, ["lm loss", "lm loss validation"], 1e-6)
    assert_same_curves(ours, theirs, ["grad-norm"], 1e-5)
    assert "emo loss" not in ours
