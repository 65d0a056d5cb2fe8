"""From optima at several FLOPs to N*(C), D*(C) and L*(C), and to the surface that they imply."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from megatron_emo.scaling.laws.surfaces import FLOPS_PER_PARAM_TOKEN, Surface

GAMMA_BOUNDS = (0.005, 2.0)
_GRID = np.geomspace(*GAMMA_BOUNDS, 60)


@dataclass(frozen=True)
class Optima:
    """Sizes and tokens of least loss, each array [k]."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    """nats/token."""

    def __len__(self) -> int:
        return len(self.flops)

    def take(self, index: np.ndarray) -> Optima:
        """Return the optima of a mask or of indices."""
        return Optima(self.flops[index], self.params[index], self.tokens[index], self.loss[index])


@dataclass(frozen=True)
class Frontier:
    """N* = n0 C^a, D* = d0 C^b, and L* = E + K (C / 6)^-gamma with what follows from it."""

    a: float
    b: float
    log_n0: float
    log_d0: float
    gamma: float
    """NaN with fewer than three optima, as the surface."""
    surface: Surface | None
    """That which has this frontier; by 6 N D, whatever the FLOPs counted."""
    residuals: np.ndarray
    """[k], log of fitted over found N*."""
    at_bound: tuple[str, ...] = ()

    def params(self, flops: np.ndarray) -> np.ndarray:
        """Return N* [k] at FLOPs [k]."""
        return np.exp(self.log_n0 + self.a * np.log(flops))


def fit_frontier(optima: Optima) -> Frontier:
    """Return the laws through optima at two or more FLOPs, by least squares in logs for N* and D*.

    The loss is fitted as E + K (C/6)^-gamma with E, K >= 0 solved for at each gamma. On the surface
    E + A N^-alpha + B D^-beta it is gamma = a alpha = (1 - a) beta, and both terms' shares of K
    follow from the slope being 0 at the optimum.

    Raises:
        ValueError: fewer than two different FLOPs.
    """
    if np.ptp(np.log(optima.flops)) == 0:
        raise ValueError(f"optima: expected two different FLOPs, got {len(optima)} optima of one")
    x = np.log(optima.flops)
    a, log_n0 = np.polyfit(x, np.log(optima.params), 1)
    b, log_d0 = np.polyfit(x, np.log(optima.tokens), 1)
    gamma, surface = float("nan"), None
    at_bound: tuple[str, ...] = ()
    if len(np.unique(optima.flops)) >= 3:
        floor, height, gamma = _fit_floor(optima)
        at_bound = ("gamma",) if _near_bound(gamma) else ()
        at_bound += tuple(n for n, value in (("E", floor), ("K", height)) if value == 0)
        # log of N* over (C/6)^a.
        log_scale = log_n0 + a * np.log(FLOPS_PER_PARAM_TOKEN)
        surface = _implied_surface(floor, height, gamma, a, log_scale)
    return Frontier(
        a=float(a),
        b=float(b),
        log_n0=float(log_n0),
        log_d0=float(log_d0),
        gamma=float(gamma),
        surface=surface,
        residuals=log_n0 + a * x - np.log(optima.params),
        at_bound=at_bound,
    )


def _fit_floor(optima: Optima) -> tuple[float, float, float]:
    """Return (E, K, gamma) of L* = E + K (C/6)^-gamma, least squares."""
    x = np.log(optima.flops / FLOPS_PER_PARAM_TOKEN)
    middle = x.mean()

    def solve(log_gamma: float) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(x), np.exp(-np.exp(log_gamma) * (x - middle))], axis=1)
        return nnls(columns, optima.loss)

    grid = np.log(_GRID)
    best = int(np.argmin([solve(g)[1] for g in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    end = minimize_scalar(
        lambda g: solve(g)[1], bounds=around, method="bounded", options={"xatol": 1e-10}
    )
    gamma = float(np.exp(end.x))
    floor, height = solve(end.x)[0]
    return float(floor), float(height * np.exp(gamma * middle)), gamma


def _near_bound(gamma: float) -> bool:
    return gamma < GAMMA_BOUNDS[0] * 1.001 or gamma > GAMMA_BOUNDS[1] * 0.999


def _implied_surface(
    floor: float, height: float, gamma: float, a: float, log_scale: float
) -> Surface | None:
    """None where a is not within (0, 1): no surface of this form has such a frontier."""
    if not 0 < a < 1:
        return None
    alpha, beta = gamma / a, gamma / (1 - a)
    return Surface(
        E=floor,
        A=float(height * beta / (alpha + beta) * np.exp(alpha * log_scale)),
        B=float(height * alpha / (alpha + beta) * np.exp(-beta * log_scale)),
        alpha=float(alpha),
        beta=float(beta),
    )
