"""The network before it is needed: real all-reduces, a rank that is late, and one that is dead."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from megatron_emo.launch.collectives import time_groups
from megatron_emo.launch.exit_codes import VerdictError
from megatron_emo.launch.verdict import StoreExchange


def exchange_on(path, timeout_s):
    world_size = dist.get_world_size()
    store = dist.FileStore(path, world_size)
    return StoreExchange(store, dist.get_rank(), world_size, timeout_s=timeout_s)


def check_times(path, late_rank):
    def before_each():
        if dist.get_rank() == late_rank:
            time.sleep(0.1)

    report = time_groups(
        {"world": dist.group.WORLD},
        exchange=exchange_on(path, 60.0),
        timeout_s=60.0,
        num_bytes=1 << 10,
        before_each=before_each,
    )
    assert report.lines[0].startswith("world (2 ranks): ")
    assert report.lines[1].startswith(f"slowest rank {late_rank}: others in its world group waited")
    assert report.slow_ranks == [late_rank]


@pytest.mark.parametrize("late_rank", [0, 1])
def test_the_late_rank_is_named_by_all(run_distributed, tmp_path, late_rank):
    run_distributed(2)(check_times, path=str(tmp_path / "store"), late_rank=late_rank)


def check_dead_rank(path):
    if dist.get_rank() == 1:
        return
    start = time.monotonic()
    exchange = exchange_on(path, 1.0)
    with pytest.raises(VerdictError, match="^rank 1 of 2 did not answer within 1 s: dead, stuck"):
        time_groups({"world": dist.group.WORLD}, exchange=exchange, timeout_s=1.0)
    assert time.monotonic() - start < 5


def test_a_dead_rank_is_named(run_distributed, tmp_path):
    run_distributed(2)(check_dead_rank, path=str(tmp_path / "store"))


def check_stuck_group(path):
    """Rank 1 answers, and never gets to the all-reduce."""
    group = dist.new_group([0, 1], backend="gloo")
    exchange = exchange_on(path, 20.0)
    if dist.get_rank() == 1:
        exchange(None)
        exchange(None)
        return
    error = "network: rank 0 of 2: the first all-reduces of the tp group, ranks 0-1, did not end"
    with pytest.raises(VerdictError, match=error):
        time_groups({"tp": group}, exchange=exchange, timeout_s=1.0)


def test_a_group_that_does_not_finish_is_named(run_distributed, tmp_path):
    run_distributed(2)(check_stuck_group, path=str(tmp_path / "store"))
