"""The two ends of z = x W^T across ranks: tokens gathered before it, its gradients after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.loss.statistics import Shard
from megatron_emo.loss.target_plan import TargetPlan
from megatron_emo.loss.vocabulary_blocks import Block, OrderedReduction, TreeSum, aligned

_WIDENED_ROWS = 256
"""Of a product's inner dimension, widened at a time where that has to be."""


class Spread(NamedTuple):
    """How tokens lie in hidden states."""

    plan: TargetPlan
    shard: Shard
    sequence_parallel: bool
    """Each rank holds its part of the first dimension."""


class SequenceTokens:
    """The plan's tokens [n, h] of hidden states, which sequence parallelism spreads over ranks."""

    def __init__(self, hidden: Tensor, spread: Spread) -> None:
        """Start gathering hidden [..., h] or [s/tp, ..., h]: at most one all-gather."""
        self._spread, self._work, self._tokens = spread, None, None
        self._flat = hidden.reshape(-1, hidden.shape[-1])
        if spread.sequence_parallel:
            group, part = spread.shard.tp_group, self._flat.contiguous()
            self._flat = part.new_empty(len(part) * group.size(), part.shape[1])
            parts = list(self._flat.chunk(group.size()))
            self._work = dist.all_gather(parts, part, group=group, async_op=True)

    def get(self) -> Tensor:
        """Return them in the plan's order, waiting for them at the first call."""
        if self._tokens is None:
            if self._work is not None:
                self._work.wait()
            self._tokens, self._flat = self._spread.plan.select(self._flat), None
        return self._tokens


