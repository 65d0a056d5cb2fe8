"""Nominal rates and memory of devices, as their vendors state them: dense, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class Device:
    """One GPU, in FLOP/s, bytes and bytes/s."""

    name: str
    """As torch.cuda.get_device_name() says it."""
    bf16_flops: float
    fp8_flops: float | None
    """None where it has none."""
    memory: float
    bandwidth: float
    """Of its memory."""
    link_bandwidth: float
    """To the other GPUs of its node, in one direction."""
    source: str
    network_bandwidth: float = 50e9
    """To other nodes, in one direction, of one GPU's share of its node's network cards."""
    num_units: int = 132
    """Multiprocessors, which share out the tiles of a product."""
    gpus_per_node: int = 8
    network_source: str = "assumed: 400 Gbit/s a GPU"

    @property
    def rates(self) -> dict[str, float]:
        """FLOP/s by precision, of those that it has among PRECISIONS."""
        rates = {"bf16": self.bf16_flops, "fp8": self.fp8_flops}
        return {name: rate for name, rate in rates.items() if rate}

    def peak_flops(self, precision: str) -> float:
        """Return its FLOP/s in a precision.

        Raises:
            ValueError: a precision that it does not have.
        """
        if precision not in self.rates:
            raise ValueError(
                f"precision: expected one of {[*self.rates]} of {self.name}, got {precision!r}"
            )
        return self.rates[precision]


DEVICES = {
    "a100-40gb": Device(
        *("NVIDIA A100-SXM4-40GB", 312e12, None, 40e9, 1.555e12, 300e9, "A100 datasheet"),
        *(25e9, 108, 8, "DGX A100 datasheet: 8 ports of 200 Gbit/s for 8 GPUs"),
    ),
    "a100": Device(
        *("NVIDIA A100-SXM4-80GB", 312e12, None, 80e9, 2.039e12, 300e9, "A100 datasheet"),
        *(25e9, 108, 8, "DGX A100 datasheet: 8 ports of 200 Gbit/s for 8 GPUs"),
    ),
    "h100": Device(
        *("NVIDIA H100 80GB HBM3", 989.4e12, 1978.9e12, 80e9, 3.35e12, 450e9, "H100 datasheet"),
        *(50e9, 132, 8, "DGX H100 datasheet: 8 ports of 400 Gbit/s for 8 GPUs"),
    ),
    "h200": Device(
        *("NVIDIA H200", 989.4e12, 1978.9e12, 141e9, 4.8e12, 450e9, "H200 datasheet"),
        *(50e9, 132, 8, "DGX H200 datasheet: 8 ports of 400 Gbit/s for 8 GPUs"),
    ),
    "b200": Device(
        *("NVIDIA B200", 2250e12, 4500e12, 180e9, 7.7e12, 900e9, "DGX B200 datasheet, per GPU"),
        *(50e9, 148, 8, "DGX B200 datasheet: 8 ports of 400 Gbit/s for 8 GPUs"),
    ),
    "l40s": Device(
        *("NVIDIA L40S", 362e12, 733e12, 48e9, 864e9, 32e9, "L40S datasheet; PCIe 4.0 x16"),
        *(25e9, 142, 8, "assumed: 200 Gbit/s a GPU"),
    ),
    "mi300x": Device(
        *("AMD Instinct MI300X", 1307.4e12, 2614.9e12, 192e9, 5.3e12, 448e9, "MI300X datasheet"),
        *(50e9, 304, 8, "assumed: 400 Gbit/s a GPU"),
    ),
}


def find_device(name: str) -> Device:
    """Return the device of a key of DEVICES.

    Raises:
        ValueError: none of that name.
    """
    if name not in DEVICES:
        raise ValueError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


def device_of_gpu(gpu: str) -> Device | None:
    """Return the device that torch.cuda.get_device_name() calls so, None for others.

    The whole name counts: H200 NVL and H100 PCIe are slower than those with the shorter names, and
    a MIG slice adds its size to the name of its GPU.
    """
    return next((device for device in DEVICES.values() if device.name == gpu), None)
