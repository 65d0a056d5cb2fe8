"""Master weights out of the buckets in which the distributed optimizer saves them by default.

A bucket is one flat fp32 tensor with the parameters of one model-parallel rank in it, each at a
multiple of 64, and nothing that says whose numbers are whose. What does say it is the weights
themselves: each is stored beside, in pieces as the ranks held them, and such a piece is its master
rounded. So a master is looked for among the places where a parameter of its size can lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_emo.torch_dist import TensorReader

_BUCKET = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\..*\.bucket_idx_\d+\.param")
_PROBE = 256
"""Numbers by which places are told apart before one is read whole."""
MAX_QUANTISATION_ERROR = 0.2
"""Of the root mean square of a weight: e4m3 gives 0.03, NVFP4 0.1, another weight 1.4."""


class Place(NamedTuple):
    """Where a master may begin."""

    bucket: str
    start: int


class MasterBuckets(TensorReader):
    """Finds master weights in a checkpoint of any tensor, pipeline and data parallel layout.

    The pieces of one weight and one bucket are in memory at a time. What is found is kept, so that
    a weight that is read twice is looked for once.
    """

    @property
    def is_empty(self) -> bool:
        return not self._buckets

    def find(self, key: str, index: tuple[int, ...], is_quantised: bool) -> bool:
        """Return whether weight[index] has a master here, and only one.

        Args:
            is_quantised: whether the stored weight may be FP8's approximation of the master; else
                it has to be the master rounded, bit by bit.
        """
        return all(self._locate(key, at, is_quantised) for at in self._pieces(key, index))

    def read_master(self, key: str, index: tuple[int, ...]) -> Tensor:
        """Return the master of weight[index] in fp32, after `find`."""
        depth = len(index)
        result = torch.empty(self.shapes[key][depth:], dtype=torch.float32)
        for chunk in self._pieces(key, index):
            place = self._found[key, tuple(chunk.offsets)]
            if place is None:
                raise KeyError(f"{key} at {tuple(chunk.offsets)}: no master was found")
            numbers = self._read_range(place, chunk.sizes.numel()).reshape(chunk.sizes)
            at = tuple(n - o for n, o in zip(index, chunk.offsets, strict=False))
            spans = zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)
            result[tuple(slice(start, start + size) for start, size in spans)] = numbers[at]
        return result

    @cached_property
    def _buckets(self) -> dict[str, list[ChunkStorageMetadata]]:
        """The pieces of each bucket, in their order."""
        return {
            key: sorted(item.chunks, key=lambda chunk: chunk.offsets[0])
            for key, item in self._items.items()
            if _BUCKET.fullmatch(key) and item.properties.dtype == torch.float32
        }

    @cached_property
    def _found(self) -> dict[tuple[str, tuple[int, ...]], Place | None]:
        return {}

    @cached_property
    def _probes(self) -> dict[tuple[Place, int], Tensor]:
        return {}

    def _pieces(self, key: str, index: tuple[int, ...]) -> Iterator[ChunkStorageMetadata]:
        for chunk in self._items[key].chunks:
            bounds = zip(index, chunk.offsets, chunk.sizes, strict=False)
            if all(start <= number < start + size for number, start, size in bounds):
                yield chunk

    def _locate(self, key: str, chunk: ChunkStorageMetadata, is_quantised: bool) -> Place | None:
        name = key, tuple(chunk.offsets)
        if name not in self._found:
            stored = self._read_piece(key, chunk.offsets, chunk.sizes).flatten()
            self._found[name] = self._search(stored, is_quantised)
        return self._found[name]

    def _search(self, stored: Tensor, is_quantised: bool) -> Place | None:
        """Return the one place whose numbers `stored` is made of, None without or with several."""
        same, near = [], []
        for place in self._places(len(stored)):
            probe = self._probe(place, min(_PROBE, len(stored)))
            if _error(stored[:_PROBE], probe) > MAX_QUANTISATION_ERROR:
                continue
            master = self._read_range(place, len(stored))
            if torch.equal(master.to(stored.dtype), stored):
                if not any(torch.equal(master, other) for _, other in same):
                    same.append((place, master))
            elif is_quantised and _error(stored, master) <= MAX_QUANTISATION_ERROR:
                near.append(place)
        candidates = {place for place, _ in same} or set(near)
        return candidates.pop() if len(candidates) == 1 else None

    def _places(self, size: int) -> Iterator[Place]:
        """Where a parameter of this size can lie, or either half of a gated one of twice the size.

        Pieces end where parameters end, and at the bounds of ranks.
        """
        for key, chunks in self._buckets.items():
            starts = [chunk.offsets[0] for chunk in chunks]
            ends = {chunk.offsets[0] + chunk.sizes[0] for chunk in chunks}
            for start in starts:
                if start + size in ends:
                    yield Place(key, start)
                if start + 2 * size in ends:
                    yield from (Place(key, start), Place(key, start + size))

    def _probe(self, place: Place, size: int) -> Tensor:
        if (place, size) not in self._probes:
            self._probes[place, size] = self._read_range(place, size).clone()
        return self._probes[place, size]

    def _read_range(self, place: Place, size: int) -> Tensor:
        """Return bucket[start : start + size]."""
        bucket, start = place
        parts = []
        for chunk in self._buckets[bucket]:
            first = chunk.offsets[0]
            if first < start + size and start < first + chunk.sizes[0]:
                piece = self._read_piece(bucket, chunk.offsets, chunk.sizes)
                parts.append(piece[max(start - first, 0) : start + size - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _error(stored: Tensor, master: Tensor) -> float:
    """Return the root mean square difference over that of the master; 0 / 0 is 0."""
    difference = (stored.float() - master).norm().item()
    return 0.0 if difference == 0.0 else difference / max(master.norm().item(), 1e-30)
