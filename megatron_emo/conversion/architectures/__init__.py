"""The architectures that can be converted: a module each, found by Hugging Face's model_type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_emo.conversion.architectures import gpt2, llama, opt
from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.mapping import Rule
from megatron_emo.conversion.settings import ModelSettings

_MODULES = {model_type: module for module in (llama, gpt2, opt) for model_type in module.TYPES}
SUPPORTED = tuple(_MODULES)


def settings_of_config(config: Any, where: str) -> ModelSettings:
    """Return the settings of a transformers config.

    Raises:
        ConversionError: an unknown model_type, or a setting that Megatron cannot express.
    """
    return _module(config.model_type, where).settings_of_config(config, where)


def config_values(settings: ModelSettings, where: str) -> dict[str, Any]:
    """Return the keyword arguments of the transformers config class of `settings.model_type`.

    Raises:
        ConversionError: a setting that this class cannot express.
    """
    return _module(settings.model_type, where).config_values(settings, where)


def rules_of(settings: ModelSettings) -> Sequence[Rule]:
    """Return the table of rules."""
    return _module(settings.model_type, "model").rules(settings)


def guess_model_type(settings: ModelSettings) -> str:
    """Return the model_type whose config class can hold what Megatron's arguments say."""
    if settings.learned_positions:
        return "opt" if settings.activation == "relu" else "gpt2"
    if settings.num_experts:
        return "mixtral"
    if settings.qk_layernorm:
        return "qwen3"
    return "qwen2" if settings.qkv_bias and not settings.linear_bias else "llama"


def _module(model_type: str, where: str) -> Any:
    if model_type not in _MODULES:
        raise ConversionError(
            f"{where}: model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(SUPPORTED)}"
        )
    return _MODULES[model_type]
