"""VPNLS: the surface of least squared error, E, A, B being solved for at each (alpha, beta).

At fixed exponents the surface is linear in E, A and B, which non-negative least squares finds
exactly; what is left is a search in two dimensions that is well conditioned.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import least_squares, nnls

from megatron_emo.scaling.laws.surfaces import Surface, SurfaceFit

EXPONENT_BOUNDS = (0.01, 3.0)
"""At 0 a term is a second constant beside E."""
NUM_DESCENTS = 3
_GRID = np.geomspace(0.03, 1.8, 20)
_NAMES = ("E", "A", "B")


class ProjectedProblem:
    """Least squares over (alpha, beta); columns are 1, (N/N0)^-alpha, (D/D0)^-beta."""

    def __init__(self, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> None:
        log_params, log_tokens = np.log(params), np.log(tokens)
        self.centre = np.array([log_params.mean(), log_tokens.mean()])
        self.x, self.y = log_params - self.centre[0], log_tokens - self.centre[1]
        self.loss, self.evaluations = np.asarray(loss, float), 0

    def columns(self, exponents: np.ndarray) -> np.ndarray:
        """Return the columns [n, 3] at (alpha, beta)."""
        return np.stack(
            [
                np.ones_like(self.x),
                np.exp(-exponents[0] * self.x),
                np.exp(-exponents[1] * self.y),
            ],
            axis=1,
        )

    def solve(self, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return coefficients [3], residuals [n] and an orthonormal basis [n, k] of active columns.

        nnls says which columns are active; their coefficients are solved for by QR, which keeps
        the digits that a solution through normal equations would lose.
        """
        self.evaluations += 1
        columns = self.columns(exponents)
        active = nnls(columns, self.loss)[0] > 0
        basis, triangle = np.linalg.qr(columns[:, active])
        coefficients = np.zeros(3)
        # Of a column that is all but inactive, rounding may say a little less than 0.
        coefficients[active] = np.maximum(solve_triangular(triangle, basis.T @ self.loss), 0)
        return coefficients, columns @ coefficients - self.loss, basis

    def residuals(self, exponents: np.ndarray) -> np.ndarray:
        """Return predicted minus measured losses [n] at the best E, A, B."""
        return self.solve(exponents)[1]

    def jacobian(self, exponents: np.ndarray) -> np.ndarray:
        """Return derivatives of `residuals`, [n, 2], without the part along the active columns.

        References:
            Kaufman (1975); the gradient is exact, since residuals have no such part either.
        """
        coefficients, _, basis = self.solve(exponents)
        columns = self.columns(exponents)
        slopes = np.stack(
            [-self.x * columns[:, 1] * coefficients[1], -self.y * columns[:, 2] * coefficients[2]],
            axis=1,
        )
        return slopes - basis @ (basis.T @ slopes)

    def to_surface(self, exponents: np.ndarray) -> Surface:
        """Return the surface at (alpha, beta)."""
        e, a, b = self.solve(exponents)[0]
        alpha, beta = map(float, exponents)
        return Surface(
            float(e),
            float(a * np.exp(alpha * self.centre[0])),
            float(b * np.exp(beta * self.centre[1])),
            alpha,
            beta,
        )


def fit_projection(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, *, start: Surface | None = None
) -> SurfaceFit:
    """Return the surface of least sum_i (L(N_i, D_i) - loss_i)^2 with E, A, B >= 0.

    Args:
        params, tokens, loss: [n], above 0; loss in nats/token.
        start: descend from its exponents alone; by default from the best of a grid.
    """
    problem = ProjectedProblem(params, tokens, loss)
    low, high = EXPONENT_BOUNDS
    if start is None:
        starts = _best_cells(problem)
    else:
        starts = [np.clip([start.alpha, start.beta], low * 1.01, high * 0.99)]
    ends = [
        least_squares(
            problem.residuals,
            exponents,
            problem.jacobian,
            bounds=EXPONENT_BOUNDS,
            xtol=1e-14,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=300,
        )
        for exponents in starts
    ]
    end = min(ends, key=lambda end: end.cost)
    surface = problem.to_surface(end.x)
    at_bound = [name for name in _NAMES if getattr(surface, name) == 0]
    at_bound += [
        name
        for name, value in zip(("alpha", "beta"), end.x, strict=True)
        if value < low * 1.01 or value > high * 0.999
    ]
    return SurfaceFit(
        surface=surface,
        objective=2 * float(end.cost),
        loss_name="sum of squared errors, (nats/token)^2",
        residuals=problem.residuals(end.x),
        residual_unit="nats/token",
        converged=end.status > 0,
        at_bound=tuple(at_bound),
        num_starts=len(starts),
        num_evaluations=problem.evaluations,
    )


def _best_cells(problem: ProjectedProblem) -> list[np.ndarray]:
    """Return the best cells of the grid, none beside a better one."""
    errors = np.array([[np.square(problem.residuals((a, b))).sum() for b in _GRID] for a in _GRID])
    chosen: list[tuple[int, int]] = []
    for flat in np.argsort(errors, axis=None, kind="stable"):
        cell = divmod(int(flat), len(_GRID))
        if all(max(abs(cell[0] - c[0]), abs(cell[1] - c[1])) > 2 for c in chosen):
            chosen.append(cell)
        if len(chosen) == NUM_DESCENTS:
            break
    return [np.array([_GRID[i], _GRID[j]]) for i, j in chosen]
