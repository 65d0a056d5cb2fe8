"""One call for the four ways to fit a table of runs, with its checks and its held-out error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from megatron_emo.scaling.laws.envelope import find_envelope_optima
from megatron_emo.scaling.laws.frontier import Frontier, Optima, fit_frontier
from megatron_emo.scaling.laws.huber import DELTA, fit_huber
from megatron_emo.scaling.laws.isoflop import VERTICES, Refused, find_isoflop_optima
from megatron_emo.scaling.laws.projection import fit_projection
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.laws.table import RunTable

APPROACHES = {
    "1": "envelope of training curves: the size of least loss at each C",
    "2": "IsoFLOP curves: the size of least loss at each budget",
    "3": "the surface of least summed Huber loss of log-losses",
    "vpnls": "the surface of least squared error, E, A, B projected out",
}
PARAMETERS = ("E", "A", "B", "alpha", "beta", "a", "b")
MIN_BUDGETS = 3
MIN_POINTS = 4
"""Of one curve."""
MIN_SPREAD = 1e-3
MAX_SHOWN = 8


@dataclass(frozen=True)
class FitSettings:
    """How to fit."""

    approach: str = "3"
    vertex: str = "parabola"
    """Of approach 2."""
    delta: float = DELTA
    """Of approach 3."""
    drop_short_curves: bool = False
    """Leave out curves of fewer than MIN_POINTS points instead of refusing the table."""

    def __post_init__(self) -> None:
        if self.approach not in APPROACHES:
            raise ValueError(f"--approach: expected one of {list(APPROACHES)}, got {self.approach}")
        if self.vertex not in VERTICES:
            raise ValueError(f"--vertex: expected one of {VERTICES}, got {self.vertex}")
        if not self.delta > 0:
            raise ValueError(f"--delta: expected above 0, got {self.delta}")


@dataclass(frozen=True)
class Fit:
    """A law."""

    parameters: Mapping[str, float]
    """By PARAMETERS; NaN where the approach does not say."""
    objective: float
    loss_name: str
    residuals: np.ndarray
    """Predicted minus measured: [n] of points; approach 1 has one per C of its grid."""
    residual_unit: str
    converged: bool
    at_bound: tuple[str, ...] = ()
    surface: Surface | None = None
    frontier: Frontier | None = None
    optima: Optima | None = None
    refused: tuple[Refused, ...] = ()
    details: Mapping[str, float | int | str] = field(default_factory=dict)


def describe_doubts(converged: bool, at_bound: Sequence[str]) -> list[str]:
    """Return what speaks against a fit, [] of nothing."""
    doubts = [] if converged else ["not converged"]
    return doubts + ([f"on a bound: {', '.join(at_bound)}"] if at_bound else [])


def check_table(table: RunTable, settings: FitSettings) -> RunTable:
    """Return the table, without short curves where settings say so.

    Raises:
        ValueError: fewer than MIN_BUDGETS budgets (approach 1: curves), a curve of fewer than
            MIN_POINTS points (approaches 1, 2), or fewer points in all than that many such curves;
            N and D that vary together (approaches 3, vpnls).
    """
    flag = f"--approach {settings.approach}"
    is_envelope = settings.approach == "1"
    what = "curve" if is_envelope else "budget"
    labels = table.curves if is_envelope else table.budgets
    if settings.approach in ("1", "2"):
        counts = {label: int((labels == label).sum()) for label in np.unique(labels)}
        short = [label for label, count in counts.items() if count < MIN_POINTS]
        if short and not settings.drop_short_curves:
            shown = _show_counts(table, labels, is_envelope, short)
            raise ValueError(
                f"{flag}: expected at least {MIN_POINTS} points a {what}, got {shown} "
                "(--drop-short-curves leaves them out)"
            )
        table = table.drop(np.isin(labels, short), f"{what} of fewer than {MIN_POINTS} points")
        labels = table.curves if is_envelope else table.budgets
    found = np.unique(labels)
    if len(found) < MIN_BUDGETS:
        shown = _show_counts(table, labels, is_envelope, found) or "none"
        raise ValueError(
            f"{flag}: expected at least {MIN_BUDGETS} {what}s, got {len(found)}: {shown}"
        )
    fewest = MIN_BUDGETS * MIN_POINTS
    if len(table) < fewest:
        raise ValueError(
            f"{flag}: expected at least {fewest} points ({MIN_BUDGETS} budgets of {MIN_POINTS}), "
            f"got {len(table)} in {len(found)} {what}s"
        )
    if settings.approach in ("3", "vpnls"):
        _check_spread(table, flag)
    return table


def _check_spread(table: RunTable, flag: str) -> None:
    """Sizes in proportion to tokens, or all of one size, leave the two terms apart unknown."""
    logs = np.log([table.params, table.tokens])
    spread = np.linalg.svd(logs - logs.mean(axis=1, keepdims=True), compute_uv=False)
    if spread[1] <= MIN_SPREAD * spread[0]:
        raise ValueError(
            f"{flag}: expected N and D that vary apart, got points on one line of log N and log D "
            f"(spread across it {spread[1] / max(spread[0], 1e-300):.1e} of that along it)"
        )


def _show_counts(table: RunTable, labels: np.ndarray, is_envelope: bool, chosen) -> str:
    values, name = (table.params, "N") if is_envelope else (table.flops, "C")
    shown = [
        f"{(labels == label).sum()} at {name} = {np.median(values[labels == label]):.3g}"
        for label in chosen[:MAX_SHOWN]
    ]
    more = len(chosen) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def fit_runs(
    table: RunTable,
    settings: FitSettings,
    start: Surface | None = None,
    fewest_optima: int = MIN_BUDGETS,
) -> Fit:
    """Return the law of a checked table.

    Args:
        start: of approach 3 and vpnls, in the place of a grid: for resamples of the table.
        fewest_optima: of approaches 1 and 2; two make a line, though not a loss frontier.

    Raises:
        ValueError: fewer optima than that, with the reasons.
    """
    if settings.approach in ("1", "2"):
        return _fit_optima(table, settings, fewest_optima)
    points = (table.params, table.tokens, table.loss)
    if settings.approach == "3":
        found = fit_huber(*points, delta=settings.delta, start=start)
    else:
        found = fit_projection(*points, start=start)
    surface = found.surface
    return Fit(
        parameters={**surface.to_json(), "b": 1 - surface.a},
        objective=found.objective,
        loss_name=found.loss_name,
        residuals=found.residuals,
        residual_unit=found.residual_unit,
        converged=found.converged,
        at_bound=found.at_bound,
        surface=surface,
        details={"starts": found.num_starts, "evaluations": found.num_evaluations},
    )


def _fit_optima(table: RunTable, settings: FitSettings, fewest: int) -> Fit:
    details: dict = {}
    if settings.approach == "1":
        optima, refused, size = find_envelope_optima(table)
        num_found, residuals, unit = len(np.unique(size)), None, "log N*"
        details["sizes_on_envelope"] = num_found
    else:
        optima, refused, residuals = find_isoflop_optima(table, settings.vertex)
        num_found, unit = len(optima), "nats/token"
        details["vertex"] = settings.vertex
    if num_found < fewest:
        reasons = "; ".join(f"{r.name} ({r.num_points} points): {r.reason}" for r in refused)
        what = "sizes on the envelope" if settings.approach == "1" else "budgets with an optimum"
        raise ValueError(
            f"--approach {settings.approach}: expected at least {fewest} {what}, got {num_found}: "
            f"{reasons}"
        )
    frontier = fit_frontier(optima)
    nothing = dict.fromkeys(("E", "A", "B", "alpha", "beta"), float("nan"))
    implied = nothing if frontier.surface is None else asdict(frontier.surface)
    return Fit(
        parameters={**implied, "a": frontier.a, "b": frontier.b},
        objective=float(np.square(frontier.residuals).sum()),
        loss_name="sum of squared errors of log N* about the line in log C",
        residuals=frontier.residuals if residuals is None else residuals,
        residual_unit=unit,
        converged=True,
        at_bound=frontier.at_bound,
        surface=frontier.surface,
        frontier=frontier,
        optima=optima,
        refused=tuple(refused),
        details=details,
    )


def leave_out_largest(table: RunTable, settings: FitSettings) -> dict:
    """Return the error at the largest budget of the law of the others.

    Surfaces: of losses, predicted minus measured, nats/token. Approach 2: log of predicted over
    found N* at the largest budget with an optimum. Approach 1: the same at the middle of the C at
    which the largest size on the envelope is the best. `reason` alone where it cannot be said.
    """
    if settings.approach in ("1", "2"):
        return _leave_out_optimum(table, settings)
    largest = table.budgets == table.budgets.max()
    rest, held = table.take(~largest), table.take(largest)
    if len(np.unique(rest.budgets)) < 2 or len(rest) < 8:
        return {"reason": f"{len(rest)} points in the other budgets are too few"}
    surface = fit_runs(rest, settings).surface
    errors = surface.loss(held.params, held.tokens) - held.loss
    return {
        "flops": float(np.exp(np.log(held.flops).mean())),
        "n": len(held),
        "mean_error": float(errors.mean()),
        "rms_error": float(np.sqrt(np.square(errors).mean())),
        "max_error": float(np.abs(errors).max()),
        "relative_rms_error": float(np.sqrt(np.square(errors / held.loss).mean())),
        "unit": "nats/token",
    }


def _leave_out_optimum(table: RunTable, settings: FitSettings) -> dict:
    if settings.approach == "1":
        optima, _, label = find_envelope_optima(table)
    else:
        optima, _, _ = find_isoflop_optima(table, settings.vertex)
        label = np.arange(len(optima))
    largest = label == label[optima.flops.argmax()]
    rest, held = optima.take(~largest), optima.take(largest)
    if len(np.unique(label[~largest])) < 2:
        return {"reason": f"{len(np.unique(label))} optima are too few"}
    flops = float(np.exp(np.log(held.flops).mean()))
    found = float(np.exp(np.log(held.params).mean()))
    predicted = float(fit_frontier(rest).params(flops))
    return {
        "flops": flops,
        "n": 1,
        "predicted_params": predicted,
        "found_params": found,
        "log_ratio": float(np.log(predicted / found)),
        "unit": "log N*",
    }
