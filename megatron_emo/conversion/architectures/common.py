"""What the tables of several architectures are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_emo.conversion.mapping import SAME, Rule


def unexpected_values(config: Any, expected: Mapping[str, Any]) -> list[str]:
    """Return in words which values of a config are not those that can be converted."""
    return [
        f"{name} {getattr(config, name)} (expected {value})"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]


def layer_norm_rules(megatron: str, hf: str) -> list[Rule]:
    """Return the rules of a norm with weight and bias, whose names follow the prefixes given."""
    names = ("weight", "bias")
    return [Rule(megatron + name, (hf + name,), ("hidden",), SAME) for name in names]
