"""How far a learned bigram language is from the true one: exact, in float64, row by row.

p is the truth [R, V], q what was learned, its logarithm given as log_q [R, V]; every row sums to
1. All are in nats or shares of probability, and returned per row [R] but for `mass_per_zero`.
"""

from __future__ import annotations

import numpy as np

SMOOTHING = 1e-6
"""What `smoothed_reverse_kl` gives to every token of the truth before it is normalised again."""


def forward_kl(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return KL(p || q), what cross-entropy pays beyond p's entropy: large where q misses mass."""
    return (p * (_log(p) - np.where(p > 0, log_q, 0.0))).sum(1)


def reverse_kl_on_support(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return KL(q' || p), q' being q restricted to what p can emit and normalised again.

    KL(q || p) itself is infinite as soon as q puts anything elsewhere; `leaked_mass` says how much.
    """
    on_support = np.where(p > 0, log_q, -np.inf)
    log_kept = on_support - np.logaddexp.reduce(on_support, axis=1, keepdims=True)
    kept = np.exp(log_kept)
    return (kept * (np.where(p > 0, log_kept, 0.0) - _log(p))).sum(1)


def smoothed_reverse_kl(
    p: np.ndarray, log_q: np.ndarray, smoothing: float = SMOOTHING
) -> np.ndarray:
    """Return KL(q || p'), p' = (p + smoothing) / (1 + V smoothing)."""
    smoothed = (p + smoothing) / (1.0 + smoothing * p.shape[1])
    q = np.exp(log_q)
    return (q * (np.where(q > 0, log_q, 0.0) - np.log(smoothed))).sum(1)


def leaked_mass(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return the probability of what p cannot emit."""
    return np.where(p > 0, 0.0, np.exp(log_q)).sum(1)


def mass_per_zero(p: np.ndarray, log_q: np.ndarray) -> float:
    """Return the mean of q over all entries where p is 0 (avg_0s of MixCE).

    Raises:
        ValueError: p has no such entry.
    """
    if p.all():
        raise ValueError("avg_0s: expected at least 1 entry of the truth that is 0, found 0")
    return float(np.exp(log_q)[p == 0].mean())


def total_variation(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return half the sum of |p - q|."""
    return 0.5 * np.abs(p - np.exp(log_q)).sum(1)


def jensen_shannon(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return the mean of KL(p || r) and KL(q || r), r = (p + q) / 2 (avg_js of MixCE, per row)."""
    q = np.exp(log_q)
    log_r = _log((p + q) / 2)
    to_p = (p * (_log(p) - log_r)).sum(1)
    to_q = (q * (np.where(q > 0, log_q, 0.0) - log_r)).sum(1)
    return 0.5 * (to_p + to_q)


def entropy_gap(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return the entropy of q less that of p: negative where q is sharper than the truth."""
    q = np.exp(log_q)
    return (p * _log(p)).sum(1) - (q * np.where(q > 0, log_q, 0.0)).sum(1)


PER_ROW = {
    "forward_kl": forward_kl,
    "reverse_kl_support": reverse_kl_on_support,
    "reverse_kl_smoothed": smoothed_reverse_kl,
    "leaked_mass": leaked_mass,
    "tvd": total_variation,
    "avg_js": jensen_shannon,
    "entropy_gap": entropy_gap,
}


def measure(
    p: np.ndarray, log_q: np.ndarray, visits: np.ndarray, dev_counts: np.ndarray
) -> dict[str, float]:
    """Return every measure by name: rows weighted equally, and by visits as "visited_NAME".

    avg_0s is left out where the truth has no zeros, dev_js is `dev_jensen_shannon`.
    """
    found = {}
    for name, function in PER_ROW.items():
        per_row = function(p, log_q)
        found[name] = float(per_row.mean())
        found[f"visited_{name}"] = float((per_row * visits).sum() / visits.sum())
    if not p.all():
        found["avg_0s"] = mass_per_zero(p, log_q)
    found["dev_js"] = dev_jensen_shannon(log_q, dev_counts)
    return found


def dev_jensen_shannon(log_q: np.ndarray, dev_counts: np.ndarray) -> float:
    """Return the mean row `jensen_shannon` of q from the relative frequencies of dev data.

    It can be chosen by without the truth. Rows that dev data never visit are left out.
    """
    totals = dev_counts.sum(1)
    seen = totals > 0
    frequencies = dev_counts[seen] / totals[seen, None]
    return float(jensen_shannon(frequencies, log_q[seen]).mean())


def _log(p: np.ndarray) -> np.ndarray:
    """The logarithm, and 0 where p is 0: it is always multiplied by p."""
    return np.log(np.where(p > 0, p, 1.0))
