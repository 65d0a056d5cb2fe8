"""Two objectives on the same study: differences of loss and effective speedups, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_emo.evaluation.records import Interval
from megatron_emo.scaling.comparison.documents import DocumentPairs, read_document_pairs
from megatron_emo.scaling.comparison.pairs import Pairs, Runs
from megatron_emo.scaling.comparison.resampling import (
    MIN_FREEDOM,
    PairSampler,
    count_freedom,
    mean_interval,
)
from megatron_emo.scaling.comparison.speedup import (
    fit_line,
    frontier_speedup,
    pair_differences,
    pair_speedups,
)
from megatron_emo.scaling.laws.bootstrap import has_survived, surviving_interval
from megatron_emo.scaling.laws.fit import (
    Fit,
    FitSettings,
    check_table,
    describe_doubts,
    fit_runs,
)
from megatron_emo.scaling.laws.isoflop import find_isoflop_optima
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.laws.table import RunTable

_Draws = dict[tuple[str, str], np.ndarray]
"""Means [draws] by ("difference" or "speedup", resource), NaN of a draw without a law;
those of speedups are logs."""
_BELOW_FLOOR = "a loss that is not above its size's floor"


@dataclass(frozen=True)
class CompareSettings:
    """How to compare."""

    approach: str = "vpnls"
    """Of the baseline's law, where none is given: 3 or vpnls."""
    draws: int = 1000
    """Of the bootstrap."""
    level: float = 0.9
    seed: int = 0
    at_flops: tuple[float, ...] = ()
    """At which the trend is read; () for the largest C of the table."""

    def __post_init__(self) -> None:
        if self.approach not in ("3", "vpnls"):
            raise ValueError(f"--approach: expected 3 or vpnls, got {self.approach}")
        if self.draws < 2:
            raise ValueError(f"--bootstrap: expected at least 2 draws, got {self.draws}")
        if not 0 < self.level < 1:
            raise ValueError(f"--level: expected between 0 and 1, got {self.level}")


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with its interval."""

    value: float | None
    """None where no pair has one."""
    interval: Interval | None
    n: int
    """Pairs that have one."""


@dataclass(frozen=True)
class Group:
    """Pairs of one size, or of one budget, or all."""

    name: str
    params: float | None
    flops: float | None
    """Of the baseline, geometric mean."""
    differences: dict[str, Estimate]
    """By resource: the other's loss minus the baseline's at equal resource, nats/token."""
    speedups: dict[str, Estimate]
    """By resource: geometric mean."""
    documents: Estimate | None = None
    """Difference of losses, resampled over documents and pairs."""


@dataclass(frozen=True)
class Trend:
    """log speedup against log C over cells, a line."""

    resource: str
    per_decade: float
    """Factor of the speedup for 10 times the FLOPs."""
    per_decade_interval: Interval
    at: tuple[tuple[float, float, Interval], ...]
    """(C, speedup, interval): Student's t of n - 2 about the line."""
    n: int
    """Cells: sizes x budgets, a mean over seeds each."""


@dataclass(frozen=True)
class Frontiers:
    """The speedup in FLOPs at each objective's own best sizes."""

    speedup: float
    interval: Interval
    num_optima: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """An objective against the baseline."""

    name: str
    pairs: Pairs
    law: Surface
    overall: Group
    sizes: tuple[Group, ...]
    budgets: tuple[Group, ...]
    """By cell of size and budget where there are no budgets."""
    trends: tuple[Trend, ...]
    frontiers: Frontiers | None
    undefined: tuple[int, ...]
    """Lines of the baseline whose pair has a loss that is not above the size's floor."""
    notes: tuple[str, ...] = ()
    failures: dict[str, int] = field(default_factory=dict)
    """Draws of the bootstrap without a law, or in which some pair has no speedup, by reason."""
    resampled: str = "pairs"
    """As PairSampler.unit."""
    refits: int = 0
    """Draws of the bootstrap to which a law was fitted; 0 where it is given."""
    doubts: tuple[str, ...] = ()
    """What speaks against the law, among the notes too; of one that is given nothing is known."""

    @property
    def lawless(self) -> int:
        """Draws without a law."""
        return sum(n for reason, n in self.failures.items() if reason != _BELOW_FLOOR)

    def describe_lost(self) -> list[str]:
        """Return clauses on the draws that lack something, [] of none."""
        words, below = [], self.failures.get(_BELOW_FLOOR, 0)
        if self.lawless:
            few = not has_survived(self.refits - self.lawless, self.refits)
            end = ", too many for intervals over all pairs" if few else ""
            words.append(f"{self.lawless} of {self.refits} resamples have no law{end}")
        if below:
            words.append(f"{below} of {self.refits} resamples have {_BELOW_FLOOR}")
        return words


