"""Two laws of one E against known surfaces and scipy's own search; the test of one law for both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scaling_runs import LAWS, make_runs
from scipy.optimize import approx_fprime, curve_fit

from megatron_emo.scaling.comparison.joint import JointProblem, fit_joint
from megatron_emo.scaling.comparison.joint_compare import compare_laws, describe_test, format_test
from megatron_emo.scaling.comparison.pairs import pair_runs
from megatron_emo.scaling.laws.surfaces import Surface

MLE = LAWS["mle"]
OTHER = Surface(E=1.69, A=300.0, B=500.0, alpha=0.33, beta=0.30)
NUMBERS = ("E", "A", "B", "alpha", "beta")


def draw_pairs(other: Surface, seed: int, budgets: int = 4):
    """Pairs with 0.3% of noise in the log, two parts of three shared."""
    rng = np.random.default_rng(seed)
    shared, *own = rng.normal(0, [[0.002], [0.001], [0.001]], (3, 5 * budgets))
    return pair_runs(
        make_runs(MLE, shared + own[0], budgets), make_runs(other, shared + own[1], budgets), "emo"
    )


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (MLE, OTHER),
        (Surface(0.8, 50.0, 2000.0, 0.25, 0.42), Surface(0.8, 90.0, 900.0, 0.31, 0.37)),
        (Surface(2.5, 1e4, 1e3, 0.6, 0.35), Surface(2.5, 1e4, 1e3, 0.6, 0.35)),
    ],
)
def test_known_laws_come_back(base, other):
    found = fit_joint(make_runs(base), make_runs(other, budgets=3))
    assert found.laws[0].E == found.laws[1].E and found.converged and not found.at_bound
    for law, truth in zip(found.laws, (base, other), strict=True):
        for name in NUMBERS:
            assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert [len(values) for values in found.residuals] == [20, 15]


def test_known_laws_come_back_from_afar():
    found = fit_joint(make_runs(MLE), make_runs(OTHER), [np.array([0.5, 0.6, 0.2, 0.2])])
    for law, truth in zip(found.laws, (MLE, OTHER), strict=True):
        for name in NUMBERS:
            assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=1e-6)


def test_the_fit_is_that_of_a_search_over_all_nine_numbers():
    pairs = draw_pairs(OTHER, 1)
    found = fit_joint(pairs.base, pairs.other)
    count = len(pairs)
    places = np.stack([np.log(values) for values in (pairs.base.params, pairs.base.tokens)])

    def predict(_, floor, a1, alpha1, b1, beta1, a2, alpha2, b2, beta2):
        sides = ((a1, alpha1, b1, beta1), (a2, alpha2, b2, beta2))
        x, y = places - places.mean(axis=1, keepdims=True)
        return np.concatenate(
            [floor + np.exp(a - alpha * x) + np.exp(b - beta * y) for a, alpha, b, beta in sides]
        )

    loss = np.concatenate([pairs.base.loss, pairs.other.loss])
    start = (1.5, 0.7, 0.4, 0.7, 0.4, 0.7, 0.4, 0.7, 0.4)
    best, _ = curve_fit(predict, np.arange(2 * count), loss, start, xtol=1e-13, ftol=1e-13)
    assert found.objective == pytest.approx(np.square(predict(None, *best) - loss).sum(), rel=1e-9)
    ours = [found.laws[0].E, found.laws[0].alpha, found.laws[1].beta]
    np.testing.assert_allclose(ours, best[[0, 2, 8]], rtol=1e-4)


def test_the_gradient_is_exact():
    pairs = draw_pairs(OTHER, 2)
    problem = JointProblem(pairs.base, pairs.other)
    at = np.array([0.3, 0.35, 0.25, 0.4])
    gradient = problem.residuals(at) @ problem.jacobian(at)
    slope = approx_fprime(at, lambda e: 0.5 * np.square(problem.residuals(e)).sum(), 1e-7)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)


def test_a_floor_of_nothing_is_told():
    base, other = Surface(0.0, 50.0, 2000.0, 0.25, 0.42), Surface(0.0, 90.0, 900.0, 0.31, 0.37)
    rng = np.random.default_rng(3)
    sides = [make_runs(law, rng.normal(0, 1e-3, 20)) for law in (base, other)]
    found = fit_joint(*(replace(runs, loss=runs.loss - 0.3) for runs in sides))
    assert found.laws[0].E == 0 and found.at_bound[0] == "E"


def test_noise_alone_is_no_second_law_and_two_laws_are():
    alike = [compare_laws(draw_pairs(MLE, seed), 19, 0.9, seed).p for seed in range(3)]
    assert np.mean(alike) > 0.25 and max(alike) > 0.5
    found = compare_laws(draw_pairs(OTHER, 7), 19, 0.9, 7)
    assert found.p == 1 / 20 and found.statistic > found.draws.max()
    assert found.intervals["E"].low < 1.69 < found.intervals["E"].high
    for side, law in zip(("base", "other"), (MLE, OTHER), strict=True):
        interval = found.intervals[f"{side} beta"]
        assert interval.low - 0.02 < law.beta < interval.high + 0.02


@pytest.mark.slow
def test_p_values_are_level_under_one_law_and_small_under_two():
    alike = [compare_laws(draw_pairs(MLE, seed), 19, 0.9, seed).p for seed in range(40)]
    # Of 40 draws at a level of 10%, 9 or more come up once in a hundred times.
    assert np.sum(np.array(alike) <= 0.1) <= 9
    assert 0.3 < np.mean(alike) < 0.7
    apart = [compare_laws(draw_pairs(OTHER, seed), 19, 0.9, seed).p for seed in range(20)]
    assert max(apart) == 0.05


def test_what_pairs_share_is_shared_in_draws():
    """Noise common to a pair moves both laws alike: without it shared, the test would be blind."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.01, 20)
    close = Surface(MLE.E, MLE.A * 0.997, MLE.B * 0.997, MLE.alpha, MLE.beta)
    sides = [make_runs(law, noise + rng.normal(0, 1e-4, 20)) for law in (MLE, close)]
    together = compare_laws(pair_runs(*sides, "emo"), 19, 0.9, 0)
    order = rng.permutation(20)
    torn = replace(sides[1], loss=close.loss(sides[1].params, sides[1].tokens))
    torn = replace(torn, loss=torn.loss * np.exp(noise[order]))
    apart = compare_laws(pair_runs(sides[0], torn, "emo"), 19, 0.9, 0)
    assert together.p == 1 / 20 < apart.p


def test_without_noise_there_is_nothing_to_tell():
    found = compare_laws(pair_runs(make_runs(MLE), make_runs(MLE), "emo"), 5, 0.9, 0)
    assert found.statistic == 0 and found.p == 1
    said = "\n".join(format_test(found, "mle", "emo"))
    assert "p = 1" in said and "E = 1.69" in said and "WARNING" not in said
    told = describe_test(found)
    assert told["base"] == pytest.approx(MLE.to_json(), rel=1e-6) and told["n"] == 20


def test_too_little_is_refused():
    pairs = draw_pairs(OTHER, 0)
    with pytest.raises(ValueError, match="emo: expected at least 8 pairs for a joint fit, got 7"):
        compare_laws(pairs.take(np.arange(7)), 10, 0.9, 0)
    with pytest.raises(ValueError, match="--joint: expected at least 2 draws, got 1"):
        compare_laws(pairs, 1, 0.9, 0)
