"""Which tokens count and which distinct targets they have: all that depends on labels alone.

A loss needs cost rows of distinct targets only, and no logits of masked tokens. Both follow from
the labels, which are known before the forward: a plan made from them on the host costs the device
no synchronisation, and the rows it names can be on their way while the transformer runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.loss.statistics import Shard
from megatron_emo.loss.target_cost import gather_target_rows

DEVICE_BUCKET = 128
"""Rows that shapes on a GPU are rounded up to, so that they repeat from batch to batch; on a CPU
nothing gains from that."""


class TargetPlan(NamedTuple):
    """Tokens in the order of their targets, so that tokens of one target stand together.

    Tensors lie on the labels' device but for the host's copy. Padding, to whole buckets, repeats
    the last token's target and points past the end.
    """

    num_tokens: int
    """N, masked ones included."""
    num_counted: int
    """Tokens whose mask is not 0."""
    order: Tensor
    """[n] places of the counted tokens among the N, by their targets; N where padded."""
    target: Tensor
    """[n] their targets, ascending."""
    cost_row: Tensor
    """[n] which of the distinct targets each has, ascending."""
    distinct: Tensor
    """[U] distinct targets, ascending; the last repeated where padded; token 0 if none counts."""
    host_cost_row: Tensor
    """`cost_row` on the host."""
    bucket: int

    @property
    def is_padded(self) -> bool:
        return len(self.order) > self.num_counted

    def keep(self) -> Tensor | None:
        """Return [n] which rows are tokens; None for all."""
        if not self.is_padded:
            return None
        return torch.arange(len(self.order), device=self.order.device) < self.num_counted

    def distinct_of(self, rows: slice) -> slice:
        """Return the distinct targets of a run of tokens, in whole buckets as far as there are."""
        first = int(self.host_cost_row[rows.start])
        last = int(self.host_cost_row[rows.stop - 1])
        count = _round_up(last + 1 - first, self.bucket)
        return slice(first, min(first + count, len(self.distinct)))

    def select(self, values: Tensor) -> Tensor:
        """Return values [N, ...] of the tokens [n, ...] in the plan's order."""
        order = self.order
        if self.is_padded:
            # Padding reads a counted token: a masked one may hold NaN, which 0 * NaN keeps.
            order = torch.where(order == self.num_tokens, order[0], order)
        return values.index_select(0, order)

    def restore(self, values: Tensor) -> Tensor:
        """Return [N, ...] from values [n, ...] of the plan's tokens; 0 for masked tokens."""
        result = values.new_zeros(self.num_tokens + self.is_padded, *values.shape[1:])
        return result.index_copy_(0, self.order, values)[: self.num_tokens]


def plan_targets(
    target: Tensor, loss_mask: Tensor | None = None, *, bucket: int = 1, device=None
) -> TargetPlan:
    """Return the plan for targets [N] and their mask (None counts all), its tensors on `device`.

    On the host it waits for nothing, and copies to a GPU asynchronously; from targets on a GPU it
    waits for the device, twice or with a mask three times.
    """
    target = target.reshape(-1)
    order = torch.argsort(target, stable=True)
    if loss_mask is not None:
        order = order[loss_mask.reshape(-1)[order] != 0]
    num_tokens, num_counted = len(target), len(order)
    target = target[order]
    distinct, cost_row = torch.unique_consecutive(target, return_inverse=True)
    if not num_counted:
        distinct = distinct.new_zeros(1)  # what masked tokens point at must exist
    elif bucket > 1:
        padding = _round_up(num_counted, bucket) - num_counted
        order = torch.cat([order, order.new_full((padding,), num_tokens)])
        target, cost_row = (torch.cat([x, x[-1:].expand(padding)]) for x in (target, cost_row))
        padding = _round_up(len(distinct), bucket) - len(distinct)
        distinct = torch.cat([distinct, distinct[-1:].expand(padding)])
    tensors = order, target, cost_row, distinct
    plan = TargetPlan(num_tokens, num_counted, *tensors, cost_row.cpu(), bucket)
    return plan if device is None else _move(plan, device)


def _move(plan: TargetPlan, device: torch.device) -> TargetPlan:
    def to(x: Tensor) -> Tensor:
        # Only from page-locked memory does a copy not wait.
        pinned = x.pin_memory() if x.device.type == "cpu" and device.type == "cuda" else x
        return pinned.to(device, non_blocking=True)

    names = ("order", "target", "cost_row", "distinct")
    return plan._replace(**{name: to(getattr(plan, name)) for name in names})


def _round_up(count: int, bucket: int) -> int:
    return -(-count // bucket) * bucket


class PlannedTargets:
    """A plan and the unit rows of its distinct targets, which may still be on their way."""

    def __init__(
        self, plan: TargetPlan, unit_embedding: Tensor | None, shard: Shard, *, wait: bool = True
    ) -> None:
        """Start fetching; one all-reduce of [U, D], none on one rank or without a table."""
        self.plan = plan
        self._rows, self._work = None, None
        if unit_embedding is not None:
            self._rows, self._work = gather_target_rows(
                plan.distinct, unit_embedding, shard, wait=wait
            )

    def rows(self) -> Tensor | None:
        """Return the rows [U, D] in the table's dtype, waiting for them; None without a table."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._rows


def share_targets(target: Tensor | None, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Return the first rank's host tensor [num_tokens] on every rank of a group that works on the
    host; one broadcast of int32.

    Args:
        target: [num_tokens] integers on the first rank, ignored on the others.
    """
    shared = torch.empty(num_tokens, dtype=torch.int32)
    if dist.get_rank(group) == 0:
        shared.copy_(target.reshape(-1))
    dist.broadcast(shared, group=group, group_src=0)
    return shared.long()
