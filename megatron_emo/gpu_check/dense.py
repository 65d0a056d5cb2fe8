"""The losses with every [N, V] tensor formed, by autograd: the truth in float64, and in float32
what a user writes without this package.

`reference` holds a [V, V] matrix of costs; this holds the rows of the given targets alone, so that
it reaches real vocabulary sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATIO_EPS = 1e-10


def dense_loss(
    logits: Tensor, target: Tensor, unit_embedding: Tensor | None, objective: str
) -> Tensor:
    """Return the loss [N] of logits [N, V], in fp32 or the logits' wider dtype.

    Args:
        target: [N].
        unit_embedding: [V, D] rows of norm 1 or 0, on the logits' device; None for mle.
        objective: mle or emo1.
    """
    if objective not in ("mle", "emo1"):
        raise ValueError(f"objective: expected mle or emo1, got {objective!r}")
    log_q = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    m = -log_q.gather(1, target[:, None])[:, 0]
    if objective == "mle":
        return m
    unit = unit_embedding.to(log_q.dtype)
    cost = (1.0 - unit[target] @ unit.T).scatter(1, target[:, None], 0.0)
    d = (log_q.exp() * cost).sum(dim=1)
    return 0.5 * (m + (m / (d + RATIO_EPS)).detach() * d)
