"""A run whose rank is killed at any moment resumes to the same bits.

A goes through, B has a rank killed, C resumes B: losses as float.hex and every stored tensor are
compared with A's.
"""

from __future__ import annotations

import random

import pytest
import torch
from forked_runs import Kill, forked_runs

from megatron_emo.torch_dist import TensorReader

RUN = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48
    --seq-length 24 --max-position-embeddings 24 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --init-method-std 0.2
    --micro-batch-size 2 --global-batch-size 8 --train-iters 12
    --lr 5e-3 --min-lr 1e-3 --lr-decay-style cosine --clip-grad 1.0 --seed 7
    --eval-interval 6 --eval-iters 1 --log-interval 1 --save-interval 3
    --mock-data --split 98,1,1 --tokenizer-type NullTokenizer --vocab-size 123
    --make-vocab-size-divisible-by 16 --num-workers 0
    --objective emo1 --emo-cost-embedding output-layer --emo-start-iter 2 --emo-ramp-iters 5
""".split()
TP2 = ["--tensor-model-parallel-size", "2"]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
NUM_KILLS = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with forked_runs(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


class Straight:
    """Run A with some flags."""

    def __init__(self, runs, flags, folder):
        self.runs, self.flags, self.folder = runs, [*RUN, *flags], folder / "straight"
        self.outcome = self.run(self.folder, counts_calls=True)
        assert self.outcome.codes == [0, 0], self.outcome.log()[-3000:]
        assert sorted(self.outcome.losses) == list(range(1, 13))

    def run(self, folder, **options):
        return self.runs.run([*self.flags, "--save", str(folder), "--load", str(folder)], **options)

    def check_killed(self, kill, folder):
        """Run B and C, compare with A, and return (iterations in B, first iteration in C)."""
        killed = self.run(folder, kill=kill)
        assert killed.codes[kill.rank] == -9, (kill, killed.codes)
        resumed = self.run(folder)
        assert resumed.codes == [0, 0], (kill, resumed.log()[-3000:])
        for part in (killed.losses, resumed.losses):
            assert part == {i: self.outcome.losses[i] for i in part}, kill
        assert set(killed.losses) | set(resumed.losses) == set(self.outcome.losses), kill
        lost = max(killed.losses, default=0) - min(resumed.losses, default=13) + 1
        assert lost <= 3, kill  # the interval
        assert_same_tensors(self.folder / "iter_0000012", folder / "iter_0000012")
        return max(killed.losses, default=0), min(resumed.losses, default=13)


def assert_same_tensors(expected, found):
    expected, found = TensorReader(expected), TensorReader(found)
    assert expected.shapes == found.shapes and len(expected.shapes) >= 12
    for name in expected.shapes:
        ours, theirs = found.read(name), expected.read(name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name


def random_kill(number, outcome):
    """Even numbers: at a Python call between the first losses and the end; odd ones: at a moment
    after an iteration."""
    generator = random.Random(number)
    rank = generator.randrange(2)
    if number % 2 == 0:
        return Kill(rank, calls=generator.randint(*outcome.num_calls(rank)))
    return Kill(rank, iteration=generator.randint(1, 10), seconds=generator.uniform(0, 0.3))


def test_a_killed_run_with_dropout_resumes_to_the_same_bits(runs, tmp_path):
    straight = Straight(runs, TP2 + DROPOUT, tmp_path)
    _, first = straight.check_killed(random_kill(6, straight.outcome), tmp_path / "killed")
    assert first > 1  # from a checkpoint


@pytest.mark.slow
def test_twenty_kills_half_of_them_with_dropout(runs, tmp_path, capsys):
    for name, flags in (("dropout", DROPOUT), ("no dropout", NO_DROPOUT)):
        straight = Straight(runs, TP2 + flags, tmp_path / name)
        for number in range(NUM_KILLS // 2):
            kill = random_kill(number + 100 * len(name), straight.outcome)
            last, first = straight.check_killed(kill, tmp_path / name / str(number))
            with capsys.disabled():
                print(
                    f"\n{name} {number + 1}/{NUM_KILLS // 2}: {kill}: {last}, resumed at {first}",
                    flush=True,
                )


@pytest.mark.slow
def test_kills_under_the_distributed_optimizer(runs, tmp_path):
    flags = ["--use-distributed-optimizer", *DROPOUT]
    straight = Straight(runs, flags, tmp_path)
    for number in (0, 1):
        straight.check_killed(random_kill(number, straight.outcome), tmp_path / str(number))
