"""The plan of a microbatch's targets: from labels on the host, the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist


def check_plan_from_the_first_ranks_host():
    from types import SimpleNamespace

    from megatron_emo.loss.target_plan import DEVICE_BUCKET, plan_targets
    from megatron_emo.training import cpu

    cpu.enable([])
    from megatron_emo.training.microbatch import _plan

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (2, 3 * DEVICE_BUCKET), generator=generator)
    loss_mask = (torch.rand(labels.shape, generator=generator) > 0.2).float()
    labels[loss_mask == 0] = -100
    on_host = torch.where(loss_mask != 0, labels, -1)
    # Labels as a GPU would hold them: nothing but their shape may be looked at.
    on_device = SimpleNamespace(
        is_cuda=True, shape=labels.shape, numel=labels.numel, device=torch.device("cpu")
    )
    batch = {
        "labels": on_device,
        "loss_mask": None,
        "host_targets": on_host if dist.get_rank() == 0 else None,
    }
    state = SimpleNamespace(shares_host_targets=True, host_group=dist.group.WORLD)
    found = _plan(state, batch)
    expected = plan_targets(labels.T.contiguous(), loss_mask.T, bucket=DEVICE_BUCKET)
    for name in ("order", "target", "cost_row", "distinct", "host_cost_row"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.num_counted == int(loss_mask.sum())


def test_plan_from_the_first_ranks_host(run_distributed):
    run_distributed(2)(check_plan_from_the_first_ranks_host)
