"""How long a path must take on a GPU: its products and its passes over [N, V], added up.

A model, not a measurement: nothing overlaps, every product runs at the device's sustained rate, and
what is smaller than [N, V] costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Rates of one GPU, in FLOP/s and bytes/s."""

    nominal_flops: float
    """bf16, dense, by the vendor."""
    flops: float
    """bf16, what large products sustain."""
    fp8_flops: float
    nominal_bandwidth: float
    """By the vendor."""
    bandwidth: float
    """What a copy sustains."""


DEVICES = {
    # flops and bandwidth were measured on an H200; its fp8 rate is assumed.
    "H200": Device(989e12, 790e12, 1.3e15, 4.8e12, 4.3e12),
    # The same chip with another memory, for which the same share of the nominal rate is assumed.
    "H100 SXM": Device(989e12, 790e12, 1.3e15, 3.35e12, 3.0e12),
}

_NAMES = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100 SXM"}
"""As torch.cuda.get_device_name() says them."""

PRODUCTS = {"logits": 3, "recompute": 4, "forward": 3}
"""Of N h V multiplications; dX, dW and the logits, which recompute forms twice."""

COST_PRODUCTS = {"logits": 1, "recompute": 2, "forward": 1}
"""Of U D V multiplications: cost rows of the distinct targets."""

LOGITS_BYTES = 6
"""Per logit of 2 bytes: written, read for the statistics, and read once more for the gradient that
overwrites it (whose own bytes are the products')."""

COST_BYTES = {"logits": 6, "recompute": 8, "forward": 6}
"""Per entry of the cost rows, of 2 bytes: written once and read twice, or written and read twice
over."""


@dataclass(frozen=True)
class Prediction:
    """One repetition of a path on one device, in milliseconds."""

    products: float
    """Of hidden states, weight and gradients."""
    cost_products: float
    traffic: float

    @property
    def total(self) -> float:
        return self.products + self.cost_products + self.traffic


def find_device(device_name: str) -> Device | None:
    """Return the rates of the GPU torch.cuda.get_device_name() names, None for others."""
    name = _NAMES.get(device_name)
    return None if name is None else DEVICES[name]


def predict(
    device: Device,
    path: str,
    *,
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    cost_dim: int = 0,
    num_distinct: int = 0,
    table: str = "",
) -> Prediction:
    """Return what the path takes in bf16; without distinct targets, what MLE takes.

    Args:
        path: logits, recompute or forward.
        vocab_size: of this rank.
        table: fp8 for products of cost rows at that rate.
    """
    rate = device.fp8_flops if table == "fp8" else device.flops
    product = 2.0 * num_tokens * hidden_size * vocab_size / device.flops
    cost_product = 2.0 * num_distinct * cost_dim * vocab_size / rate
    traffic = vocab_size * (num_tokens * LOGITS_BYTES + num_distinct * COST_BYTES[path])
    return Prediction(
        products=1e3 * PRODUCTS[path] * product,
        cost_products=1e3 * COST_PRODUCTS[path] * cost_product,
        traffic=1e3 * traffic / device.bandwidth,
    )


def useful_flop(num_tokens: int, vocab_size: int, hidden_size: int) -> float:
    """Return 6 N h V: what logits, dX and dW take, whatever a variant spends beside them."""
    return 6.0 * num_tokens * hidden_size * vocab_size
