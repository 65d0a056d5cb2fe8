"""What Megatron offers beside plain layers, under EMO and through pretrain()."""

from __future__ import annotations

import pytest
import torch
from pretraining import DATA, MODEL, TRAINING

TP2 = ("--tensor-model-parallel-size", "2")
SHORT = ("--train-iters", "4", "--eval-interval", "4")


def check_learns(run, iterations=4):
    assert sorted(run["lm loss"]) == list(range(1, iterations + 1))
    for name in (
        "lm loss",
        "emo loss",
        "objective",
        "objective weight max",
        "entropy",
        "grad-norm",
    ):
        assert all(torch.isfinite(torch.tensor(list(run[name].values())))), name
    assert 0 < run["emo loss"][1] < 2
    assert run["objective weight max"][1] >= run["objective weight"][1] > 0
    assert run["lm loss"][iterations] < run["lm loss"][1]
    assert "emo loss validation" in run


FEATURES = {
    "bf16": (2, (*TP2, "--bf16")),
    "bf16, distributed optimizer": (2, ("--bf16", "--use-distributed-optimizer")),
    "multi-token prediction": (2, (*TP2, "--mtp-num-layers", "1")),
    "mup": (1, ("--use-mup", "--mup-base-hidden-size", "16")),
    "experts, all to all": (
        2,
        "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 "
        "--moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 24".split(),
    ),
    "recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    ),
    "eod masked": (1, ("--eod-mask-loss", "--reset-position-ids")),
}


@pytest.mark.parametrize(
    "feature",
    [pytest.param(name, marks=pytest.mark.slow if name == "bf16" else ()) for name in FEATURES],
)
def test_feature_trains_under_emo(run_pretraining, feature):
    world_size, flags = FEATURES[feature]
    check_learns(run_pretraining(world_size, *SHORT, *flags))


def tied(flags):
    return [flag for flag in flags if flag != "--untie-embeddings-and-output-weights"]


PP2 = ("--pipeline-model-parallel-size", "2")


@pytest.mark.parametrize(
    ("layout", "cost"),
    [
        pytest.param((*TP2, "--sequence-parallel"), "file", id="file-tp2 sp"),
        pytest.param(PP2, "output-layer", id="output-layer-pp2"),
        *(
            pytest.param(layout, cost, id=f"{cost}-{name}", marks=pytest.mark.slow)
            for layout, cost, name in (
                (TP2, "file", "tp2"),
                (TP2, "output-layer", "tp2"),
                ((*TP2, "--sequence-parallel"), "output-layer", "tp2 sp"),
                (PP2, "file", "pp2"),
            )
        ),
    ],
)
def test_tied_embeddings_train_as_one_rank(run_pretraining, tmp_path, cost_embedding, layout, cost):
    base = tied(MODEL + TRAINING + DATA)
    cost = str(cost_embedding) if cost == "file" else cost
    start = str(tmp_path / "start")
    run_pretraining(
        1,
        "--train-iters",
        "1",
        "--lr",
        "0",
        "--min-lr",
        "0",
        "--save",
        start,
        "--save-interval",
        "1",
        "--no-save-optim",
        base=base,
        objective="mle",
        cost=None,
    )
    load = ["--load", start, "--finetune", "--no-load-optim", "--no-load-rng"]
    expected = run_pretraining(1, *SHORT, *load, base=base, cost=cost)
    run = run_pretraining(2, *SHORT, *load, *layout, base=base, cost=cost)
    check_learns(run)
    for name in ("lm loss", "emo loss", "emo loss validation"):
        for iteration, value in expected[name].items():
            assert run[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, ()), (2, (*TP2, "--sequence-parallel"))],
    ids=["one rank", "tp2 sp"],
)
def test_packed_sequences_train_as_masked_ones(
    run_pretraining, from_checkpoint, short_documents, world_size, layout
):
    # The same batches twice: packed with document bounds, and as rows with a mask that resets.
    def run(world_size, *flags):
        return run_pretraining(
            world_size,
            *from_checkpoint,
            *SHORT,
            *("--data-path", short_documents, "--eod-mask-loss"),
            *flags,
            base=MODEL + TRAINING + [flag for flag in DATA if flag != "--mock-data"],
        )

    masked = run(1, "--reset-attention-mask", "--reset-position-ids")
    packed = run(world_size, *layout, "--dataloader-inter-document-masking")
    check_learns(packed)
    for name in ("lm loss", "emo loss"):
        for iteration, value in masked[name].items():
            assert packed[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)


