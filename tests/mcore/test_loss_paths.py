"""--emo-loss-path through pretrain(): every path trains as the logits path does."""

from __future__ import annotations

import pytest
from pretraining import DATA, MODEL, TRAINING

TP2 = ("--tensor-model-parallel-size", "2")
SHORT = ("--train-iters", "4", "--eval-interval", "4")
LAYOUTS = {
    "one rank": (1, ()),
    "tp2": (2, TP2),
    "tp2 sp": (2, (*TP2, "--sequence-parallel")),
    "dp2 distributed optimizer": (2, ("--use-distributed-optimizer",)),
    "tp2 mtp": (2, (*TP2, "--mtp-num-layers", "1")),
    "mup": (1, ("--use-mup", "--mup-base-hidden-size", "16")),
    "per-token loss": (1, ("--calculate-per-token-loss",)),
}


SLOW = {"tp2", "tp2 mtp", "per-token loss"}


@pytest.fixture(scope="module")
def logits_runs():
    return {}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
@pytest.mark.parametrize("path", ["recompute", "forward"])
def test_path_trains_as_the_logits_path(run_pretraining, logits_runs, layout, path):
    world_size, flags = LAYOUTS[layout]
    flags = (*SHORT, *flags, "--emo-loss-path")
    if layout not in logits_runs:
        logits_runs[layout] = run_pretraining(world_size, *flags, "logits")
    expected, fused = logits_runs[layout], run_pretraining(world_size, *flags, path)
    for name in ("lm loss", "emo loss", "entropy", "grad-norm", "emo loss validation"):
        for iteration, value in expected[name].items():
            assert fused[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)
    assert expected["lm loss"][4] < expected["lm loss"][1]


def test_tied_head_gets_both_gradients(run_pretraining):
    base = [f for f in MODEL + TRAINING + DATA if f != "--untie-embeddings-and-output-weights"]
    flags = (*SHORT, *TP2)
    expected = run_pretraining(2, *flags, "--emo-loss-path", "logits", base=base)
    fused = run_pretraining(2, *flags, "--emo-loss-path", "recompute", base=base)
    for name in ("lm loss", "grad-norm"):
        for iteration, value in expected[name].items():
            assert fused[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)


@pytest.mark.parametrize("path", ["logits", pytest.param("recompute", marks=pytest.mark.slow)])
def test_weights_are_gathered_before_the_loss_reads_them(run_pretraining, path):
    flags = (
        *SHORT,
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--ddp-bucket-size",
        "1",
    )
    expected = run_pretraining(2, *flags, "--emo-loss-path", path)
    overlapped = run_pretraining(2, *flags, "--overlap-param-gather", "--emo-loss-path", path)
    for name in ("lm loss", "emo loss", "grad-norm"):
        for iteration, value in expected[name].items():
            assert overlapped[name][iteration] == pytest.approx(value, abs=1e-6), (name, iteration)


def test_the_output_layers_own_product_is_taken_where_a_flag_needs_it(run_pretraining):
    flags = ("--defer-embedding-wgrad-compute",)
    message = "--emo-loss-path recompute: does not go with --defer-embedding-wgrad-compute"
    run_pretraining(1, *SHORT, *flags, "--emo-loss-path", "recompute", error=message)


def test_a_bf16_table_trains_as_the_fp32_one_to_its_rounding(run_pretraining):
    wide = run_pretraining(2, *SHORT, *TP2)
    narrow = run_pretraining(2, *SHORT, *TP2, "--emo-cost-dtype", "bf16")
    for iteration, value in wide["emo loss"].items():
        assert narrow["emo loss"][iteration] == pytest.approx(value, rel=1e-3)
    assert narrow["emo loss"] != wide["emo loss"]


def test_a_table_too_coarse_in_fp8_is_refused_by_the_flag(run_pretraining):
    # Three columns leave too few products to average e4m3's rounding over.
    message = "--emo-cost-dtype fp8: costs of this table"
    flags = ("--emo-cost-dtype", "fp8", "--emo-cost-dim", "3")
    run_pretraining(1, *SHORT, *flags, error=message)
