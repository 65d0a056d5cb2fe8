"""Two objectives under laws with one floor E.

Text has one entropy, whatever a model was trained with: L_g = E + A_g/N^alpha_g + B_g/D^beta_g for
the objectives g. As in `projection`, the five coefficients are solved for at each four exponents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import least_squares, nnls

from megatron_emo.scaling.comparison.pairs import Runs
from megatron_emo.scaling.laws.projection import EXPONENT_BOUNDS, fit_projection
from megatron_emo.scaling.laws.surfaces import Surface

_COEFFICIENTS = ("E", "A", "B", "A", "B")
PRECISE = {"xtol": 1e-14, "ftol": 1e-15, "gtol": 1e-15, "max_nfev": 300}


@dataclass(frozen=True)
class JointFit:
    """Two surfaces of equal E, those of the baseline and of the other objective."""

    laws: tuple[Surface, Surface]
    objective: float
    """Sum of squared errors over both, (nats/token)^2."""
    residuals: tuple[np.ndarray, np.ndarray]
    """Predicted minus measured, [n] each, nats/token."""
    converged: bool
    at_bound: tuple[str, ...]
    """Names of numbers on a bound, those of a law as "base alpha"."""


class JointProblem:
    """Least squares over (alpha, beta) of the baseline and of the other, [4]."""

    def __init__(self, base: Runs, other: Runs) -> None:
        params = np.log(np.concatenate([base.params, other.params]))
        tokens = np.log(np.concatenate([base.tokens, other.tokens]))
        self.centre = np.array([params.mean(), tokens.mean()])
        x, y = params - self.centre[0], tokens - self.centre[1]
        self.is_other = np.repeat([False, True], [len(base), len(other)])
        self.places = np.stack([x, y, x, y], axis=1)
        self.mask = np.stack([~self.is_other] * 2 + [self.is_other] * 2, axis=1).astype(float)
        self.loss = np.concatenate([base.loss, other.loss])

    def columns(self, exponents: np.ndarray) -> np.ndarray:
        """Return the columns [n, 5] of E, A, B of the baseline, A, B of the other."""
        powers = self.mask * np.exp(-self.places * exponents)
        return np.concatenate([np.ones((len(powers), 1)), powers], axis=1)

    def solve(self, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return coefficients [5], residuals [n], columns, and a basis of the active columns."""
        columns = self.columns(exponents)
        active = nnls(columns, self.loss)[0] > 0
        basis, triangle = np.linalg.qr(columns[:, active])
        coefficients = np.zeros(len(_COEFFICIENTS))
        # As in `projection`: rounding may say a little less than 0.
        coefficients[active] = np.maximum(solve_triangular(triangle, basis.T @ self.loss), 0)
        return coefficients, columns @ coefficients - self.loss, columns, basis

    def residuals(self, exponents: np.ndarray) -> np.ndarray:
        """Return predicted minus measured losses [n] at the best coefficients."""
        return self.solve(exponents)[1]

    def jacobian(self, exponents: np.ndarray) -> np.ndarray:
        """Return derivatives of `residuals` [n, 4], as `ProjectedProblem.jacobian`."""
        coefficients, _, columns, basis = self.solve(exponents)
        slopes = -self.places * columns[:, 1:] * coefficients[1:]
        return slopes - basis @ (basis.T @ slopes)

    def to_laws(self, exponents: np.ndarray) -> tuple[Surface, Surface]:
        """Return the surfaces at the exponents."""
        floor, *heights = self.solve(exponents)[0]
        shifts = np.exp(exponents * np.tile(self.centre, 2))
        a1, b1, a2, b2 = map(float, heights * shifts)
        alpha1, beta1, alpha2, beta2 = map(float, exponents)
        return (
            Surface(float(floor), a1, b1, alpha1, beta1),
            Surface(float(floor), a2, b2, alpha2, beta2),
        )


def fit_joint(
    base: Runs,
    other: Runs,
    starts: list[np.ndarray] | None = None,
    options: Mapping[str, float] = PRECISE,
) -> JointFit:
    """Return the two surfaces of one E of least squared error, E, A, B >= 0.

    Args:
        base, other: of which params, tokens and loss count; they need not be as many.
        starts: exponents [4] to descend from; by default those of each objective alone and those of
            one law for both.
        options: when scipy's least_squares stops.
    """
    problem = JointProblem(base, other)
    low, high = EXPONENT_BOUNDS
    ends = [
        least_squares(
            problem.residuals,
            np.clip(start, low * 1.01, high * 0.99),
            problem.jacobian,
            bounds=EXPONENT_BOUNDS,
            **options,
        )
        for start in starts or _find_starts(base, other)
    ]
    end = min(ends, key=lambda end: end.cost)
    laws, residuals = problem.to_laws(end.x), problem.residuals(end.x)
    return JointFit(
        laws=laws,
        objective=2 * float(end.cost),
        residuals=(residuals[~problem.is_other], residuals[problem.is_other]),
        converged=end.status > 0,
        at_bound=_names_at_bound(laws),
    )


def _find_starts(base: Runs, other: Runs) -> list[np.ndarray]:
    alone = [exponents_of(fit_projection(*points_of(runs)).surface) for runs in (base, other)]
    both = exponents_of(fit_projection(*points_of(base, other)).surface)
    return [np.concatenate(alone), np.tile(both, 2)]


def points_of(*runs: Runs) -> list[np.ndarray]:
    """Return params, tokens and losses of all runs, [n] each."""
    return [
        np.concatenate([getattr(one, name) for one in runs])
        for name in ("params", "tokens", "loss")
    ]


def exponents_of(law: Surface) -> np.ndarray:
    """Return (alpha, beta)."""
    return np.array([law.alpha, law.beta])


def _names_at_bound(laws: tuple[Surface, Surface]) -> tuple[str, ...]:
    low, high = EXPONENT_BOUNDS
    names = ["E"] if laws[0].E == 0 else []
    for side, law in zip(("base", "other"), laws, strict=True):
        names += [f"{side} {name}" for name in ("A", "B") if getattr(law, name) == 0]
        names += [
            f"{side} {name}"
            for name in ("alpha", "beta")
            if not low * 1.01 <= getattr(law, name) <= high * 0.999
        ]
    return tuple(names)
