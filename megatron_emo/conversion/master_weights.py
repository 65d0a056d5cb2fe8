"""The fp32 master weights that Megatron's optimizers save beside the weights of a model.

Where a run keeps its weights in bf16 or FP8, these are the numbers it trains. Read from the files
of runs of megatron-core 0.19.2, and for the third from the source of earlier versions:

| run | key | shape |
|---|---|---|
| without --use-distributed-optimizer | optimizer.state.fp32_param.KEY | the weight's |
| --dist-ckpt-optim-fully-reshardable | optimizer.state.param.KEY | the weight's |
| --use-distributed-optimizer before 0.14 | optimizer.state.fp32_param.KEY | a rank's part flat |
| --use-distributed-optimizer alone | optimizer.distributed....bucket_idx_N.param | flat, no names |

KEY is the weight's own; several chained optimizers may put chained_N. in front. The last form says
nowhere which numbers are whose: see `master_buckets`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.master_buckets import MasterBuckets

_NAMED = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")


class MasterWeights:
    """The master copies in a checkpoint, under the keys of the weights."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._reader = folder, MasterBuckets(folder)
        matches = [match for key in self._reader.shapes if (match := _NAMED.fullmatch(key))]
        self._keys = {
            match[1]: match[0]
            for match in matches
            if self._reader.dtypes[match[0]] in (torch.float32, torch.float64)
        }

    @property
    def are_in_buckets(self) -> bool:
        """Whether there are some without names."""
        return not self._reader.is_empty

    def has_named(self, key: str) -> bool:
        """Return whether there is a copy with the name of a weight; nothing is read."""
        return key in self._keys

    def has(self, key: str, index: tuple[int, ...], *, is_quantised: bool) -> bool:
        """Return whether there is a copy of weight[index]; in buckets it is looked for.

        Args:
            is_quantised: see `MasterBuckets.find`.
        """
        return self.has_named(key) or self._reader.find(key, index, is_quantised)

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """Return the copy of weight[index] that `has` said there is, in fp32.

        Raises:
            ConversionError: a shape that is neither the weight's nor that of flat parts of it.
        """
        if not self.has_named(key):
            return self._reader.read_master(key, index)
        master, shape = self._keys[key], self._reader.shapes[key]
        found = self._reader.shapes[master]
        if found == shape:
            return self._reader.read(master, index)
        grid = found[:-1]
        is_grid = len(grid) == len(shape) and all(
            size % parts == 0 for size, parts in zip(shape, grid, strict=True)
        )
        if not is_grid or math.prod(found) != math.prod(shape):
            raise ConversionError(
                f"checkpoint {self._folder}: {master} has shape {list(found)}, expected "
                f"{list(shape)}, that of {key}, or flat parts of it"
            )
        # One part a layer: then the parts of the others are left where they are.
        depth = len(index) if grid[: len(index)] == shape[: len(index)] else 0
        parts = self._reader.read(master, index[:depth])
        return _joined(parts, grid[depth:], shape[depth:])[index[depth:]]


def _joined(parts: Tensor, grid: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return the tensor [*shape] that was cut along a grid, each part of it stored flat."""
    local = [size // count for size, count in zip(shape, grid, strict=True)]
    rank = len(grid)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    return parts.reshape(*grid, *local).permute(order).reshape(shape)
