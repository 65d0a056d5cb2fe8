"""The same bits however many ranks share the vocabulary.

A floating-point sum depends on its order, and a library of products chooses its order by shape and
alignment. So the padded vocabulary is cut into a fixed number of equal blocks, whichever ranks hold
them, and what would depend on a rank's part depends on blocks alone:

    products          one per block, from tensors of the same shape, strides and alignment
    statistics        one set per block, gathered, merged in the order of blocks
    sums over the     added in the order of a balanced binary tree over the blocks; a rank holds a
    vocabulary (dX)   whole branch of it, so that ranks exchange one partial sum each, in fp32

A tree needs a power of two blocks, and as many ranks at most. Without fixed blocks a rank's part is
one block, and the same code runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.loss.statistics import Shard

_ALIGNMENT = {"cpu": 64, "cuda": 256}
"""Bytes; what new tensors have at least, and more than a product looks at."""


class Block(NamedTuple):
    """A run of this rank's part of the vocabulary."""

    shard: Shard
    """Where it lies, as if it were a rank's part."""
    rows: slice
    """Its rows of the rank's [V/tp, ...]."""

    def rows_of(self, table: Tensor) -> Tensor:
        """Return its rows of a rank's [V/tp, ...], to be read: a copy where fixed blocks need one
        to lie as they would on another rank."""
        return aligned(table[self.rows]) if self.shard.is_deterministic else table[self.rows]

    def columns_of(self, logits: Tensor) -> Tensor:
        """Return its columns of a rank's [n, V/tp], to be read; of fixed blocks a copy."""
        if not self.shard.is_deterministic:
            return logits
        return logits[:, self.rows].clone(memory_format=torch.contiguous_format)


def blocks_of(shard: Shard) -> list[Block]:
    """Return the blocks of a rank's part, in order."""
    size = shard.partition_vocab_size // shard.num_blocks
    starts = range(0, shard.partition_vocab_size, size)
    return [
        Block(
            shard._replace(
                vocab_start_index=shard.vocab_start_index + start,
                partition_vocab_size=size,
                num_blocks=1,
            ),
            slice(start, start + size),
        )
        for start in starts
    ]


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of it where x begins at no round address."""
    return x if x.data_ptr() % _ALIGNMENT.get(x.device.type, 256) == 0 else x.clone()


class TreeSum:
    """The sum of a power of two of tensors given one after the other, added as `tree_sum` adds
    them; holds at most one partial sum per level of the tree. Overwrites what it is given."""

    def __init__(self, count: int) -> None:
        self._count, self._given = count, 0
        self._partial: list[Tensor] = []

    def add(self, summand: Tensor) -> Tensor | None:
        """Return the sum at the last of them, then begin anew; None before."""
        self._given += 1
        branches = self._given
        while branches % 2 == 0:  # a branch is complete: join it with its left neighbour
            summand = self._partial.pop().add_(summand)
            branches //= 2
        if self._given < self._count:
            self._partial.append(summand)
            return None
        self._given = 0
        return summand


def tree_sum(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, a power of two: neighbours first, then neighbouring
    sums."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


class OrderedReduction:
    """The tree's sum of [N, h] over ranks, under way: one all-to-all in the summands' dtype, then,
    where every rank wants all of it, one all-gather of the rounded sum. None on one rank."""

    def __init__(
        self,
        summand: Tensor,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        *,
        keep_part: bool,
        scale: Tensor | None = None,
    ) -> None:
        """Start it.

        Args:
            dtype: of the result.
            keep_part: return this rank's part [N/tp, h] alone, as a reduce-scatter does.
            scale: a number the sum is multiplied with before it is rounded.
        """
        self._group, self._dtype, self._scale = group, dtype, scale
        self._is_gathered = group is not None and not keep_part
        self._num_rows, self._work, self._parts = len(summand), None, summand[None]
        if group is None:
            return
        padding = -len(summand) % group.size()
        sent = torch.nn.functional.pad(summand, (0, 0, 0, padding)).contiguous()
        self._parts = sent.new_empty(group.size(), len(sent) // group.size(), sent.shape[1])
        received = self._parts.view_as(sent)
        self._work = dist.all_to_all_single(received, sent, group=group, async_op=True)

    def get(self) -> Tensor:
        """Return the sum, [N, h] or [N/tp, h]; may overwrite the summand."""
        if self._work is not None:
            self._work.wait()
        total = tree_sum(self._parts)
        if self._scale is not None:
            total = total.mul_(self._scale)
        total = total.to(self._dtype)
        if not self._is_gathered:
            return total
        whole = total.new_empty(self._group.size(), *total.shape)
        dist.all_gather(list(whole.unbind()), total, group=self._group)
        return whole.flatten(0, 1)[: self._num_rows]
