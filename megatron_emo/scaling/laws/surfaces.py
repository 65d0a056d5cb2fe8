"""The loss surface of a family of runs, L(N, D) = E + A / N^alpha + B / D^beta, and its optimum."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

FLOPS_PER_PARAM_TOKEN = 6
"""Of C = 6 N D: 2 in the forward pass, 4 in the backward pass."""


@dataclass(frozen=True)
class Surface:
    """Five numbers; losses in nats/token, N in parameters, D in tokens.

    References:
        Hoffmann et al. (2022), equation 2.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Exponent of N*(C), beta / (alpha + beta); NaN where both exponents are 0."""
        total = self.alpha + self.beta
        return self.beta / total if total > 0 else float("nan")

    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return losses [n] at sizes [n] and tokens [n]."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (N*, D*), each [n], of least loss where 6 N D = flops [n].

        Raises:
            ValueError: a surface on which A, B, alpha or beta is 0: it has no least loss.
        """
        if not min(self.A, self.B, self.alpha, self.beta) > 0:
            raise ValueError(f"optimum: expected A, B, alpha, beta above 0, got {self}")
        product = np.asarray(flops, float) / FLOPS_PER_PARAM_TOKEN
        ratio = self.alpha * self.A / (self.beta * self.B)
        params = ratio ** (1 / (self.alpha + self.beta)) * product**self.a
        return params, product / params

    def to_json(self) -> dict[str, float]:
        """Return the five numbers and a, by name."""
        return {**asdict(self), "a": self.a}


@dataclass(frozen=True)
class SurfaceFit:
    """A surface with what is needed to believe it."""

    surface: Surface
    objective: float
    """Value of `loss_name` at the surface, summed over points."""
    loss_name: str
    residuals: np.ndarray
    """[n], predicted minus measured, in `residual_unit`."""
    residual_unit: str
    converged: bool
    at_bound: tuple[str, ...]
    """Names of parameters that lie on a bound of the search."""
    num_starts: int
    num_evaluations: int
