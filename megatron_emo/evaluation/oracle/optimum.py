"""Where training aims: the distribution at which an objective's expected gradient is zero.

With the cost 1 - I the gradient of every objective is that of cross-entropy times a weight
w(q_t) = a + b q_t, since then q_j (c_j - d) = q_t (q_j - [j = t]). Over targets drawn from p it is
zero where q_t is proportional to p_t w(q_t): at q = p for a constant w, that is for MLE, and at a
sharper q where w grows with q_t. No data, model or optimizer enter.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_emo.objectives import Objective

_GRID = 200_001
_LEAST = 1e-12
_STEPS = 100


def weight_of_target(objective: Objective, q_t: np.ndarray) -> np.ndarray:
    """Return w(q_t), by which the objective multiplies the cross-entropy gradient q - onehot(t)
    under the cost 1 - I."""
    q = torch.from_numpy(np.asarray(q_t, dtype=np.float64))
    terms = objective(-torch.log(q), q, 1.0 - q)
    return (terms.mle_weight + terms.emo_weight * q).numpy()


def find_optimum(p: np.ndarray, objective: Objective) -> np.ndarray:
    """Return log_q [R, V] of the stationary rows for the true rows p [R, V]; -inf where p is 0.

    Raises:
        ValueError: q / w(q) does not grow throughout, so that there is no single such point: emo
            alone puts all on the likeliest token.
    """
    q = np.exp(np.linspace(np.log(_LEAST), 0.0, _GRID))[:-1]
    ratio = q / weight_of_target(objective, q)
    if not (np.diff(ratio) > 0).all():
        raise ValueError(
            f"{objective.name}: expected q / w(q) to grow with q, found that it does not"
        )
    log_ratio, log_q = np.log(ratio), np.log(q)
    log_p = np.log(np.where(p > 0, p, 1.0))

    def rows_at(log_scale: np.ndarray) -> np.ndarray:
        found = np.interp(log_p - log_scale, log_ratio, log_q)
        return np.where(p > 0, found, -np.inf)

    low, high = np.full((len(p), 1), -50.0), np.full((len(p), 1), 50.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        too_much = np.exp(rows_at(middle)).sum(1, keepdims=True) > 1.0
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    found = rows_at(high)
    return found - np.log(np.exp(found).sum(1, keepdims=True))