class LinearGradients:
    """dX and dW of chunks of tokens; a chunk's dX is complete, dW is their sum, in fp32.

    Across ranks, dX is summed over the vocabulary's shards; under sequence parallelism each rank
    keeps its part of the sum. That runs under the last product of dW. Over fixed blocks dX is
    summed in fp32, in their order, and rounded once.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        spread: Spread,
        needs: tuple[bool, bool],
        main_grad: Tensor | None = None,
        *,
        is_final: bool = True,
    ) -> None:
        """Make room for what is needed of (dX, dW).

        Args:
            main_grad: where dW goes in the end; without it a new tensor is made.
            is_final: `results` are asked for; else `scaled` ones, by a number not known yet.
        """
        self._spread, self._main_grad, self._reduction = spread, main_grad, None
        self._dtype = hidden.dtype
        self._hidden = self._weight = None
        self._chunk_hidden = TreeSum(spread.shard.num_blocks)
        plan, wide = spread.plan, torch.promote_types(weight.dtype, torch.float32)
        if needs[0]:
            # One more row takes what padded rows write. What is scaled or summed later is rounded
            # then.
            shape = plan.num_tokens + plan.is_padded, hidden.shape[-1]
            is_rounded = is_final and not spread.shard.is_deterministic
            self._hidden = hidden.new_zeros(shape, dtype=hidden.dtype if is_rounded else wide)
        if needs[1]:
            is_direct = is_final and main_grad is not None and main_grad.dtype == wide
            self._weight = main_grad if is_direct else torch.empty_like(weight, dtype=wide)
            self._is_unset = not is_direct

    def add(
        self,
        grad_z: Tensor,
        tokens: SequenceTokens,
        weight: Tensor,
        rows: slice,
        block: Block,
        *,
        is_last: bool = False,
    ) -> None:
        """Add a chunk's share of one block; all blocks of a chunk in their order.

        Args:
            grad_z: [rows, block] in the inputs' dtype.
            weight: [V/tp, h].
            is_last: the chunk is the last.
        """
        if self._hidden is not None:
            grad = self._hidden.new_empty(len(grad_z), weight.shape[1])
            add_product_(grad, grad_z, block.rows_of(weight), overwrite=True)
            grad = self._chunk_hidden.add(grad)
            if grad is not None:
                self._hidden.index_copy_(0, self._spread.plan.order[rows], grad)
                if is_last:
                    self._reduction = self._reduce(self._hidden)
        if self._weight is not None:
            self._add_to_weight(block, grad_z.T, tokens.get()[rows])

    def _add_to_weight(self, block: Block, grad_z: Tensor, tokens: Tensor) -> None:
        share = self._weight[block.rows]
        total = aligned(share) if block.shard.is_deterministic else share
        add_product_(total, grad_z, tokens, overwrite=self._is_unset)
        if total is not share:
            share.copy_(total)
        if block.rows.stop == len(self._weight):
            self._is_unset = False

    def results(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (dX, dW), or None for what was not asked, in the inputs' shapes and dtypes."""
        grad_weight = self._weight_sum()
        if grad_weight is not None and self._main_grad is not None:
            if grad_weight is not self._main_grad:
                self._main_grad.add_(grad_weight)
            grad_weight = placeholder_grad(weight)
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return self._hidden_result(self._hidden, hidden), grad_weight

    def scaled(
        self, scale: Tensor, hidden: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return `results` times a number; overwrites these gradients."""
        grad_hidden, grad_weight = self._hidden, self._weight_sum()
        if grad_hidden is not None:
            if self._spread.shard.is_deterministic:  # the sum is scaled, not its parts
                self._reduction = self._reduce(grad_hidden, scale)
            else:
                self._reduction = self._reduce(grad_hidden.mul_(scale).to(hidden.dtype))
        if grad_weight is not None and self._main_grad is not None:
            self._main_grad.addcmul_(grad_weight, scale)
            grad_weight = placeholder_grad(weight)
        elif grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(weight.dtype)
        return self._hidden_result(grad_hidden, hidden), grad_weight

    def _weight_sum(self) -> Tensor | None:
        if self._weight is not None and self._is_unset:  # no token counts
            self._weight.zero_()
        return self._weight

    def _hidden_result(self, summand: Tensor | None, hidden: Tensor) -> Tensor | None:
        if summand is None:
            return None
        if self._reduction is None:  # no token counts on any rank
            return torch.zeros_like(hidden)
        return self._reduction.get().view(hidden.shape)

    def _reduce(
        self, summand: Tensor, scale: Tensor | None = None
    ) -> _Reduction | OrderedReduction:
        shard = self._spread.shard
        if not shard.is_deterministic:
            return _Reduction(summand, self._spread)
        return OrderedReduction(
            summand[: self._spread.plan.num_tokens],
            shard.tp_group,
            self._dtype,
            keep_part=self._spread.sequence_parallel,
            scale=scale,
        )


class _Reduction:
    """The sum of [N, h] over the vocabulary's shards, under way: one all-reduce, in place, or one
    reduce-scatter, none on one rank."""

    def __init__(self, summand: Tensor, spread: Spread) -> None:
        self._work, group = None, spread.shard.tp_group
        self._sum = summand[: spread.plan.num_tokens]
        if group is None:
            return
        if spread.sequence_parallel:
            parts = list(self._sum.chunk(group.size()))
            self._sum = torch.empty_like(parts[0])
            self._work = dist.reduce_scatter(self._sum, parts, group=group, async_op=True)
        else:
            self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def get(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._sum


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, overwrite: bool = False) -> None:
    """Add a @ b to `total`, summed in total's dtype; a and b may be narrower.

    On a GPU narrow factors go to the tensor cores as they are (torch >= 2.8), else widened.

    Args:
        overwrite: whatever total holds does not count.
    """
    beta = 0 if overwrite else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for start in range(0, len(b), _WIDENED_ROWS):
            rows = slice(start, start + _WIDENED_ROWS)
            total.addmm_(a[:, rows].to(total.dtype), b[rows].to(total.dtype), beta=beta)
            beta = 1


def placeholder_grad(weight: Tensor) -> Tensor:
    """Return what autograd is given for a gradient that lies in main_grad already, and say so.

    Megatron's hooks run when autograd delivers a gradient, then drop it. Where they add it after
    all (a weight that the embedding shares), it has to be zeros.
    """
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)
