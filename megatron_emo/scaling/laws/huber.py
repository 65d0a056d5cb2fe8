"""Approach 3: the surface of least summed Huber loss of log-losses, found by L-BFGS-B from a grid.

Sizes and tokens are centred in their logs, and descents are repeated in coordinates in which the
objective is round: in (log A, log B) as published its condition is near 1e11, and a descent stops
where the objective still looks flat.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from megatron_emo.scaling.laws.surfaces import Surface, SurfaceFit

DELTA = 1e-3
"""Residual of log-loss from which on the penalty grows linearly (Hoffmann et al., section D.2)."""
MAX_EXPONENT = 3.0
NUM_DESCENTS = 16
"""Starts that are followed, the best ones of the grid."""
NUM_REFINED = 3
"""Ends that are refined, the best ones."""
MAX_ROUNDS = 12
NEGLIGIBLE = 1e-3
"""Share of the least loss below which a term counts as absent."""
_NAMES = ("E", "A", "B", "alpha", "beta")
_GRID_EXPONENTS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)
_GRID_FLOORS = (0.2, 0.5, 0.8, 0.95)
"""E over the least loss."""
_GRID_SHARES = (0.2, 0.5, 0.8)
"""Share of A's term in what the middle point has above E."""
_OPTIONS = {"maxiter": 500, "maxfun": 5000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
_ROUGH_OPTIONS = {"maxiter": 150, "ftol": 1e-7, "maxcor": 20}
"""Of descents from the grid: their order is all that is needed before the best are refined."""


class HuberProblem:
    """The objective over theta = (log E, log A', log B', alpha, beta), A' and B' at the mean point.

    Values are in units of delta^2, so that a stopping rule never meets numbers below its own
    resolution; they are summed over points, since a mean ends descents early.
    """

    def __init__(
        self, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, delta: float = DELTA
    ) -> None:
        log_params, log_tokens = np.log(params), np.log(tokens)
        self.centre = np.array([log_params.mean(), log_tokens.mean()])
        self.x, self.y = log_params - self.centre[0], log_tokens - self.centre[1]
        self.target, self.delta, self.evaluations = np.log(loss), delta, 0
        low, high = self.target.min(), self.target.max()
        self.bounds = np.array(
            [(low - 8, high), (low - 16, high + 1), (low - 16, high + 1)] + [(0, MAX_EXPONENT)] * 2
        )

    def terms(self, theta: np.ndarray) -> np.ndarray:
        """Return logs of the three terms, [..., 3, n] of theta [..., 5]."""
        e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
        return np.stack(
            np.broadcast_arrays(e + 0 * self.x, a - alpha * self.x, b - beta * self.y), -2
        )

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Return predicted minus measured log-loss, [..., n] of theta [..., 5]."""
        return logsumexp(self.terms(theta), axis=-2) - self.target

    def penalties(self, residuals: np.ndarray) -> np.ndarray:
        """Return Huber penalties over delta^2, of any shape."""
        size = np.abs(residuals) / self.delta
        return np.where(size <= 1, 0.5 * size**2, size - 0.5)

    def residuals_and_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return residuals [n] and their derivatives [n, 5] at theta [5]."""
        terms = np.empty((3, len(self.x)))
        terms[0] = theta[0]
        terms[1] = theta[1] - theta[3] * self.x
        terms[2] = theta[2] - theta[4] * self.y
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        shares /= total
        jacobian = np.empty((len(self.x), 5))
        jacobian[:, :3] = shares.T
        jacobian[:, 3] = -shares[1] * self.x
        jacobian[:, 4] = -shares[2] * self.y
        return top + np.log(total) - self.target, jacobian

    def value_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the summed objective over delta^2 and its gradient [5]."""
        self.evaluations += 1
        residuals, jacobian = self.residuals_and_jacobian(theta)
        scaled = residuals / self.delta
        clipped = np.clip(scaled, -1, 1)
        # Huber's penalty is c (s - c / 2) on both branches, c = clip(s).
        return float(clipped @ (scaled - 0.5 * clipped)), clipped @ jacobian / self.delta

    def curvature(self, theta: np.ndarray) -> np.ndarray:
        """Return a majorant of the second derivatives, [5, 5]: reweighted least squares."""
        residuals, jacobian = self.residuals_and_jacobian(theta)
        weights = 1 / np.maximum(1, np.abs(residuals) / self.delta)
        return (jacobian * weights[:, None]).T @ jacobian / self.delta**2

    def to_surface(self, theta: np.ndarray) -> Surface:
        """Return the surface of theta [5]."""
        e, a, b, alpha, beta = map(float, theta)
        return Surface(
            float(np.exp(e)),
            float(np.exp(a + alpha * self.centre[0])),
            float(np.exp(b + beta * self.centre[1])),
            alpha,
            beta,
        )

    def from_surface(self, surface: Surface) -> np.ndarray:
        """Return theta [5] within the bounds."""
        with np.errstate(divide="ignore"):
            e, a, b = np.log([surface.E, surface.A, surface.B])
        theta = np.array(
            [
                e,
                a - surface.alpha * self.centre[0],
                b - surface.beta * self.centre[1],
                surface.alpha,
                surface.beta,
            ]
        )
        return np.clip(theta, *self.bounds.T)


def fit_huber(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    *,
    delta: float = DELTA,
    start: Surface | None = None,
) -> SurfaceFit:
    """Return the surface of least sum_i Huber_delta(log L(N_i, D_i) - log loss_i).

    Args:
        params, tokens, loss: [n], above 0; loss in nats/token.
        start: descend from here alone, as for resamples; by default from the best of a grid.
    """
    problem = HuberProblem(params, tokens, loss, delta)
    starts = best_starts(problem) if start is None else [problem.from_surface(start)]
    ends = sorted((_descend(problem, theta) for theta in starts), key=lambda end: end[0])
    refined = [_refine(problem, theta) for _, theta in ends[:NUM_REFINED]]
    value, theta, converged = min(refined, key=lambda end: end[0])
    return SurfaceFit(
        surface=problem.to_surface(theta),
        objective=value * delta**2,
        loss_name=f"sum of Huber losses of log-loss, delta {delta:g}",
        residuals=problem.residuals(theta),
        residual_unit="log nats/token",
        converged=converged,
        at_bound=_names_at_bound(problem, theta),
        num_starts=len(starts),
        num_evaluations=problem.evaluations,
    )


def _names_at_bound(problem: HuberProblem, theta: np.ndarray) -> tuple[str, ...]:
    """A term that vanishes is on its bound, 0, wherever the descent of its log came to rest."""
    low, high = problem.bounds.T
    margin = 1e-6 * (high - low)
    hit = (theta <= low + margin) | (theta >= high - margin)
    hit[:3] |= theta[:3] < problem.target.min() + np.log(NEGLIGIBLE)
    return tuple(name for name, is_hit in zip(_NAMES, hit, strict=True) if is_hit)


def best_starts(problem: HuberProblem, count: int = NUM_DESCENTS) -> list[np.ndarray]:
    """Return the `count` best of a grid, one for each pair of exponents, best first."""
    least, middle = np.exp(problem.target.min()), np.exp(np.median(problem.target))
    best = []
    for alpha, beta in product(_GRID_EXPONENTS, repeat=2):
        cell = [
            (
                np.log(floor * least),
                np.log((middle - floor * least) * share),
                np.log((middle - floor * least) * (1 - share)),
                alpha,
                beta,
            )
            for floor, share in product(_GRID_FLOORS, _GRID_SHARES)
        ]
        cell = np.clip(np.array(cell), *problem.bounds.T)
        values = problem.penalties(problem.residuals(cell)).sum(axis=-1)
        best.append((values.min(), alpha, beta, cell[values.argmin()]))
    best.sort(key=lambda start: start[:3])
    return [theta for *_, theta in best[:count]]


def _descend(problem: HuberProblem, theta: np.ndarray) -> tuple[float, np.ndarray]:
    end = minimize(
        problem.value_and_gradient,
        theta,
        jac=True,
        method="L-BFGS-B",
        bounds=problem.bounds,
        options=_ROUGH_OPTIONS,
    )
    return float(end.fun), end.x


def _refine(problem: HuberProblem, theta: np.ndarray) -> tuple[float, np.ndarray, bool]:
    """Descend again in round coordinates over what is on no bound, until nothing is gained.

    What a step takes beyond its bound stays on it from then on, and the others go on: if that ends
    higher than where the step began, it counts for nothing.
    """
    value, gradient = problem.value_and_gradient(theta)
    low, high = problem.bounds.T
    # A parameter on a bound moves again where the gradient points inwards.
    free = ((theta > low) | (gradient < 0)) & ((theta < high) | (gradient > 0))
    # A term that has vanished has no curvature to make round.
    felt = np.diag(problem.curvature(theta))
    free &= felt > 1e-14 * felt.max()
    pinned, kept = np.zeros(len(theta), bool), None
    for _ in range(MAX_ROUNDS):
        if not free.any():
            break
        step = _round_coordinates(problem.curvature(theta)[np.ix_(free, free)])

        def objective(u, origin=theta, step=step, free=free):
            moved = origin.copy()
            moved[free] += step @ u
            value, gradient = problem.value_and_gradient(moved)
            return value, step.T @ gradient[free]

        end = minimize(
            objective, np.zeros(free.sum()), jac=True, method="L-BFGS-B", options=_OPTIONS
        )
        moved = theta.copy()
        moved[free] += step @ end.x
        if not end.fun < value:
            break
        outside = (moved < low) | (moved > high)
        if outside.any():
            kept = kept or (value, theta, free)
            free, pinned, theta = free & ~outside, pinned | outside, np.clip(moved, low, high)
            value = problem.value_and_gradient(theta)[0]
            continue
        gained, value, theta = value - end.fun, float(end.fun), moved
        if gained <= 1e-13 * value:
            break
    if kept and kept[0] < value:
        value, theta, free = kept
        pinned[:] = False
    _, gradient = problem.value_and_gradient(theta)
    free = free | pinned & np.where(theta <= low, gradient < 0, gradient > 0)
    if not free.any():
        return value, theta, True
    step = _round_coordinates(problem.curvature(theta)[np.ix_(free, free)])
    # Half the squared gradient in round coordinates is what a Newton step would still gain.
    left = 0.5 * float(np.square(step.T @ gradient[free]).sum())
    return value, theta, left <= 1e-6 * value + 1e-9


def _round_coordinates(curvature: np.ndarray) -> np.ndarray:
    """Return S with S^T curvature S = 1, but for directions below the resolution of floats."""
    scale = 1 / np.sqrt(np.maximum(np.diag(curvature), 1e-300))
    values, vectors = np.linalg.eigh(curvature * np.outer(scale, scale))
    return scale[:, None] * vectors / np.sqrt(np.maximum(values, 1e-13 * values[-1]))
