"""MAUVE: the area under the divergence frontier of two sets of texts, from their features.

References: Pillutla et al. (2021), arXiv 2102.01454; for the smoothed value and the frontier
integral (2023), arXiv 2212.14578.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

SCALE = 5.0
"""A divergence of x nats becomes a coordinate exp(-SCALE x)."""
NUM_MIXTURES = 25
VARIANCE = 0.9
"""Share of the variance that the principal components kept before clustering explain."""
RESTARTS = 5
ITERATIONS = 500
SMOOTHING = 0.5
"""Krichevsky-Trofimov: added to every cluster's count for `mauve_star`."""

_MIXTURE_MARGIN = 1e-6
"""Weights stay this far from 0 and 1, where a divergence is infinite on disjoint clusters."""


@dataclass(frozen=True)
class MauveResult:
    """One clustering and what follows from it; p and q are the two sets, in the caller's order."""

    mauve: float
    """Between 0 and 1; 1 where both fill all clusters alike."""
    mauve_star: float
    """The same from smoothed histograms."""
    frontier_integral: float
    """0 where both fill all clusters alike, 1 where they share none."""
    p_histogram: np.ndarray
    """[clusters] float64, sums to 1."""
    q_histogram: np.ndarray
    num_clusters: int
    num_components: int
    seed: int


@dataclass(frozen=True)
class ReducedFeatures:
    """Two sets of features in the same principal components, ready to be clustered."""

    rows: np.ndarray
    """[num_p + num_q, components], those of p first."""
    num_p: int
    num_q: int


def default_num_clusters(num_p: int, num_q: int) -> int:
    """Return a tenth of the smaller set, at least 2."""
    return max(2, round(min(num_p, num_q) / 10))


def reduce_features(p: np.ndarray, q: np.ndarray) -> ReducedFeatures:
    """Return rows of unit length in the principal components that hold VARIANCE of both sets.

    Args:
        p: [num_p, width] floats. A zero row stays one.
        q: [num_q, width].

    Raises:
        ValueError: not two matrices of one width, fewer than 2 rows, or a value that is not finite.
    """
    from sklearn.decomposition import PCA

    p, q = _check_features("p", p), _check_features("q", q)
    if p.shape[1] != q.shape[1]:
        raise ValueError(f"features: expected one width, got {p.shape[1]} of p, {q.shape[1]} of q")
    rows = np.concatenate([p, q]).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(lengths > 0, lengths, 1.0)
    if (rows == rows[0]).all():
        # No variance has no components: all rows are one point.
        reduced = np.zeros((len(rows), 1))
    elif min(rows.shape) == 1:
        reduced = rows
    else:
        reduced = PCA(n_components=VARIANCE, svd_solver="full").fit_transform(rows)
    return ReducedFeatures(reduced, len(p), len(q))


