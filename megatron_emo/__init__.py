"""Megatron GPT pretraining with the EMO (earth mover distance) loss.

The loss is importable without Megatron; training lies in `megatron_emo.training`.
"""

from megatron_emo.loss.drop_in import EMOLoss
from megatron_emo.loss.vocab_parallel import LossOutput, vocab_parallel_loss
from megatron_emo.objectives import Objective, build_objective

__version__ = "0.1.0"
__all__ = [
    "EMOLoss",
    "LossOutput",
    "Objective",
    "__version__",
    "build_objective",
    "vocab_parallel_loss",
]
