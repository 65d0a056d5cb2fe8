"""--emo-deterministic-tp through Megatron's real pretrain()."""

from __future__ import annotations

import pytest

TP2 = ("--tensor-model-parallel-size", "2")
FLAGS = ("--train-iters", "3", "--eval-interval", "3", "--emo-deterministic-tp")


@pytest.mark.slow
def test_trains_as_one_rank(run_pretraining, from_checkpoint):
    one = run_pretraining(1, *from_checkpoint, *FLAGS)
    two = run_pretraining(2, *from_checkpoint, *FLAGS, *TP2, "--sequence-parallel")
    default = run_pretraining(2, *from_checkpoint, *FLAGS[:-1], *TP2, "--sequence-parallel")
    for name in ("lm loss", "emo loss", "objective", "grad-norm"):
        assert sorted(one[name]) == [1, 2, 3]
        for iteration, value in one[name].items():
            assert two[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)
            assert default[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)


@pytest.mark.slow
def test_padding_that_has_no_such_blocks_is_named(run_pretraining):
    message = (
        "--emo-deterministic-tp: expected a padded vocabulary divisible by "
        "--emo-deterministic-blocks 8, got 124.*--make-vocab-size-divisible-by 2 times "
        "--tensor-model-parallel-size 2"
    )
    run_pretraining(2, *FLAGS, *TP2, "--make-vocab-size-divisible-by", "2", error=message)
