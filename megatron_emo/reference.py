"""Every objective on full logits, equation by equation, by autograd: the truth for the fast paths.

Slow and memory-hungry on purpose; written independently of `objectives` and `loss`, and imported
only by tests. Equation numbers of the paper could not be checked, so equations are written out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """Per-token values [...]; gradient flows through `loss` alone as the objective defines it."""

    loss: Tensor
    mle_loss: Tensor
    emo_loss: Tensor
    entropy: Tensor


def cost_matrix(cost_embedding: Tensor) -> Tensor:
    """Return C [V, V], C_ij = 1 - cos(E_i, E_j); zero rows cost 1 to all others, the diagonal is
    0."""
    norms = cost_embedding.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, cost_embedding / torch.where(norms > 0, norms, 1.0), 0.0)
    cost = 1.0 - unit @ unit.T
    cost.fill_diagonal_(0.0)
    return cost


def reference_loss(
    logits: Tensor,
    target: Tensor,
    name: str,
    cost_embedding: Tensor | None = None,
    *,
    loss_mask: Tensor | None = None,
    weight_max: float = float("inf"),
    half: bool | None = None,
    detach_target: bool = False,
    ratio_eps: float = 1e-10,
    emo_scale: float = 1.0,
    eta: float = 0.5,
    gamma: float | None = None,
    weight_min: float = 0.2,
    mixing_ratio: float = 0.5,
) -> ReferenceOutput:
    """Return the objective of each token on full logits [..., V] with targets [...].

    Masked tokens (loss_mask 0) give 0 and no gradient. All arithmetic is in the logits' dtype; use
    float64.
    """
    keep = torch.ones_like(target, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    # Select before any arithmetic, so that nothing at a masked place can reach a kept one.
    z, t = logits[keep], target[keep]
    log_q = torch.log_softmax(z, dim=-1)
    q = log_q.exp()
    m = -log_q.gather(-1, t[:, None]).squeeze(-1)
    q_t = q.gather(-1, t[:, None]).squeeze(-1)
    entropy = -(q * torch.where(q > 0, log_q, 0.0)).sum(-1)
    d = torch.zeros_like(m)
    if cost_embedding is not None:
        d = (q * cost_matrix(cost_embedding.detach())[t]).sum(-1)
    cost = d + q_t.detach() if detach_target else d

    if name == "mle":
        loss = m
    elif name == "emo":
        loss = cost
    elif name == "emo1":
        weight = (m / (cost + ratio_eps)).detach().clamp(max=weight_max)
        loss = (m + weight * cost) * (1.0 if half is False else 0.5)
    elif name == "emo2":
        weight = (cost / (m + ratio_eps)).detach().clamp(max=weight_max)
        loss = (weight * m + emo_scale * cost) * (0.5 if half else 1.0)
    elif name == "mixce":
        loss = (eta + (1 - eta) * q_t.detach()) * m
    elif name == "tailr":
        g = 1e-7 if gamma is None else gamma
        loss = (q_t / (g + (1 - g) * q_t)).detach().clamp(weight_min, 1.0) * m
    elif name == "tvd":
        r = mixing_ratio
        inner = (q_t / ((1 - r) + r * q_t)).detach().clamp(weight_min, 1.0)
        loss = (r + (1 - r) * inner) * m
    elif name == "focal":
        loss = (1 - q_t) ** (2.0 if gamma is None else gamma) * m
    else:
        raise ValueError(f"objective: unknown name {name!r}")

    def scatter(values: Tensor) -> Tensor:
        return torch.zeros(keep.shape, dtype=values.dtype).masked_scatter(keep, values)

    return ReferenceOutput(
        scatter(loss), scatter(m.detach()), scatter(d.detach()), scatter(entropy.detach())
    )