def cluster(features: ReducedFeatures, num_clusters: int, seed: int) -> np.ndarray:
    """Return the cluster, 0 to num_clusters - 1, of each row, by k-means on both sets together.

    Fewer distinct rows than clusters leave clusters empty.

    Raises:
        ValueError: num_clusters below 2 or above the number of rows.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    num_rows = len(features.rows)
    if not 2 <= num_clusters <= num_rows:
        raise ValueError(f"--num-clusters: expected 2 to {num_rows} (rows), got {num_clusters}")
    kmeans = KMeans(num_clusters, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return kmeans.fit_predict(features.rows)


def mauve_from_clusters(
    features: ReducedFeatures, labels: np.ndarray, num_clusters: int, seed: int
) -> MauveResult:
    """Return the measures of a clustering of `features`."""
    counts = [
        np.bincount(part, minlength=num_clusters).astype(np.float64)
        for part in (labels[: features.num_p], labels[features.num_p :])
    ]
    p, q = (count / count.sum() for count in counts)
    smooth = [count + SMOOTHING for count in counts]
    return MauveResult(
        mauve=mauve_from_histograms(p, q),
        mauve_star=mauve_from_histograms(*smooth),
        frontier_integral=frontier_integral(p, q),
        p_histogram=p,
        q_histogram=q,
        num_clusters=num_clusters,
        num_components=features.rows.shape[1],
        seed=seed,
    )


def mauve_from_features(
    p: np.ndarray, q: np.ndarray, seed: int, num_clusters: int | None = None
) -> MauveResult:
    """Return `mauve_from_clusters` of features [num_p, width] and [num_q, width].

    Raises:
        ValueError: as `reduce_features` and `cluster`.
    """
    features = reduce_features(p, q)
    if num_clusters is None:
        num_clusters = default_num_clusters(len(p), len(q))
    labels = cluster(features, num_clusters, seed)
    return mauve_from_clusters(features, labels, num_clusters, seed)


def divergence_frontier(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return [NUM_MIXTURES + 2, 2] points (exp(-SCALE KL(q|r)), exp(-SCALE KL(p|r))).

    r = w p + (1 - w) q with w from nearly 0 to nearly 1, and last the two extremes (1, 0), (0, 1).

    Args:
        p: [clusters], not negative; brought to sum 1, as is q.

    Raises:
        ValueError: not two such histograms of one size.
    """
    p, q = _check_histograms(p, q)
    weights = np.linspace(_MIXTURE_MARGIN, 1 - _MIXTURE_MARGIN, NUM_MIXTURES)
    mixtures = weights[:, None] * p + (1 - weights[:, None]) * q
    divergences = [[_kl(q, r), _kl(p, r)] for r in mixtures]
    return np.concatenate([np.exp(-SCALE * np.array(divergences)), [[1.0, 0.0], [0.0, 1.0]]])


def mauve_from_histograms(p: np.ndarray, q: np.ndarray) -> float:
    """Return the area under `divergence_frontier`: the mean of the trapezoids along each axis.

    Raises:
        ValueError: as `divergence_frontier`.
    """
    x, y = divergence_frontier(p, q).T
    return float((_area(x, y) + _area(y, x)) / 2)


def frontier_integral(p: np.ndarray, q: np.ndarray) -> float:
    """Return 2 sum [(p + q)/4 - p q (log p - log q) / (2 (p - q))], the frontier without a scale.

    A term is 0 where p = q, and (p + q)/4 where one of them is 0.

    Raises:
        ValueError: as `divergence_frontier`.
    """
    p, q = _check_histograms(p, q)
    terms = np.where(p == q, 0.0, (p + q) / 4)
    both = (p > 0) & (q > 0) & (p != q)
    # log p - log q has no digits left where the two differ by rounding; log1p(x)/x has all.
    x = (p[both] - q[both]) / q[both]
    terms[both] -= p[both] / 2 * np.log1p(x) / x
    return float(2 * terms.sum())


def _area(x: np.ndarray, y: np.ndarray) -> float:
    # The curve falls: of points of one x the highest comes first.
    order = np.lexsort((-y, x))
    return float(np.trapezoid(y[order], x[order]))


def _kl(p: np.ndarray, r: np.ndarray) -> float:
    """Return sum p log(p/r) in nats, 0 log 0 = 0, not below 0 by rounding."""
    filled = p > 0
    return max(0.0, float(np.sum(p[filled] * np.log(p[filled] / r[filled]))))


def _check_features(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) < 2 or values.shape[1] < 1:
        raise ValueError(
            f"features of {name}: expected [at least 2 texts, width], got shape {values.shape}"
        )
    if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
        raise ValueError(f"features of {name}: expected finite numbers, got NaN, infinity or text")
    return values


def _check_histograms(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if p.ndim != 1 or p.shape != q.shape:
        raise ValueError(f"histograms: expected two of one size, got {p.shape} and {q.shape}")
    for name, values in (("p", p), ("q", q)):
        if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
            raise ValueError(f"histogram {name}: expected counts or shares, got {values}")
    return p / p.sum(), q / q.sum()
