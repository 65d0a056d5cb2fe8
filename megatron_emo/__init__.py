"""Megatron GPT pretraining with the EMO (earth mover distance) loss.

The names below need torch alone and are loaded at first use, so that tools which never touch a
tensor start without it; training lies in `megatron_emo.training`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_emo.loss.drop_in import EMOLoss
    from megatron_emo.loss.fused_linear import fused_linear_loss
    from megatron_emo.loss.statistics import LossOutput
    from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
    from megatron_emo.objectives import Objective, build_objective

__version__ = "0.1.0"
__all__ = [
    "EMOLoss",
    "LossOutput",
    "Objective",
    "__version__",
    "build_objective",
    "fused_linear_loss",
    "vocab_parallel_loss",
]

_HOME = {
    "EMOLoss": "megatron_emo.loss.drop_in",
    "LossOutput": "megatron_emo.loss.statistics",
    "Objective": "megatron_emo.objectives",
    "build_objective": "megatron_emo.objectives",
    "fused_linear_loss": "megatron_emo.loss.fused_linear",
    "vocab_parallel_loss": "megatron_emo.loss.vocab_parallel",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