def fit_baseline(runs: Runs, approach: str) -> Fit:
    """Return the fit of the baseline's surface.

    Raises:
        ValueError: a table that cannot be fitted, or a law that does not fall with tokens.
    """
    settings = FitSettings(approach)
    fit = fit_runs(check_table(runs.to_table(), settings), settings)
    law = fit.surface
    if not min(law.alpha, law.beta, law.B) > 0:
        raise ValueError(f"baseline: expected B, alpha, beta above 0 of its law, got {law}")
    return fit


def compare_objectives(
    pairs: Pairs,
    base: Runs,
    other: Runs,
    settings: CompareSettings,
    law: Surface | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Return the comparison of an objective with the baseline.

    Intervals are of resampled pairs (PairSampler). Where no law is given, the baseline's is fitted
    anew to each draw, so that the interval over all pairs holds its uncertainty too; those of a
    size or a budget are under the law of all, and by Student's t where seeds are few.

    Args:
        base, other: all runs, those without a partner too: of the baseline they are in its law.
        law: of the baseline; fitted to `base` by default.
        progress: takes the number of draws done since it was last called.

    Raises:
        ValueError: no law, or documents that do not fit.
    """
    refit = _Refit(law is None and settings.approach, pairs, base)
    doubts: list[str] = []
    if law is None:
        fit = fit_baseline(base, settings.approach)
        law, doubts = fit.surface, describe_doubts(fit.converged, fit.at_bound)
        doubts = [f"law of the baseline: {doubt}" for doubt in doubts]
    make = _Grouping(pairs, law, settings, read_document_pairs(pairs))
    draws = refit.draw_all(law, settings, progress) if len(pairs) > 1 else None
    speedups = pair_speedups(pairs, law)
    undefined = pairs.base.lines[np.isnan(speedups["tokens"])]
    frontiers, notes = _compare_frontiers(pairs, base, other, law, settings)
    trends, more = _find_trends(pairs, speedups, settings)
    return Comparison(
        name=pairs.name,
        pairs=pairs,
        law=law,
        overall=make.group("all", np.arange(len(pairs)), draws),
        sizes=tuple(make.by(pairs.sizes, "N")),
        budgets=tuple(make.by(pairs.cells if base.budgets is None else _budgets(pairs), "C")),
        trends=trends,
        frontiers=frontiers,
        undefined=tuple(map(int, undefined)),
        notes=(*doubts, *notes, *more),
        failures=refit.failures,
        resampled=PairSampler(pairs.cells, settings.seed).unit,
        refits=0 if draws is None else settings.draws,
        doubts=tuple(doubts),
    )


def _budgets(pairs: Pairs) -> np.ndarray:
    return np.unique(pairs.base.budgets, return_inverse=True)[1]


class _Refit:
    """Draws of the means over all pairs, the baseline's law being fitted to each or not."""

    def __init__(self, approach: str | bool, pairs: Pairs, base: Runs) -> None:
        self._approach, self._pairs = approach, pairs
        paired = set(pairs.base.lines.tolist())
        self._lone = base.take([i for i, line in enumerate(base.lines) if line not in paired])
        self.failures: dict[str, int] = {}

    def draw_all(
        self, law: Surface, settings: CompareSettings, progress: Callable[[int], None] | None
    ) -> _Draws | None:
        """Return the draws, None where the law is known: `_Grouping` draws those by itself."""
        if not self._approach:
            return None
        sampler = PairSampler(self._pairs.cells, settings.seed)
        rng = np.random.default_rng([settings.seed, 1])
        found = {key: np.full(settings.draws, np.nan) for key in _pair_values(self._pairs, law)}
        for draw in range(settings.draws):
            weights = sampler.draw()
            drawn = self._fit(weights, law, rng)
            if drawn is not None:
                for key, mean in self._means(weights, drawn).items():
                    found[key][draw] = mean
            if progress is not None:
                progress(1)
        return found

    def _fit(self, weights: np.ndarray, law: Surface, rng: np.random.Generator) -> Surface | None:
        """Return the law of a draw, and of as many of the baseline's lone runs."""
        # A draw of seeds weighs each by count / (count - 1); the fit takes whole runs.
        times = np.where(weights > 0, np.maximum(1, np.rint(weights)), 0).astype(int)
        table = self._pairs.base.take(np.repeat(np.arange(len(times)), times)).to_table()
        if len(self._lone):
            lone = self._lone.take(rng.integers(0, len(self._lone), len(self._lone)))
            table = _join(table, lone.to_table())
        try:
            found = fit_runs(table, FitSettings(self._approach), start=law).surface
        except ValueError as error:
            self._count(str(error))
            return None
        if not min(found.alpha, found.beta, found.B) > 0:
            self._count("a law that does not fall with tokens")
            return None
        return found

    def _means(self, weights: np.ndarray, law: Surface) -> dict[tuple[str, str], float]:
        values = _pair_values(self._pairs, law)
        if any(np.isnan(v[weights > 0]).any() for v in values.values()):
            self._count(_BELOW_FLOOR)
        return {key: float(_weigh(weights[None], v)[0]) for key, v in values.items()}

    def _count(self, reason: str) -> None:
        self.failures[reason] = self.failures.get(reason, 0) + 1


def _pair_values(pairs: Pairs, law: Surface) -> dict[tuple[str, str], np.ndarray]:
    """Return differences and log speedups [n] by (what, resource)."""
    values = {("difference", r): v for r, v in pair_differences(pairs, law).items()}
    return values | {("speedup", r): np.log(v) for r, v in pair_speedups(pairs, law).items()}


def _weigh(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return weighted means [draws] of the values that are numbers; NaN where none is drawn."""
    there = np.isfinite(values)
    total = weights[:, there].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights[:, there] @ values[there] / total


def _join(left: RunTable, right: RunTable) -> RunTable:
    names = ("lines", "params", "tokens", "flops", "loss", "curves", "budgets")
    return RunTable(
        **{name: np.concatenate([getattr(left, name), getattr(right, name)]) for name in names}
    )


class _Grouping:
    """Estimates of groups of pairs."""

    def __init__(
        self, pairs: Pairs, law: Surface, settings: CompareSettings, documents: DocumentPairs | None
    ) -> None:
        self.pairs, self.law, self.settings = pairs, law, settings
        self.documents = documents

    def by(self, labels: np.ndarray, what: str) -> list[Group]:
        """Return the group of each label."""
        groups = []
        for label in np.unique(labels):
            index = np.flatnonzero(labels == label)
            base = self.pairs.base
            value = np.exp(np.log(base.params[index] if what == "N" else base.flops[index]).mean())
            groups.append(self.group(f"{what} = {value:.3g}", index))
        return groups

    def group(self, name: str, index: np.ndarray, draws: _Draws | None = None) -> Group:
        """Return the group of some pairs, with intervals from `draws` or under the one law."""
        pairs = self.pairs.take(index)
        found: dict[str, dict[str, Estimate]] = {"difference": {}, "speedup": {}}
        for (what, resource), values in _pair_values(pairs, self.law).items():
            drawn = None if draws is None else draws[what, resource]
            estimate = self._estimate(values, pairs.cells, drawn)
            found[what][resource] = _exp_estimate(estimate) if what == "speedup" else estimate
        return Group(
            name=name,
            params=float(pairs.base.params[0]) if len(set(pairs.sizes.tolist())) == 1 else None,
            flops=float(np.exp(np.log(pairs.base.flops).mean())),
            differences=found["difference"],
            speedups=found["speedup"],
            documents=self._documents(index),
        )

    def _estimate(
        self, values: np.ndarray, cells: np.ndarray, drawn: np.ndarray | None
    ) -> Estimate:
        settings, there = self.settings, np.isfinite(values)
        values, cells = values[there], cells[there]
        if drawn is not None and count_freedom(cells) >= MIN_FREEDOM:
            interval = surviving_interval(drawn, settings.level)
        else:
            chosen = (settings.draws, settings.level, settings.seed)
            interval = mean_interval(values, cells, *chosen)
        return Estimate(float(values.mean()) if len(values) else None, interval, len(values))

    def _documents(self, index: np.ndarray) -> Estimate | None:
        if self.documents is None:
            return None
        chosen = DocumentPairs(self.documents.nats[index], self.documents.tokens)
        settings = self.settings
        sampler = PairSampler(self.pairs.cells[index], settings.seed)
        interval = chosen.interval(sampler, settings.draws, settings.level, settings.seed)
        return Estimate(chosen.difference, interval, len(index))


def _find_trends(
    pairs: Pairs, speedups: dict[str, np.ndarray], settings: CompareSettings
) -> tuple[tuple[Trend, ...], tuple[str, ...]]:
    cells = np.unique(pairs.cells)
    x = np.array([np.log10(pairs.base.flops[pairs.cells == cell]).mean() for cell in cells])
    at = settings.at_flops or (float(10 ** x.max()),)
    trends = []
    for resource, values in speedups.items():
        y = np.array([np.log(values[pairs.cells == cell]).mean() for cell in cells])
        here = np.isfinite(y)
        try:
            line = fit_line(x[here], y[here])
        except ValueError as error:
            return (), (f"no trend of speedups with C: {error}",)
        slope = line.slope_interval(settings.level)
        read = [(flops, *line.at(math.log10(flops), settings.level)) for flops in at]
        trends.append(
            Trend(
                resource=resource,
                per_decade=math.exp(line.slope),
                per_decade_interval=_exp(slope),
                at=tuple((flops, math.exp(value), _exp(found)) for flops, value, found in read),
                n=line.n,
            )
        )
    return tuple(trends), ()


def _exp(interval: Interval) -> Interval:
    low, high = (math.exp(min(x, 700.0)) for x in (interval.low, interval.high))
    return replace(interval, low=low, high=high)


def _exp_estimate(found: Estimate) -> Estimate:
    value = None if found.value is None else math.exp(found.value)
    return Estimate(value, found.interval and _exp(found.interval), found.n)


def _compare_frontiers(
    pairs: Pairs, base: Runs, other: Runs, law: Surface, settings: CompareSettings
) -> tuple[Frontiers | None, tuple[str, ...]]:
    """Return the frontiers' speedup, or why there is none."""
    sides = [find_isoflop_optima(runs.to_table())[0] for runs in (base, other)]
    try:
        if not min(law.A, law.alpha) > 0:
            raise ValueError(f"the baseline's law has no optimum: {law}")
        if min(map(len, sides)) == 0:
            raise ValueError("no budget has an optimum between two sizes")
        speedup, interval = frontier_speedup(*sides, law, settings.level)
    except ValueError as error:
        return None, (f"no speedup at the best sizes: {error}",)
    return Frontiers(speedup, interval, (len(sides[0]), len(sides[1]))), ()
