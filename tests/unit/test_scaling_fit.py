"""Fits of scaling laws, on surfaces that are known and against scipy on other roads."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from scipy.optimize import approx_fprime, least_squares, minimize_scalar
from scipy.special import huber

from megatron_emo.scaling.laws.bootstrap import bootstrap_fit, resample
from megatron_emo.scaling.laws.envelope import find_envelope_optima
from megatron_emo.scaling.laws.fit import FitSettings, check_table, fit_runs, leave_out_largest
from megatron_emo.scaling.laws.frontier import Optima, fit_frontier
from megatron_emo.scaling.laws.huber import DELTA, HuberProblem, fit_huber
from megatron_emo.scaling.laws.isoflop import find_isoflop_optima, find_vertex
from megatron_emo.scaling.laws.projection import ProjectedProblem, fit_projection
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.laws.table import (
    drop_highest,
    group_values,
    make_run_table,
    parse_columns,
    read_run_table,
)

HOFFMANN = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
SURFACES = {
    "hoffmann": HOFFMANN,
    "besiroglu": Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
    "steep in D": Surface(E=0.6, A=30, B=900, alpha=0.15, beta=0.45),
    "steep in N": Surface(E=2.5, A=5000, B=60, alpha=0.6, beta=0.18),
}
PUBLISHED = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
SMALL = np.array([1e13, 3e13, 1e14, 3e14])


def isoflop_runs(surface, budgets, num_sizes=10, noise=0.0, seed=0, width=10.0):
    """Sizes from 1/width to width times the best one of each budget."""
    sizes = surface.optimum(budgets)[0][:, None] * np.geomspace(1 / width, width, num_sizes)
    params, tokens = sizes.ravel(), (budgets[:, None] / 6 / sizes).ravel()
    rng = np.random.default_rng(seed)
    loss = surface.loss(params, tokens) * np.exp(rng.normal(0, noise, len(params)))
    return make_run_table(params, loss, tokens)


def errors_of(found, truth, names=("E", "alpha", "beta")):
    return [abs(getattr(found, name) - getattr(truth, name)) for name in names]


def test_the_optimum_is_where_a_search_finds_it():
    for surface in SURFACES.values():
        for flops in (1e14, 1e21):
            found = minimize_scalar(
                lambda x, s=surface, c=flops: s.loss(np.exp(x), c / 6 / np.exp(x)),
                bracket=(10, 20),
                options={"xtol": 1e-9},
            )
            params, tokens = surface.optimum(flops)
            assert np.log(params) == pytest.approx(found.x, abs=1e-6)
            assert 6 * params * tokens == pytest.approx(flops)


@pytest.mark.parametrize(
    ("name", "budgets"),
    [*((name, PUBLISHED) for name in SURFACES), ("hoffmann", SMALL)],
    ids=[*SURFACES, "hoffmann, laptop"],
)
def test_surfaces_without_noise_are_recovered(name, budgets):
    truth, table = SURFACES[name], isoflop_runs(SURFACES[name], budgets, 6)
    points = (table.params, table.tokens, table.loss)
    for fit, bound in ((fit_huber, 1e-8), (fit_projection, 1e-10)):
        found = fit(*points)
        assert max(errors_of(found.surface, truth)) < bound
        assert found.surface.A == pytest.approx(truth.A, rel=1e-6)
        assert found.surface.B == pytest.approx(truth.B, rel=1e-6)
        assert found.converged and found.at_bound == () and found.objective < 1e-20


def test_huber_gradient_is_that_of_differences():
    table = isoflop_runs(HOFFMANN, PUBLISHED, noise=0.002)
    problem = HuberProblem(table.params, table.tokens, table.loss)
    theta = problem.from_surface(HOFFMANN) + [0.001, 0.002, -0.001, 0.001, 0.002]
    _, gradient = problem.value_and_gradient(theta)
    numeric = approx_fprime(theta, lambda t: problem.value_and_gradient(t)[0], 1e-8)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4)
    value = problem.penalties(problem.residuals(theta)).sum()
    assert value == pytest.approx(problem.value_and_gradient(theta)[0], rel=1e-12)


def test_huber_objective_is_summed_and_no_other_road_finds_less():
    table = isoflop_runs(HOFFMANN, PUBLISHED, 12, noise=0.004)
    found = fit_huber(table.params, table.tokens, table.loss)
    log_loss = np.log(found.surface.loss(table.params, table.tokens))
    residuals = log_loss - np.log(table.loss)
    np.testing.assert_allclose(found.residuals, residuals, atol=1e-12)
    assert found.objective == pytest.approx(huber(DELTA, residuals).sum(), rel=1e-10)

    def misses(p):
        surface = Surface(*np.exp(p[:3]), *p[3:])
        return np.log(surface.loss(table.params, table.tokens)) - np.log(table.loss)

    start = [*np.log([1.69, 406.4, 410.7]), 0.34, 0.28]
    other = least_squares(
        misses, start, loss="huber", f_scale=DELTA, x_scale="jac", max_nfev=5000, ftol=1e-15
    )
    assert found.converged
    assert found.objective <= huber(DELTA, misses(other.x)).sum() * (1 + 1e-9)
    assert np.abs(residuals).max() > 5 * DELTA


def test_projection_equals_least_squares_over_all_five():
    table = isoflop_runs(HOFFMANN, PUBLISHED, 12, noise=0.004)
    found = fit_projection(table.params, table.tokens, table.loss)

    def misses(p):
        # Terms at the middle size, so that the five are of one order.
        terms = [p[1] * (table.params / 1e9) ** -p[3], p[2] * (table.tokens / 1e10) ** -p[4]]
        return p[0] + sum(terms) - table.loss

    other = least_squares(misses, [1.7, 0.4, 0.6, 0.3, 0.3], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    surface = found.surface
    np.testing.assert_allclose(
        [surface.E, surface.alpha, surface.beta], other.x[[0, 3, 4]], atol=1e-6
    )
    assert found.objective == pytest.approx(2 * other.cost, rel=1e-9)
    predicted = surface.loss(table.params, table.tokens)
    np.testing.assert_allclose(found.residuals, predicted - table.loss, atol=1e-12)


def test_projection_gradient_is_that_of_differences():
    table = isoflop_runs(HOFFMANN, PUBLISHED, noise=0.004)
    problem = ProjectedProblem(table.params, table.tokens, table.loss)
    exponents = np.array([0.4, 0.25])
    gradient = problem.jacobian(exponents).T @ problem.residuals(exponents)
    numeric = approx_fprime(exponents, lambda e: 0.5 * np.square(problem.residuals(e)).sum(), 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4)


def test_one_wrong_point_moves_huber_less():
    table = isoflop_runs(HOFFMANN, PUBLISHED, 12, noise=1e-4)
    table.loss[40] *= 1.2
    points = (table.params, table.tokens, table.loss)
    robust = max(errors_of(fit_huber(*points).surface, HOFFMANN))
    plain = max(errors_of(fit_projection(*points).surface, HOFFMANN))
    assert robust < 0.01 and plain > 3 * robust


def test_a_term_that_is_not_there_is_flagged():
    surface = Surface(E=2.0, A=300.0, B=0.0, alpha=0.3, beta=0.3)
    design = isoflop_runs(HOFFMANN, PUBLISHED)
    loss = surface.loss(design.params, design.tokens)
    found = fit_projection(design.params, design.tokens, loss + 1e-3 * (design.tokens / 1e12))
    assert "B" in found.at_bound
    found = fit_huber(design.params, design.tokens, loss)
    assert {"B", "beta"} & set(found.at_bound)
    floorless = Surface(E=0.0, A=406.4, B=410.7, alpha=0.34, beta=0.28)
    loss = floorless.loss(design.params, design.tokens)
    for fit in (fit_huber, fit_projection):
        found = fit(design.params, design.tokens, loss - 0.01)
        assert found.at_bound == ("E",)


def test_what_a_step_takes_beyond_its_bound_stays_there_and_the_others_go_on():
    table = isoflop_runs(Surface(0.0, 400, 2000, 0.2, 0.15), SMALL, 5, width=4)
    points = (table.params, table.tokens, table.loss)
    found = fit_huber(*points)
    other = fit_huber(*points, start=fit_projection(*points).surface)
    assert found.converged and found.at_bound == ("E",)
    assert found.objective == pytest.approx(other.objective, rel=1e-6) and found.objective < 1e-9


def test_coefficients_are_never_below_nothing():
    truth = Surface(0.0, 400, 2000, 0.2, 0.15)
    table = isoflop_runs(truth, PUBLISHED[:4], 5, width=4)
    found = fit_projection(table.params, table.tokens, table.loss)
    assert found.surface.E >= 0


def test_parabolas_have_their_vertices():
    x = np.linspace(-3, 4, 9) + 20
    place, least, fitted = find_vertex(x, 2.5 + 0.3 * (x - 20.7) ** 2, "parabola")
    assert (place, least) == (pytest.approx(20.7), pytest.approx(2.5))
    np.testing.assert_allclose(fitted, 2.5 + 0.3 * (x - 20.7) ** 2)


def test_akima_finds_the_least_of_its_curve():
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 5, 12))
    loss = (x - 2.2) ** 2 + 0.05 * rng.normal(size=12)
    place, least, fitted = find_vertex(x, loss, "akima")
    np.testing.assert_allclose(fitted, loss, atol=1e-12)
    from scipy.interpolate import Akima1DInterpolator

    dense = np.linspace(x[0], x[-1], 400001)
    values = Akima1DInterpolator(x, loss, method="makima")(dense)
    assert least == pytest.approx(values.min(), abs=1e-9) and least <= values.min() + 1e-15
    assert place == pytest.approx(dense[values.argmin()], abs=2e-5)
    # A size measured twice counts by its mean.
    twice = find_vertex(np.append(x, x[3]), np.append(loss, loss[3]), "akima")
    assert twice[0] == pytest.approx(place)


@pytest.mark.parametrize(
    ("loss", "kind", "reason"),
    [
        ([5, 4, 3, 2, 1.5], "parabola", "edge optimum"),
        ([5, 4, 3, 2, 1], "akima", "edge optimum"),
        ([1, 2, 2.5, 2, 1], "parabola", "opens downwards"),
        ([1, 2, 2.5, 2, 1], "akima", "edge optimum"),
    ],
)
def test_curves_without_a_bracketed_optimum_are_refused(loss, kind, reason):
    with pytest.raises(ValueError, match=reason):
        find_vertex(np.arange(5.0), np.array(loss, float), kind)


@pytest.mark.parametrize("vertex", ["parabola", "akima"])
def test_isoflop_finds_the_exponents_of_a_symmetric_surface(vertex):
    surface = Surface(E=1.7, A=400.0, B=400.0, alpha=0.3, beta=0.3)
    table = isoflop_runs(surface, PUBLISHED, 11)
    fit = fit_runs(table, FitSettings("2", vertex))
    assert fit.parameters["a"] == pytest.approx(0.5, abs=1e-6)
    assert fit.parameters["b"] == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_allclose(fit.optima.params, surface.optimum(PUBLISHED)[0], rtol=1e-6)


def test_akima_is_nearer_than_a_parabola_where_curves_are_lopsided():
    surface = SURFACES["steep in D"]
    table = isoflop_runs(surface, PUBLISHED, 41, width=30)
    truth = np.log(surface.optimum(PUBLISHED)[0])
    misses = {
        vertex: np.abs(np.log(find_isoflop_optima(table, vertex)[0].params) - truth).max()
        for vertex in ("parabola", "akima")
    }
    assert misses["akima"] < 0.01 < 0.1 < misses["parabola"]


def test_budgets_off_centre_are_refused_by_name():
    table = isoflop_runs(HOFFMANN, PUBLISHED, 6)
    keep = (table.budgets > 0) | (table.params > HOFFMANN.optimum(6e18)[0] * 3)
    extra = table.take(table.budgets == 0)
    fit = fit_runs(table.take(keep), FitSettings("2"))
    assert len(extra) == 6 and len(fit.optima) == 8
    (refused,) = fit.refused
    assert refused.name == "budget 6e+18" and refused.num_points == 2
    assert np.isnan(fit.residuals[table.take(keep).budgets == 0]).all()


@pytest.mark.parametrize("name", SURFACES)
def test_a_frontier_gives_back_its_surface(name):
    surface = SURFACES[name]
    params, tokens = surface.optimum(PUBLISHED)
    optima = Optima(PUBLISHED, params, tokens, surface.loss(params, tokens))
    frontier = fit_frontier(optima)
    assert frontier.a == pytest.approx(surface.a, abs=1e-9)
    found = np.array(list(asdict(frontier.surface).values()))
    np.testing.assert_allclose(found, list(asdict(surface).values()), rtol=1e-4)
    np.testing.assert_allclose(frontier.params(PUBLISHED), params, rtol=1e-9)


def training_curves(surface, num_sizes=20, seed=None):
    sizes = np.geomspace(5e7, 5e10, num_sizes)[:, None]
    tokens = sizes * np.geomspace(1, 1000, 20)
    params = np.broadcast_to(sizes, tokens.shape)
    loss = surface.loss(params, tokens)
    return make_run_table(params.ravel(), loss.ravel(), tokens.ravel())


def test_the_envelope_is_that_of_a_dense_search():
    table = training_curves(HOFFMANN)
    optima, refused, size = find_envelope_optima(table)
    assert sum(part.num_points for part in refused) + len(optima) == 1500
    sizes = np.unique(table.params)
    losses = HOFFMANN.loss(sizes[:, None], optima.flops / 6 / sizes[:, None])
    losses[[0, -1]] = np.inf
    agree = sizes[losses.argmin(axis=0)] == optima.params
    assert agree.mean() > 0.99 and (size > 0).all() and (size < 19).all()
    np.testing.assert_allclose(6 * optima.params * optima.tokens, optima.flops, rtol=1e-3)
    fit = fit_runs(table, FitSettings("1"))
    assert fit.parameters["a"] == pytest.approx(HOFFMANN.a, abs=0.005)
    assert fit.parameters["E"] == pytest.approx(HOFFMANN.E, abs=0.01)


def test_the_envelope_needs_curves_of_both_neighbours():
    table = training_curves(HOFFMANN)
    sizes = np.unique(table.params)
    cut = ~((table.params == sizes[10]) & (table.tokens > 15 * table.params))
    optima, refused, _ = find_envelope_optima(table.take(cut))
    assert refused[1].reason == "the next smaller or larger size has no curve there"
    ends = 6 * sizes[10] * table.tokens[cut & (table.params == sizes[10])].max()
    neighbours = np.isin(optima.params, [sizes[9], sizes[11]])
    assert not (neighbours & (optima.flops > ends * 1.01)).any()


@pytest.mark.parametrize("approach", ["1", "2", "3", "vpnls"])
def test_tables_that_are_too_small_are_refused_with_counts(approach):
    settings = FitSettings(approach)
    if approach == "1":
        sizes = np.array([1e8, 1e9])
        table = make_run_table(
            np.repeat(sizes, 6), np.ones(12), np.tile(np.geomspace(1e9, 1e11, 6), 2)
        )
        few = make_run_table(
            np.repeat([1e8, 1e9, 1e10], 3), np.ones(9), np.tile([1e9, 1e10, 1e11], 3)
        )
        kind, short = "curves", "4 points a curve, got 3 at N = 1e"
    else:
        table = isoflop_runs(HOFFMANN, PUBLISHED[:2], 8)
        few = isoflop_runs(HOFFMANN, PUBLISHED[:3], 3)
        kind = "budgets"
        short = (
            "4 points a budget, got 3 at C = 6" if approach == "2" else "12 points .*, got 9 in 3"
        )
    with pytest.raises(ValueError, match=rf"expected at least 3 {kind}, got 2: \d+ at ._?"):
        check_table(table, settings)
    with pytest.raises(ValueError, match=f"--approach {approach}: expected at least {short}"):
        check_table(few, settings)


def test_short_curves_can_be_left_out_and_are_named():
    table = isoflop_runs(HOFFMANN, PUBLISHED[:4], 5)
    table = table.take(np.arange(18))
    with pytest.raises(ValueError, match="got 3 at C = 6e"):
        check_table(table, FitSettings("2"))
    kept = check_table(table, FitSettings("2", drop_short_curves=True))
    assert len(kept) == 15
    assert [(p.line, p.reason) for p in kept.dropped] == [
        (line, "budget of fewer than 4 points") for line in (17, 18, 19)
    ]


def test_sizes_in_proportion_to_tokens_are_refused():
    params = np.geomspace(1e7, 1e9, 15)
    table = make_run_table(params, HOFFMANN.loss(params, 20 * params), 20 * params)
    for approach in ("3", "vpnls"):
        with pytest.raises(ValueError, match="expected N and D that vary apart"):
            check_table(table, FitSettings(approach))


def test_groups_are_ascending_and_bounded():
    values = np.array([3e20, 1e19, 1.05e19, 2.9e20, 1e19, 1.3e19])
    np.testing.assert_array_equal(group_values(values, 0.2), [2, 0, 0, 2, 0, 1])
    assert group_values(np.array([5.0]), 0.0).tolist() == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params=N,loss=L", "expected flops=NAME or tokens=NAME"),
        ("flops=C,loss=L", "expected params=NAME"),
        ("params=N,flops=C", "expected loss=NAME"),
        ("params=N,params=M,flops=C,loss=L", "each role once"),
        ("size=N", "expected ROLE=NAME"),
        ("params=,flops=C,loss=L", "params: expected a column's name"),
    ],
)
def test_columns_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_columns(text)


def test_column_names_may_hold_commas_and_equal_signs():
    found = parse_columns("params=Size, non-embedding,flops=C=6ND,loss=val, nats")
    assert found == {"params": "Size, non-embedding", "flops": "C=6ND", "loss": "val, nats"}


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_without_a_number_are_dropped_and_named(tmp_path):
    path = write(
        tmp_path / "runs.csv",
        ["N,C,L,kind", "1e8,6e18,3.0,mle", "1e8,6e18,,mle", "1e8,6e18,nan,mle", "2e8,6e18,9,emo"],
    )
    columns = parse_columns("params=N,flops=C,loss=L")
    table = read_run_table(path, columns, where={"kind": "mle"})
    assert table.lines.tolist() == [2] and table.tokens == pytest.approx([1e10])
    assert [(p.line, p.reason) for p in table.dropped] == [(3, "L: empty"), (4, "L: nan")]
    assert table.notes == ("no tokens column: D = C / (6 N)",)
    with pytest.raises(ValueError, match="--columns: 'X': expected one of"):
        read_run_table(path, {**columns, "loss": "X"})
    with pytest.raises(ValueError, match="--where: 'X': expected one of"):
        read_run_table(path, columns, where={"X": "mle"})
    with pytest.raises(ValueError, match="expected rows, got none"):
        read_run_table(path, columns, where={"kind": "mixce"})


@pytest.mark.parametrize("cell", ["0", "-1", "70M"])
def test_cells_that_are_no_measurement_are_errors(tmp_path, cell):
    path = write(tmp_path / "runs.csv", ["N,D,L", "1e8,1e9,3", f"{cell},1e9,3"])
    with pytest.raises(ValueError, match=f"line 3, 'N': expected a number above 0, got '{cell}'"):
        read_run_table(path, parse_columns("params=N,tokens=D,loss=L"))


def test_white_space_about_a_text_counts_for_nothing(tmp_path):
    path = write(
        tmp_path / "runs.csv", ["way,N,D,L,k", " emo,1,2,3, a", "emo ,2,3,4,a", "mle,1,2,3,a"]
    )
    columns = {"params": "N", "tokens": "D", "loss": "L", "curve": "k"}
    table = read_run_table(path, columns, where={"way": "emo "})
    assert table.lines.tolist() == [2, 3] and table.curves.tolist() == [0, 0]


def test_the_highest_losses_are_dropped_by_name():
    table = isoflop_runs(HOFFMANN, PUBLISHED)
    kept = drop_highest(table, 3)
    assert len(kept) == len(table) - 3 and kept.loss.max() <= np.sort(table.loss)[-4]
    assert {p.line for p in kept.dropped} == set(table.lines[np.argsort(table.loss)[-3:]])
    for count in (-1, len(table)):
        with pytest.raises(ValueError, match="--drop-highest: expected 0 to 89"):
            drop_highest(table, count)


@pytest.mark.parametrize("approach", ["2", "3", "vpnls"])
def test_the_largest_budget_is_predicted_from_the_others(approach):
    surface = Surface(E=1.7, A=400.0, B=400.0, alpha=0.3, beta=0.3)
    table = isoflop_runs(surface, PUBLISHED, 9)
    held = leave_out_largest(table, FitSettings(approach))
    assert held["flops"] == pytest.approx(3e21)
    if approach == "2":
        assert abs(held["log_ratio"]) < 1e-6
        return
    assert held["n"] == 9 and held["max_error"] < 1e-6
    table.loss[table.budgets == 8] += 0.1
    held = leave_out_largest(table, FitSettings(approach))
    assert held["mean_error"] == pytest.approx(-0.1, abs=1e-6)
    assert held["rms_error"] == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("approach", ["1", "2", "3", "vpnls"])
def test_resamples_of_the_same_seed_are_the_same_in_any_number_of_processes(approach):
    table = (
        training_curves(HOFFMANN, 14)
        if approach == "1"
        else isoflop_runs(HOFFMANN, PUBLISHED[::2], 8, noise=0.003)
    )
    settings = FitSettings(approach)
    fit = fit_runs(table, settings)
    runs = [
        bootstrap_fit(table, settings, fit, 12, seed=3, jobs=jobs, unit="curve")
        for jobs in ((1, 2) if approach == "vpnls" else (1, 1))
    ]
    for name, values in runs[0].draws.items():
        np.testing.assert_array_equal(values, runs[1].draws[name])
    assert np.isfinite(runs[0].draws["a"]).sum() + sum(runs[0].failures.values()) == 12
    other = bootstrap_fit(table, settings, fit, 12, seed=4, unit="curve")
    assert other.draws["a"].tolist() != runs[0].draws["a"].tolist()


def test_descents_from_the_whole_table_end_where_the_grid_does():
    table = isoflop_runs(HOFFMANN, PUBLISHED, 8, noise=0.005)
    whole = fit_huber(table.params, table.tokens, table.loss).surface
    for draw in range(5):
        sample = resample(table, "3", "point", np.random.default_rng(draw))
        points = (sample.params, sample.tokens, sample.loss)
        warm, grid = fit_huber(*points, start=whole), fit_huber(*points)
        assert warm.objective == pytest.approx(grid.objective, rel=1e-10)
        assert warm.surface.alpha == pytest.approx(grid.surface.alpha, abs=1e-6)


def test_resamples_keep_to_their_unit():
    rng = np.random.default_rng(0)
    table = isoflop_runs(HOFFMANN, PUBLISHED, 6)
    by_point = resample(table, "2", "point", rng)
    np.testing.assert_array_equal(by_point.budgets, table.budgets)
    assert len(np.unique(by_point.lines)) < len(table)
    by_curve = resample(table, "2", "curve", rng)
    assert np.bincount(by_curve.budgets).tolist() == [6] * 9
    for label in range(9):
        rows = by_curve.take(by_curve.budgets == label)
        assert len(np.unique(rows.lines)) == 6 and np.ptp(np.log(rows.flops)) < 1e-9
    assert len(resample(table, "3", "point", rng)) == len(table)


def test_intervals_are_the_middle_of_the_draws():
    table = isoflop_runs(HOFFMANN, PUBLISHED[::2], 8, noise=0.003)
    settings = FitSettings("vpnls")
    found = bootstrap_fit(table, settings, fit_runs(table, settings), 19)
    interval = found.intervals(0.8)["alpha"]
    # Of 19 draws, ranks 2 and 18 are at 0.1 and 0.9 of 20.
    assert [interval.low, interval.high] == pytest.approx(np.sort(found.draws["alpha"])[[1, 17]])
    with pytest.raises(ValueError, match="--bootstrap: expected at least 1 draw, got 0"):
        bootstrap_fit(table, settings, None, 0)
    with pytest.raises(ValueError, match="--jobs: expected at least 1, got 0"):
        bootstrap_fit(table, settings, None, 5, jobs=0)


@pytest.mark.slow
@pytest.mark.parametrize("approach", ["3", "vpnls"])
def test_intervals_cover_as_often_as_they_say(approach):
    settings, draws, num_tables = FitSettings(approach), 29, 200
    hits = dict.fromkeys(("E", "alpha", "beta", "a"), 0)
    truth = HOFFMANN.to_json()
    for seed in range(num_tables):
        table = isoflop_runs(HOFFMANN, PUBLISHED, 14, noise=0.005, seed=seed)
        fit = fit_runs(table, settings, start=HOFFMANN)
        found = bootstrap_fit(table, settings, fit, draws, seed=seed).intervals(0.8)
        for name in hits:
            hits[name] += found[name].low <= truth[name] <= found[name].high
    shares = {name: count / num_tables for name, count in hits.items()}
    assert all(0.72 <= share <= 0.88 for share in shares.values()), shares