def check_masked_labels_may_hold_anything(path):
    from types import SimpleNamespace

    from megatron_emo import build_objective
    from megatron_emo.config import LossPathConfig
    from megatron_emo.training import cpu

    cpu.enable([])
    from megatron_emo.training.output_processor import emo_output_processor

    class Head(torch.nn.Module):
        sequence_parallel = gradient_accumulation_fusion = False

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(8))

        def forward(self, hidden_states, weight, runtime_gather_output):
            return hidden_states, None

    state = SimpleNamespace(
        objective=lambda: build_objective("emo1"),
        cost_embedding=lambda weight, is_training: weight,
        tp_group=None,
        vocab_size=8,
        loss_path=lambda *sizes: path,
        needs_output_layer=path == "output layer",
        config=SimpleNamespace(loss_path=LossPathConfig()),
    )
    context = SimpleNamespace(state=state, planned=lambda table: None)
    labels = torch.tensor([[1, 2, -100], [3, 99, 7]])
    loss_mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    losses = emo_output_processor(
        hidden_states=torch.randn(3, 2, 8),  # [s, b, V]: this head changes nothing
        output_layer=Head(),
        output_weight=None,
        labels=labels,
        loss_mask=loss_mask,
        scale_logits=lambda logits: logits,
        runtime_gather_output=None,
        context=context,
    )
    assert losses.shape == (2, 3)
    assert ((losses == 0) == (loss_mask == 0)).all()


@pytest.mark.parametrize("path", ["output layer", "logits", "recompute", "forward"])
def test_masked_labels_may_hold_anything(run_distributed, path):
    run_distributed(1)(check_masked_labels_may_hold_anything, path=path)


def test_start_and_ramp_move_from_mle_to_the_objective(run_pretraining, from_checkpoint):
    mle = run_pretraining(1, *from_checkpoint, *SHORT, objective="mle")
    late = run_pretraining(1, *from_checkpoint, *SHORT, "--emo-start-iter", "2")
    emo2 = run_pretraining(1, *from_checkpoint, *SHORT, "--emo-ramp-iters", "4", objective="emo2")
    # Gradients of the first two steps are MLE's: losses of the first three are equal.
    for iteration in (1, 2, 3):
        assert late["lm loss"][iteration] == pytest.approx(mle["lm loss"][iteration], abs=1e-6)
    assert abs(late["lm loss"][4] - mle["lm loss"][4]) > 1e-4
    # A quarter of the way: 3/4 m + 1/4 (2 d), as emo2's value is 2 d by construction.
    expected = 0.75 * emo2["lm loss"][1] + 0.25 * 2 * emo2["emo loss"][1]
    assert emo2["objective"][1] == pytest.approx(expected, abs=1e-5)


def test_cap_is_counted(run_pretraining, from_checkpoint):
    run = run_pretraining(1, *from_checkpoint, *SHORT, "--emo-weight-max", "3")
    assert 0 < run["objective weight capped"][1] <= 1
    assert run["objective weight max"][1] == pytest.approx(3.0)
    uncapped = run_pretraining(1, *from_checkpoint, *SHORT)
    assert uncapped["objective weight capped"][1] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--emo-weight-max", "-1"), "weight_max: expected > 0.0, got -1.0"),
        (("--emo-eta", "0.5"), "emo1: does not have eta"),
        (("--cuda-graph-impl", "full_iteration"), "--cuda-graph-impl"),
        (("--use-torch-fsdp2",), "--use-torch-fsdp2"),
    ],
)
def test_refused_by_name(run_pretraining, flags, message):
    run_pretraining(1, *flags, error=message)


def test_missing_table_is_refused_by_name(run_pretraining):
    message = "--emo-cost-embedding: expected output-layer or a safetensors file, got nowhere"
    run_pretraining(1, cost="nowhere.safetensors", error=message)
