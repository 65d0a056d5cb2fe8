"""The model against the figures the design was made with: H200, bf16, N=8192, h=d=4096, V=131072,
30% of the targets distinct; CE, and what EMO adds to it, in milliseconds."""

from __future__ import annotations

import pytest

from megatron_emo.benchmark.roofline import DEVICES, find_device, predict, useful_flop

N, H, V = 8192, 4096, 131072
DENSE, DEDUPLICATED = N, round(0.3 * N)


def total(path, num_distinct=0, table="", tp=1):
    sizes = {"num_tokens": N, "vocab_size": V // tp, "hidden_size": H, "cost_dim": H}
    return predict(DEVICES["H200"], path, **sizes, num_distinct=num_distinct, table=table).total


@pytest.mark.parametrize("path", ["forward", "logits"])
def test_cross_entropy_and_emo_in_three_products(path):
    assert total(path) == pytest.approx(34.9, abs=0.05)
    assert total(path, DENSE) - total(path) == pytest.approx(12.6, abs=0.05)
    assert total(path, DEDUPLICATED) - total(path) == pytest.approx(3.8, abs=0.05)
    assert total(path, DEDUPLICATED, "fp8") - total(path) == pytest.approx(2.5, abs=0.05)


def test_cross_entropy_and_emo_with_logits_formed_twice():
    assert total("recompute") == pytest.approx(46.0, abs=0.05)
    assert total("recompute", DENSE) - total("recompute") == pytest.approx(24.3, abs=0.05)
    assert total("recompute", DEDUPLICATED) - total("recompute") == pytest.approx(7.3, abs=0.05)
    assert total("recompute", DEDUPLICATED, "fp8") - total("recompute") == pytest.approx(
        4.7, abs=0.05
    )


def test_one_of_eight_ranks():
    assert total("forward", tp=8) == pytest.approx(4.36, abs=0.01)
    assert total("forward", DENSE, tp=8) - total("forward", tp=8) == pytest.approx(1.58, abs=0.01)
    shares = {"": 0.47, "fp8": 0.31}
    for table, expected in shares.items():
        added = total("forward", DEDUPLICATED, table, tp=8) - total("forward", tp=8)
        assert added == pytest.approx(expected, abs=0.01)
    assert total("recompute", tp=8) == pytest.approx(5.75, abs=0.01)


def test_one_product_alone():
    sizes = {"num_tokens": N, "vocab_size": V, "hidden_size": H}
    assert predict(DEVICES["H200"], "forward", **sizes).products / 3 == pytest.approx(
        11.1, abs=0.05
    )
    assert useful_flop(N, V, H) == 3 * 2 * N * V * H


def test_devices_are_known_by_the_names_cuda_gives():
    assert find_device("NVIDIA H200") is DEVICES["H200"]
    assert find_device("NVIDIA H100 80GB HBM3").nominal_bandwidth == 3.35e12
    assert find_device("NVIDIA A100-SXM4-80GB") is None
