"""`EMOLoss`: the call of the PyPI package of that name, over this package's loss."""

from __future__ import annotations

from torch import Tensor

from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import build_objective

_WEIGHT_MAX = 3.0
"""The cap EMOLoss 0.0.2 and 0.0.3 put on mode 1's ratio."""


def EMOLoss(
    logits: Tensor,
    labels: Tensor,
    cost_embedding: Tensor,
    ignore_index: int = -100,
    mode: int = 1,
) -> Tensor:
    """Return the mean EMO loss over the shifted tokens that count; values as in EMOLoss 0.0.3.

    Position i of the logits is scored against label i + 1. What differs from the released function:
    statistics in fp32 whatever the logits' dtype, any `ignore_index` works, zero rows of the table
    cost 1 instead of NaN, the table never receives gradient, and a batch without counted tokens
    gives 0.

    Args:
        logits: [batch, seq, V], fp64, fp32, bf16 or fp16; gradient flows to them alone.
        labels: [batch, seq] token ids, or `ignore_index`.
        cost_embedding: [V, D] of any width, normalised here.
        mode: 1 puts the weight on the cross-entropy (emo1 capped at 3), 2 on the expected cost
            (emo2).

    Raises:
        ValueError: another mode, or labels outside [0, V) that are not `ignore_index`.
    """
    if mode not in (1, 2):
        raise ValueError(f"mode: expected 1 or 2, got {mode!r}")
    objective = (
        build_objective("emo1", weight_max=_WEIGHT_MAX) if mode == 1 else build_objective("emo2")
    )
    target = labels[:, 1:]
    counted = target != ignore_index
    loss = vocab_parallel_loss(
        logits[:, :-1], target, objective, cost_embedding=cost_embedding, loss_mask=counted
    ).loss
    return loss.sum() / counted.sum().clamp(min=1)
