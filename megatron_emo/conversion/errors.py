"""What a conversion refuses; each message names the tensor, setting or file."""

from __future__ import annotations


class ConversionError(ValueError):
    """Weights, files or settings that cannot be converted without loss."""


class UnsupportedModelError(ConversionError):
    """A model that one of the two sides cannot express."""

    def __init__(self, where: str, problems: list[str], supported: str) -> None:
        found = "; ".join(problems)
        super().__init__(f"{where}: found {found}; supported: {supported}")
