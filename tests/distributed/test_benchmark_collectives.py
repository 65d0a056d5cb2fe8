"""What is counted of torch.distributed, in 2 and 4 gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_emo.benchmark.collectives import (
    CollectiveCounter,
    count_collectives,
    count_on_this_rank,
)
from megatron_emo.benchmark.variants import VARIANTS

TARGET = torch.tensor([3, 900, 3, 41, 7, 900, 5, 2, 3, 2])
N, U, H, D = 10, 6, 8, 16


def check_counter():
    group = dist.new_group([0, 1])
    with CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(3, 5, dtype=torch.bfloat16), group=group)
        dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
        parts = [torch.ones(2, dtype=torch.float64)] * 2
        dist.reduce_scatter(torch.empty(2, dtype=torch.float64), parts, group=group)
        work = dist.broadcast(torch.ones(7, dtype=torch.uint8), src=0, async_op=True)
        work.wait()
        with CollectiveCounter() as inner:
            dist.barrier()
    dist.all_reduce(torch.ones(3))
    assert [call[:2] for call in counter.calls] == [
        ("all_reduce", 15),
        ("all_gather", 4),
        ("reduce_scatter", 4),
        ("broadcast", 7),
        ("barrier", 0),
    ]
    assert [call.num_bytes for call in counter.calls] == [30, 16, 32, 7, 0]
    assert counter.calls[0].group is group and counter.calls[1].group is None
    assert [call.name for call in inner.calls] == ["barrier"]


def test_the_counter_records_what_is_handed_in(run_distributed):
    run_distributed(2)(check_counter)


def check_bytes(dtype, size):
    names = [name for name in VARIANTS if VARIANTS[name].path]
    counted = count_on_this_rank(names, TARGET, H, D, dtype, dist.group.WORLD)
    for name, traffic in counted.items():
        forward = [] if name.startswith("mle") else [("all_reduce", U * D * size)]
        if name.endswith("fp8"):
            forward = [("all_reduce", U * D)]
        # The numbers per token are fp32 in any run.
        forward += [("all_gather", (12 if name.startswith("mle") else 16) * N)]
        assert traffic.forward == forward, name
        assert traffic.formula_forward_bytes == sum(num_bytes for _, num_bytes in forward), name
        backward = N * H * size if "fused" in name else 0
        assert traffic.formula_backward_bytes == backward, name
        assert sum(num_bytes for _, num_bytes in traffic.backward) == backward, name
        assert len(traffic.backward) <= 1


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_as_the_formula_says(run_distributed, world_size, dtype, size):
    run_distributed(world_size)(check_bytes, dtype=dtype, size=size)


def test_one_rank_has_nothing_to_count():
    with pytest.raises(ValueError, match="--tensor-parallel: expected at least 2 ranks, got 1"):
        sizes = {"hidden_size": H, "cost_dim": D, "dtype": torch.float32}
        count_collectives(["emo1-logits"], TARGET, **sizes, tp_size=1)
