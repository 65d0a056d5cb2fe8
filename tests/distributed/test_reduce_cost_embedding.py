"""Reducing and narrowing a sharded table: what one rank finds in the whole of it, on 2 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_emo.benchmark.collectives import CollectiveCounter
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import (
    DTYPES,
    cosine_error,
    narrow_rows_checked,
    rotate_rows,
)
from megatron_emo.cost_embedding.reduce import principal_components, reduce_rows

VOCAB, PADDED, WIDTH, DIM = 101, 128, 14, 5


def build_table(num_rows=VOCAB):
    """The same unit rows [PADDED, WIDTH] on every rank, zero from num_rows on."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(PADDED, WIDTH, generator=generator) * torch.linspace(3, 0.5, WIDTH) + 0.5
    table[num_rows:] = 0
    return unit_rows(table)


def own_rows(table):
    size = PADDED // dist.get_world_size()
    return table[dist.get_rank() * size :][:size]


def gathered(tensor):
    """[ranks, ...]"""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def check_equals_one_rank(num_rows):
    table = build_table(num_rows)
    with CollectiveCounter() as counter:
        rows, error = reduce_rows(own_rows(table), DIM, dist.group.WORLD)
    assert [call[:2] for call in counter.calls] == [
        ("all_reduce", WIDTH * WIDTH),
        ("broadcast", WIDTH * DIM),
        ("all_gather", 4),
    ]
    whole = gathered(rows).flatten(0, 1)
    expected, _ = reduce_rows(table, DIM)
    torch.testing.assert_close(whole @ whole.T, expected @ expected.T, rtol=0, atol=1e-6)
    assert (whole[num_rows:] == 0).all()
    # Each rank samples its own rows: together, what one process finds in the two halves.
    halves = [cosine_error(*pair) for pair in zip(table.chunk(2), whole.chunk(2), strict=True)]
    pairs = sum(half.num_pairs for half in halves)
    squares = sum(half.rms**2 * half.num_pairs for half in halves)
    costs = sum(half.mean_cost * half.num_pairs for half in halves)
    assert error.num_pairs == pairs > 0
    assert error.rms == pytest.approx((squares / pairs) ** 0.5, rel=1e-12)
    assert error.mean_cost == pytest.approx(costs / pairs, rel=1e-12)
    assert error.max == max(half.max for half in halves)


@pytest.mark.parametrize("num_rows", [VOCAB, 50], ids=["both ranks", "one rank all padding"])
def test_two_ranks_reduce_as_one(run_distributed, num_rows):
    run_distributed(2)(check_equals_one_rank, num_rows=num_rows)


def check_error_of_one_rank(spoilt):
    unit = own_rows(build_table(PADDED))
    other = torch.zeros_like(unit) if dist.get_rank() == spoilt else unit
    error = cosine_error(unit, other, dist.group.WORLD)
    assert error.max == pytest.approx(1.0, abs=1e-6)
    alone = cosine_error(unit, torch.zeros_like(unit)).rms if dist.get_rank() == spoilt else 0.0
    total = gathered(torch.tensor(alone, dtype=torch.float64)).sum().item()
    assert error.rms == pytest.approx(total / 2**0.5, rel=1e-12)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_errors_of_any_rank_count(run_distributed, spoilt):
    run_distributed(2)(check_error_of_one_rank, spoilt=spoilt)


def check_same_components():
    components = gathered(principal_components(own_rows(build_table()), DIM, dist.group.WORLD))
    assert torch.equal(components[0], components[1])


def test_all_ranks_hold_the_same_bits_of_the_components(run_distributed):
    run_distributed(2)(check_same_components)


def check_subgroup():
    # A group of one rank, which for the second rank does not start at rank 0 of the world.
    groups = [dist.new_group([rank]) for rank in range(2)]
    group = groups[dist.get_rank()]
    with CollectiveCounter() as counter:
        rows, error = reduce_rows(own_rows(build_table()), DIM, group)
    assert counter.calls == []
    expected, expected_error = reduce_rows(own_rows(build_table()), DIM)
    assert torch.equal(rows, expected) and error == expected_error


def test_a_group_of_one_rank_needs_no_collective(run_distributed):
    run_distributed(2)(check_subgroup)


def check_refused_by_all():
    # Rank 0's rows are powers of 2 after the rotation and lose nothing, rank 1's lose over 1%.
    signs = torch.randint(0, 2, (PADDED, 16)) * 2.0 - 1.0
    table = signs @ rotate_rows(torch.eye(16), 16).T
    table[PADDED // 2 :] = torch.randn(PADDED // 2, 16) + 2 * torch.randn(16)
    rows = own_rows(unit_rows(table))
    if dist.get_rank() == 0:
        assert narrow_rows_checked(rows, DTYPES["fp8"], "--emo-cost-dtype")[1] < 1e-6
    with pytest.raises(ValueError, match="--emo-cost-dtype fp8: costs of this table") as caught:
        narrow_rows_checked(rows, DTYPES["fp8"], "--emo-cost-dtype", dist.group.WORLD)
    messages = [None, None]
    dist.all_gather_object(messages, str(caught.value))
    assert messages[0] == messages[1]


def test_a_table_that_fp8_spoils_on_one_rank_is_refused_by_all(run_distributed):
    run_distributed(2)(check_refused_by_all)
