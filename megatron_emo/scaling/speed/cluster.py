"""What a machine sustains, and how long its products, passes and collectives take: a cost model.

A product of [m, k] and [k, n] takes its start plus the longer of 2 m k n / rate and its bytes over
the memory's bandwidth. A collective takes steps of a fixed latency plus bytes over a bandwidth,
the alpha-beta model, with as many steps and bytes as recursive halving and doubling has.

References:
    Thakur, Rabenseifner, Gropp (2005), Optimization of collective communication operations in
    MPICH.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_emo.scaling.counts.devices import GIB, Device

_TILE = 128
"""Rows and columns of a product that one multiprocessor forms at a time."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's nominal rates that are sustained, and what starts cost."""

    products: float = 0.80
    """Large bf16 products: 790 of 989 TFLOP/s, measured on an H200 by others."""
    fp8_products: float = 0.66
    """Large fp8 products, casts included: 1.3 of 1.98 PFLOP/s; assumed."""
    attention: float = 0.50
    """Fused attention, of the same peak; assumed."""
    memory: float = 0.90
    """A copy: 4.3 of 4.8 TB/s, measured on an H200 by others."""
    links: float = 0.80
    """Large collectives, within and between nodes; assumed."""
    start_s: float = 3e-6
    """Of one kernel, seconds; assumed."""
    link_latency_s: float = 5e-6
    """Of a step of a collective within a node, seconds; assumed."""
    network_latency_s: float = 15e-6
    """The same between nodes; assumed."""

    def __post_init__(self) -> None:
        for name in ("products", "fp8_products", "attention", "memory", "links"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"assume.{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in ("start_s", "link_latency_s", "network_latency_s"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"assume.{name}: expected 0 to 1, got {getattr(self, name)}")


def _check_positive(name: str, value: object, or_zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value <= sys.float_info.max or or_zero and value == 0):
        raise ValueError(f"{name}: expected a number above 0, got {value!r:.40}")


@dataclass(frozen=True)
class Link:
    """From a rank to the others of its group."""

    latency: float
    """Seconds a step."""
    bandwidth: float
    """Bytes/s that a rank sends, in one direction."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the bandwidth, by operation: all_reduce, all_gather, reduce_scatter, send; else 1."""

    def __post_init__(self) -> None:
        _check_positive("latency", self.latency, or_zero=True)
        _check_positive("bandwidth", self.bandwidth)
        for name, share in self.shares.items():
            _check_positive(f"shares.{name}", share)

    def seconds(self, operation: str, num_steps: float, num_bytes: float) -> float:
        """Return the time of that many steps and bytes sent by a rank."""
        return num_steps * self.latency + num_bytes / (
            self.bandwidth * self.shares.get(operation, 1)
        )


@dataclass(frozen=True)
class Cluster:
    """One rank of a machine, in FLOP/s, bytes, bytes/s and seconds, and its links."""

    name: str
    flops: float
    """Of large products."""
    attention_flops: float
    memory_bandwidth: float
    start_s: float
    """Of one product or pass."""
    memory: float | None
    """None: not known, and nothing is dropped for it."""
    ranks_per_node: int
    within: Link
    between: Link
    itemsize: int = 2
    """Of weights and activations."""
    num_units: int | None = None
    """That share out the tiles of a product; None: sizes of a product do not matter."""
    table_flops: float | None = None
    """Of products with an fp8 cost table; None: as others."""
    loss_flops: float | None = None
    """Of the output layer's products where layers are narrower; None: as others."""
    is_cpu: bool = False
    cores: int | None = None
    """Of a node without GPUs, which its ranks share."""
    together: tuple[float, float, float] | None = None
    """flops, memory_bandwidth, start_s of a rank while another works too; None: the same."""
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("flops", "attention_flops", "memory_bandwidth", "ranks_per_node"):
            _check_positive(name, getattr(self, name))
        _check_positive("start_s", self.start_s, or_zero=True)
        if self.memory is not None:
            _check_positive("memory", self.memory)
        for name, value in zip(
            ("flops", "bandwidth", "start_s"), self.together or (), strict=False
        ):
            _check_positive(f"together.{name}", value, or_zero=name == "start_s")

    def of_ranks(self, ranks: int) -> Cluster:
        """Return the rates of each of that many ranks at work at once.

        GPUs do not share. On a CPU two or more have the rates that were measured together, and more
        ranks than cores get their part of one.
        """
        if not self.is_cpu:
            return self
        here = min(ranks, self.ranks_per_node)
        crowd = max(1.0, here / self.cores) if self.cores else 1.0
        flops, bandwidth, start = self.flops, self.memory_bandwidth, self.start_s
        if here > 1 and self.together is not None:
            flops, bandwidth, start = self.together
        share = flops / self.flops
        return replace(
            self,
            flops=flops / crowd,
            attention_flops=self.attention_flops * share / crowd,
            memory_bandwidth=bandwidth / crowd,
            start_s=start * crowd,
            together=None,
        )

    def product(self, m: float, n: float, k: float, flops: float | None = None) -> float:
        """Return seconds of one product of [m, k] and [k, n]."""
        rate = flops or self.flops
        if self.num_units:
            tiles = math.ceil(m / _TILE) * math.ceil(n / _TILE)
            waves = math.ceil(tiles / self.num_units)
            rate *= max(1, tiles) / (max(1, waves) * self.num_units)
            rate *= m / (math.ceil(m / _TILE) * _TILE) * n / (math.ceil(n / _TILE) * _TILE)
        moved = self.itemsize * (m * k + k * n + m * n)
        return self.start_s + max(2.0 * m * n * k / rate, moved / self.memory_bandwidth)

    def passes(self, num_bytes: float, starts: float = 0) -> float:
        """Return seconds of reading and writing so many bytes in so many kernels."""
        return starts * self.start_s + num_bytes / self.memory_bandwidth

    def link(self, ranks: int, stride: int) -> Link:
        """Return the link of a group of every `stride`-th rank.

        Within a node it is the node's. Beyond, what leaves a node goes over the cards of all its
        members there, but no faster than within.
        """
        if ranks * stride <= self.ranks_per_node:
            return self.within
        members = max(1, self.ranks_per_node // stride)
        bandwidth = min(self.within.bandwidth, members * self.between.bandwidth)
        return replace(self.between, bandwidth=bandwidth)

    def all_reduce(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Return seconds; num_bytes: of the tensor, which every rank has."""
        if ranks == 1:
            return 0.0
        sent = 2 * num_bytes * (ranks - 1) / ranks
        return self.link(ranks, stride).seconds("all_reduce", 2 * _steps(ranks), sent)

    def all_gather(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Return seconds; num_bytes: of the whole result."""
        if ranks == 1:
            return 0.0
        sent = num_bytes * (ranks - 1) / ranks
        return self.link(ranks, stride).seconds("all_gather", _steps(ranks), sent)

    def reduce_scatter(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Return seconds; num_bytes: of the whole input."""
        if ranks == 1:
            return 0.0
        sent = num_bytes * (ranks - 1) / ranks
        return self.link(ranks, stride).seconds("reduce_scatter", _steps(ranks), sent)

    def all_to_all(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Return seconds; num_bytes: of a rank, its own part included."""
        if ranks == 1:
            return 0.0
        link = self.link(ranks, stride)
        # Nobody reduces on the way: each byte for another node passes one card.
        if ranks * stride > self.ranks_per_node:
            link = replace(link, bandwidth=min(link.bandwidth, self.between.bandwidth))
        return link.seconds("all_to_all", ranks - 1, num_bytes * (ranks - 1) / ranks)

    def send(self, num_bytes: float, stride: int) -> float:
        """Return seconds to the rank that is `stride` further, which is on another node where the
        stride is a node's size."""
        link = self.within if 2 * stride <= self.ranks_per_node else self.between
        return link.seconds("send", 1, num_bytes)


def _steps(ranks: int) -> int:
    """Of halving or doubling, one way."""
    return math.ceil(math.log2(ranks))


def cluster_of(device: Device, precision: str, assumed: Efficiency) -> Cluster:
    """Return what GPUs of a device sustain, by its datasheet and assumed shares.

    Args:
        precision: bf16, or fp8 for the products of layers; the output layer's stay bf16.

    Raises:
        ValueError: a precision that the device does not have.
    """
    bf16 = device.peak_flops("bf16") * assumed.products
    fp8 = (device.fp8_flops or 0) * assumed.fp8_products or bf16
    device.peak_flops(precision)
    links = assumed.links
    return Cluster(
        name=device.name,
        flops=fp8 if precision == "fp8" else bf16,
        attention_flops=device.peak_flops("bf16") * assumed.attention,
        memory_bandwidth=device.bandwidth * assumed.memory,
        start_s=assumed.start_s,
        memory=device.memory,
        ranks_per_node=device.gpus_per_node,
        within=Link(assumed.link_latency_s, device.link_bandwidth * links),
        between=Link(assumed.network_latency_s, device.network_bandwidth * links),
        num_units=device.num_units,
        table_flops=fp8,
        loss_flops=bf16,
        assumptions=_assumptions(device, precision, assumed),
    )


def _assumptions(device: Device, precision: str, assumed: Efficiency) -> tuple[str, ...]:
    peak = device.peak_flops(precision) / 1e12
    share = assumed.fp8_products if precision == "fp8" else assumed.products
    return (
        f"products: {share:.0%} of {peak:,.4g} TFLOP/s ({precision}, {device.source}), "
        f"attention {assumed.attention:.0%} of bf16's peak; tiles of {_TILE} x {_TILE} on "
        f"{device.num_units} multiprocessors, {assumed.start_s * 1e6:g} us a kernel",
        f"memory: {assumed.memory:.0%} of {device.bandwidth / 1e12:.4g} TB/s; "
        f"{device.memory / GIB:.1f} GiB",
        f"links within a node of {device.gpus_per_node} GPUs: {assumed.links:.0%} of "
        f"{device.link_bandwidth / 1e9:g} GB/s one way, {assumed.link_latency_s * 1e6:g} us a step",
        f"network: {assumed.links:.0%} of {device.network_bandwidth / 1e9:g} GB/s a GPU one way "
        f"({device.network_source}), {assumed.network_latency_s * 1e6:g} us a step; no congestion",
        "collectives: steps of halving and doubling, 2 log2 n an all-reduce, and its bytes, "
        "2 (n-1)/n of the tensor; between nodes over the cards of all members of a group in a node",
    )
