"""Which tensors go into which file, and the lines that say how far a conversion is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence

DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "200MB", "1GiB" or a number.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: expected a size such as 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def split_into_shards[T](
    items: Iterable[T], num_bytes: Callable[[T], int], max_bytes: int
) -> list[list[T]]:
    """Return the items in runs of at most `max_bytes`; one that is larger has a run of its own."""
    shards: list[list[T]] = []
    filled = 0
    for item in items:
        size = num_bytes(item)
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


class Progress:
    """Says after each layer how much is done and how fast."""

    def __init__(self, layers: Sequence[int | None], say: Callable[[str], None]) -> None:
        self._num_layers = len({layer for layer in layers if layer is not None})
        self._say, self._start, self._bytes = say, time.monotonic(), 0
        self._layer: int | None = None

    def add(self, layer: int | None, num_bytes: int) -> None:
        """Count an item; the items of a layer come one after another."""
        if layer != self._layer and self._layer is not None:
            self._report(f"layer {self._layer + 1}/{self._num_layers}")
        self._layer = layer
        self._bytes += num_bytes

    def skip(self, name: str) -> None:
        """Say that a file was finished before."""
        self._say(f"{name}: kept from before")

    def end(self) -> None:
        """Report the whole."""
        self._report("all tensors")

    def _report(self, what: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        megabytes = self._bytes / 1e6
        self._say(f"{what}: {megabytes:,.1f} MB, {megabytes / seconds:,.0f} MB/s")
