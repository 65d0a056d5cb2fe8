"""Pictures of scaling studies: what is drawn is what the CSV holds, and follows from the runs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scaling_runs import LAWS, flops_per_token, write_runs
from scipy.optimize import minimize_scalar

from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.laws.table import make_run_table
from megatron_emo.scaling.pictures.album import OF_RUNS, make_album
from megatron_emo.scaling.pictures.drawing import draw, format_count, format_flops, make_figure
from megatron_emo.scaling.pictures.frontier import FlopsRule, tails
from megatron_emo.scaling.pictures.picture import Axis, Mark, Panel, Picture, write_table
from megatron_emo.scaling.pictures.study import PictureSettings, read_study
from megatron_emo.scaling.pictures.surface import draw_frontier, draw_overlay
from megatron_emo.scaling.pictures.tables import make_tables
from megatron_emo.scaling.pictures.throughput import draw_throughput, read_throughput
from megatron_emo.scaling.pictures.vertices import find_vertices

QUICK = PictureSettings(draws=20)
NAMES = {"isoflop", "best_sizes", "frontier", "residuals", "frontier_overlay", "loss_difference"}
NAMES |= {"speedup"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = write_runs(tmp_path_factory.mktemp("study") / "runs.csv")
    rows = path.read_text().splitlines()
    rows.append(rows[-1].replace(rows[-1].rpartition(",")[2], "nan").replace("emo1-", "lost-"))
    path.write_text("\n".join(rows) + "\n")
    # A lost loss is left out of fits; pairs are made without it.
    whole = read_study(write_runs(path.with_name("whole.csv")), None, QUICK)
    return replace(read_study(path, None, QUICK), runs=whole.runs)


@pytest.fixture(scope="module")
def album(study):
    return make_album(study)


@pytest.fixture(scope="module")
def figures(album):
    """{name: (picture, its figure, laid out)}."""
    made = {picture.name: (picture, make_figure(picture)) for picture in album.pictures}
    for _, figure in made.values():
        figure.draw_without_rendering()
    return made


def pick(album, name: str) -> Picture:
    return next(picture for picture in album.pictures if picture.name == name)


def marks_of(picture: Picture, kind: str, panel: str | None = None, series: str | None = None):
    return [
        mark
        for mark in picture.marks
        if mark.kind == kind and panel in (None, mark.panel) and series in (None, mark.series)
    ]


def test_all_pictures_are_drawn_with_n_and_what_was_left_out(album):
    assert {picture.name for picture in album.pictures} == NAMES and album.refused == ()
    assert set(OF_RUNS) == NAMES
    for name in ("isoflop", "best_sizes", "frontier", "residuals"):
        caption = pick(album, name).caption
        assert "40 runs" in caption and "Left out: 1 (loss: nan)." in caption
    assert "emo1, 40 pairs: -0." in pick(album, "loss_difference").caption


def test_the_csv_and_the_artists_hold_the_same_numbers(figures, tmp_path):
    for picture, figure in figures.values():
        write_table(tmp_path / f"{picture.name}.csv", picture.marks)
        with open(tmp_path / f"{picture.name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row, mark in zip(rows, picture.marks, strict=True):
            read = {name: float(row[name]) if row[name] else None for name in ("x", "y", "y_low")}
            assert read == {name: getattr(mark, name) for name in read}
            assert (row["panel"], row["series"], row["kind"]) == (
                *(mark.panel, mark.series, mark.kind),
            )
        for axes, panel in zip(figure.axes, picture.panels, strict=True):
            lines = [line for line in axes.lines if line.get_gid() not in ("interval", None)]
            shown = sorted((x, y) for line in lines for x, y in zip(*line.get_data(), strict=True))
            own = [m for m in picture.marks if m.panel == panel.name and "band" not in m.kind]
            assert shown == sorted((mark.x, mark.y) for mark in own)
            assert axes.get_xlabel() == panel.x.label and axes.get_ylabel() == panel.y.label
            assert (axes.get_xscale() == "log") == panel.x.is_log


def test_no_label_lies_over_another(figures):
    for picture, figure in figures.values():
        top = figure.legends[0].get_window_extent()
        below = figure._supxlabel.get_window_extent()
        assert not top.overlaps(below) and top.y1 <= figure.bbox.y1 + 1, picture.name
        assert below.x1 <= figure.bbox.x1 and below.y0 >= -1, picture.name
        for axes in figure.axes:
            whole = axes.get_tightbbox()
            assert not whole.overlaps(top) and not whole.overlaps(below), picture.name
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                labels = [
                    tick.label1.get_window_extent()
                    for tick in axis.get_major_ticks()
                    if low <= tick.get_loc() <= high and tick.label1.get_visible()
                ]
                assert len(labels) <= 10
                for one, other in zip(labels, labels[1:], strict=False):
                    assert not one.overlaps(other), (picture.name, axes.get_title())


def test_vertices_are_those_of_parabolas(album, study):
    picture = pick(album, "isoflop")
    for name in ("mle", "emo1"):
        rows = study.tables[name]
        found = marks_of(picture, "found", name)
        assert len(found) == 4
        for budget, mark in enumerate(found):
            own = rows.take(rows.budgets == budget)
            square, slope, _ = np.polyfit(np.log(own.params), own.loss, 2)
            assert mark.x == pytest.approx(np.exp(-slope / 2 / square), rel=1e-9)
            assert mark.x_low < mark.x < mark.x_high and mark.y_low < mark.y < mark.y_high
            runs = marks_of(picture, "run", name, mark.series)
            np.testing.assert_array_equal([m.x for m in runs], own.params)
            np.testing.assert_array_equal([m.y for m in runs], own.loss)


def test_best_sizes_follow_their_power_law(album, study):
    picture = pick(album, "best_sizes")
    for panel in ("best size", "its tokens", "tokens per parameter"):
        found, law = (marks_of(picture, kind, panel, "mle") for kind in ("found", "law"))
        slope, level = np.polyfit(*np.log([[m.x for m in found], [m.y for m in found]]), 1)
        line = np.exp(level + slope * np.log([m.x for m in law]))
        np.testing.assert_allclose([m.y for m in law], line, rtol=1e-9)
        for mark in marks_of(picture, "band", panel, "mle"):
            assert mark.y_low < mark.y < mark.y_high


@pytest.mark.parametrize("name", ["mle", "emo1"])
def test_the_frontier_is_the_least_loss_at_the_flops_the_table_counts(album, study, name):
    law = study.surface(name).fit.surface
    share = study.tables[name].flops[0] / study.tables["mle"].flops[0]
    line = marks_of(pick(album, "frontier"), "law", name)
    for mark in line[:40:13]:
        best = minimize_scalar(
            lambda x, c=mark.x: float(law.loss(np.exp(x), c / flops_per_token(np.exp(x)) / share)),
            bounds=(np.log(1e5), np.log(1e10)),
            method="bounded",
        )
        assert mark.y == pytest.approx(best.fun, abs=3e-4)
    assert max(m.x for m in line) == pytest.approx(4 * study.tables[name].flops.max())
    (foretold,) = marks_of(pick(album, "frontier"), "foretold", name)
    found = marks_of(pick(album, "frontier"), "found", name)[-1]
    assert foretold.y == pytest.approx(found.y, abs=0.1) and foretold.y != found.y


def test_where_flops_are_6nd_the_optimum_is_the_closed_one():
    params = np.geomspace(1e6, 1e8, 5)
    rule = FlopsRule.of_table(make_run_table(params, np.ones(5), 20 * params))
    flops = np.geomspace(1e15, 1e18, 4)
    params, tokens, loss = rule.optimum(LAWS["mle"], flops)
    expected = LAWS["mle"].optimum(flops)
    np.testing.assert_allclose(params, expected[0], rtol=1e-3)
    np.testing.assert_allclose(loss, LAWS["mle"].loss(*expected), rtol=1e-7)
    np.testing.assert_allclose(6 * params * tokens, flops, rtol=1e-9)
    assert np.isnan(rule.optimum(LAWS["mle"], np.array([1e30]))).all()


def test_differences_and_speedups_are_those_of_compare(album, study):
    one = study.comparison("emo1")
    for name, what, form in (
        ("loss_difference", "differences", "at equal FLOPs"),
        ("speedup", "speedups", "in FLOPs"),
    ):
        found = marks_of(pick(album, name), "found", form)
        values = [getattr(group, what)["flops"] for group in one.budgets]
        assert [m.y for m in found] == [v.value for v in values]
        assert [m.y_low for m in found] == [v.interval.low for v in values]
        assert len(marks_of(pick(album, name), "run", form)) == 40
    tokens = marks_of(pick(album, "loss_difference"), "run", "at equal tokens")
    mean = np.mean([m.y for m in tokens])
    exact = study.runs["emo1"].loss.mean() - study.runs["mle"].loss.mean()
    assert mean == pytest.approx(exact)
    assert {m.y for m in marks_of(pick(album, "speedup"), "reference")} == {1.0}


def test_residuals_are_predicted_minus_measured(album, study):
    law, table = study.surface("emo1").fit.surface, study.tables["emo1"]
    marks = marks_of(pick(album, "residuals"), "run", "against prediction", "emo1")
    predicted = law.loss(table.params, table.tokens)
    np.testing.assert_allclose([m.x for m in marks], predicted)
    np.testing.assert_allclose([m.y for m in marks], predicted - table.loss, atol=1e-12)


def runs_of(surface, path, objectives=("mle", "emo1"), noise=0.003):
    """A small table whose best sizes are far from all its runs'."""
    rng = np.random.default_rng(1)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("name,objective,seed,size,budget,params,tokens,flops,loss".split(","))
        for budget in 2e11 * 2.0 ** np.arange(4):
            for params in (39e3, 80e3, 132e3, 214e3, 392e3):
                tokens = budget / 6 / params
                loss = surface.loss(params, tokens)
                for name in objectives:
                    run = f"{name}-{params:.0f}-{budget:.0f}"
                    own = loss * np.exp(rng.normal(0, noise))
                    writer.writerow([run, name, 1, params, budget, params, tokens, budget, own])
    return path


def test_best_sizes_out_of_reach_are_said_and_the_other_pictures_drawn(tmp_path):
    law = Surface(E=1.8172, A=795, B=20, alpha=0.3478, beta=0.3658)
    study = read_study(runs_of(law, tmp_path / "runs.csv"), None, QUICK)
    album = make_album(study)
    drawn = {picture.name for picture in album.pictures}
    assert drawn | {name for name, _ in album.refused if not name.startswith("table")} == NAMES
    assert "emo1: the surface has its best sizes more than 30" in pick(album, "frontier").caption
    for picture in album.pictures:
        make_figure(picture).draw_without_rendering()
        assert all(np.isfinite([mark.x, mark.y]).all() for mark in picture.marks)


def test_a_frontier_without_any_best_size_is_refused(tmp_path):
    law = Surface(E=1.8172, A=795, B=0.2, alpha=0.3478, beta=0.3658)
    study = read_study(runs_of(law, tmp_path / "runs.csv", noise=0), None, QUICK)
    for make in (draw_frontier, draw_overlay):
        with pytest.raises(ValueError, match="mle: the surface has its best sizes more than 30"):
            make(study)


def test_tails_leave_out_draws_without_a_value_up_to_a_fifth():
    draws = np.arange(10.0)[:, None] * np.ones(3)
    draws[:2, 1] = draws[:3, 2] = np.nan
    low, high = tails(draws, 0.5)
    # Rank p (n + 1): 2.75 and 8.25 of 0 to 9, 2.25 and 6.75 of 2 to 9.
    np.testing.assert_allclose([low[0], high[0], low[1], high[1]], [1.75, 7.25, 3.25, 7.75])
    assert np.isnan([low[2], high[2]]).all()


@pytest.mark.parametrize("ends", [(0.93, 1.07), (1.0, 1.15), (0.7, 1.3), (0.5, 3.0), (1e3, 1e9)])
def test_axes_have_ticks_that_can_be_read(ends):
    panel = Panel("p", Axis("C, training FLOPs", is_log=True), Axis("speedup", is_log=True))
    marks = panel.points("a", "run", [1e15, 1e18], ends)
    picture = Picture("p", "t", "c", (panel,), tuple(marks), {"run": "run"})
    figure = make_figure(picture)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    labels = [
        text.get_text()
        for at, text in zip(
            figure.axes[0].get_yticks(), figure.axes[0].get_yticklabels(), strict=True
        )
        if low <= at <= high and text.get_text()
    ]
    assert 3 <= len(labels) <= 9 and len(set(labels)) == len(labels), labels


def test_budgets_that_the_table_tells_apart_are_apart_in_the_picture(tmp_path):
    path = write_runs(tmp_path / "runs.csv", ["mle"], budgets=2, seeds=1)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if float(row["budget"]) > 1e15:
            share = 1.23e15 / float(row["budget"])
            for name in ("budget", "tokens", "flops"):
                row[name] = float(row[name]) * share
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture = pick(make_album(read_study(path, None, QUICK)), "isoflop")
    assert {mark.series for mark in picture.marks} == {"1e15", "1.2e15"}


def test_an_objective_has_one_colour_in_all_pictures(figures):
    colours = set()
    for picture, figure in figures.values():
        if not picture.is_ordered:
            (legend,) = figure.legends
            at = [text.get_text() for text in legend.get_texts()].index("emo1")
            colours.add((picture.name, legend.legend_handles[at].get_color()))
    assert len(colours) == 6 and len({colour for _, colour in colours}) == 1


def test_tables_hold_laws_vertices_comparisons_and_the_joint_test(album, study):
    names = ["Law of each objective", "Best size of each budget", "Against mle", "One law or two"]
    assert [table["name"] for table in album.tables] == names
    for table in album.tables:
        assert all(len(row) == len(table["heads"]) for row in table["rows"])
    laws, vertices, against, joint = album.tables
    assert laws["rows"][0][1]["value"] == study.surface("mle").fit.parameters["E"]
    assert len(vertices["rows"]) == 8 and len(against["rows"]) == 5
    assert against["rows"][0][:3] == ["emo1", "all", 40]
    assert joint["rows"][1][7] == study.law_test("emo1").p
    json.dumps(album.tables, allow_nan=False)


def refusals(path, settings=QUICK, columns=None):
    """{name: reason} of the pictures that a table does not suffice for; tables are not made."""
    study = read_study(path, columns, settings)
    found = {}
    for name, make in OF_RUNS.items():
        try:
            make(study)
        except ValueError as error:
            found[name] = str(error)
    return found, study


def test_one_objective_has_no_pairs(tmp_path):
    path = write_runs(tmp_path / "runs.csv", ["mle"], seeds=1)
    found, _ = refusals(path)
    assert set(found) == {"frontier_overlay", "loss_difference", "speedup"}
    assert found["speedup"] == "expected two objectives, got one: mle"
    found, study = refusals(path, columns="params=params,loss=loss,flops=flops")
    assert set(found) == {"frontier_overlay", "loss_difference", "speedup"}
    assert study.tables["runs"].notes == ("no tokens column: D = C / (6 N)",)


def test_without_hours_their_panel_is_missing_and_said_to_be(tmp_path):
    path = write_runs(tmp_path / "runs.csv", budgets=3, seeds=1, with_hours=False)
    found, study = refusals(path)
    assert found == {}
    assert study.notes == ("without hours: gpu_hours is empty in line 2",)
    picture = OF_RUNS["speedup"](study)
    assert [panel.name for panel in picture.panels] == ["in tokens", "in FLOPs"]
    assert "No panel of GPU-hours: gpu_hours is empty in line 2." in picture.caption


def test_two_budgets_have_curves_but_no_surface(tmp_path):
    path = write_runs(tmp_path / "runs.csv", budgets=2, seeds=1)
    found, _ = refusals(path)
    assert set(found) == NAMES - {"isoflop", "best_sizes"}
    assert "expected at least 3 budgets, got 2" in found["frontier"]


def test_an_objective_that_cannot_be_drawn_is_named_beside_those_that_can(tmp_path):
    path = write_runs(tmp_path / "runs.csv", seeds=1, noise=0.0005)
    rows = path.read_text().splitlines()
    few = [row for row in rows if ",emo1," not in row or ",1000000000000000.0," in row]
    path.write_text("\n".join(few) + "\n")
    found, study = refusals(path)
    picture = OF_RUNS["frontier"](study)
    assert [panel.name for panel in picture.panels] == ["mle"]
    assert "Without emo1: --approach vpnls: expected at least 3 budgets, got 1" in picture.caption
    assert "loss_difference" not in found


def test_a_best_size_at_the_edge_is_refused_in_the_caption(tmp_path):
    path = write_runs(tmp_path / "runs.csv", ["mle"], seeds=1, noise=0.0005)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    kept = [row for row in rows[1:] if float(row[4]) > 1e15 or float(row[5]) > 2e6]
    path.write_text("\n".join(",".join(row) for row in [rows[0], *kept]) + "\n")
    study = read_study(path, None, QUICK)
    caption = OF_RUNS["isoflop"](study).caption
    assert "C = 1e+15 (3 points): no best size, fewer than 4 points" in caption


def test_a_refused_budget_has_its_flops_with_all_digits(tmp_path):
    path = write_runs(tmp_path / "runs.csv", ["mle"], seeds=1, noise=0.0005)
    rows = list(csv.reader(path.read_text().splitlines()))
    kept = [row for row in rows[1:] if float(row[4]) > 1e15 or float(row[5]) > 2e6]
    kept = [[*row[:7], str(float(row[7]) * 1.23456), *row[8:]] for row in kept]
    path.write_text("\n".join(",".join(row) for row in [rows[0], *kept]) + "\n")
    tables, refused = make_tables(read_study(path, None, QUICK))
    best = next(table for table in tables if table["name"] == "Best size of each budget")
    assert best["rows"][-1][1] == pytest.approx(1.23456e15, rel=1e-12)
    assert refused == [
        ("table Against mle", "expected two objectives, got one: mle"),
        ("table One law or two", "expected two objectives, got one: mle"),
    ]


def test_white_space_about_an_objective_counts_for_nothing(tmp_path):
    path = write_runs(tmp_path / "runs.csv", budgets=3, seeds=1)
    path.write_text(path.read_text().replace(",emo1,", ", emo1,"))
    study = read_study(path, None, QUICK)
    assert list(study.tables) == ["mle", "emo1"] and len(study.pairs("emo1")) == 15


@pytest.mark.parametrize("lost", [3, 5])
def test_resamples_without_a_surface_are_said(study, lost):
    law = study.surface("mle")
    draws = {name: values.copy() for name, values in law.bootstrap.draws.items()}
    draws["E"][:2], draws["B"][2:lost] = np.nan, 0
    law = replace(law, bootstrap=replace(law.bootstrap, draws=draws))
    assert (law.num_lost, len(law.draws)) == (lost, 17 if lost == 3 else 0)
    one = replace(study.comparison("emo1"), failures={"no law": lost}, refits=20)
    kept = {("surface", "mle"): law, ("comparison", "emo1"): one}
    changed = replace(study, _kept=study._kept | kept)
    laws, _, against, *_ = make_tables(changed)[0]
    end = "" if lost == 3 else ", too many for intervals"
    assert f"mle: {lost} of 20 resamples have no surface with a best size{end}." in laws["caption"]
    assert isinstance(laws["rows"][0][1], dict) == (lost == 3)
    for caption in (against["caption"], OF_RUNS["speedup"](changed).caption):
        assert f"emo1: {lost} of 20 resamples have no law{end}" in caption


@pytest.mark.slow
def test_intervals_of_vertices_cover():
    """200 draws of four curves of five sizes: 80% intervals hold the noiseless vertex."""
    flops = np.repeat(np.geomspace(1e16, 1e18, 4), 5)
    params = LAWS["mle"].optimum(flops)[0] * np.tile(np.geomspace(0.4, 2.5, 5), 4)
    loss = LAWS["mle"].loss(params, flops / 6 / params)
    truth = find_vertices(make_run_table(params, loss, flops=flops), 20, 0).optima.params
    hits = []
    for seed in range(200):
        noisy = loss * np.exp(np.random.default_rng(seed).normal(0, 0.001, 20))
        found = find_vertices(make_run_table(params, noisy, flops=flops), 60, seed)
        ends = found.intervals(0.8)[:, :, 0]
        assert len(found.optima) == 4
        hits.append((ends[0] < truth) & (truth < ends[1]))
    assert 0.72 <= np.mean(hits) <= 0.88


def test_throughput_against_gpus(tmp_path):
    path = tmp_path / "throughput.json"
    rows = [
        {
            "label": "strong",
            "objective": name,
            "gpus": gpus,
            "tokens_per_s_per_gpu": 100 / gpus**0.1,
        }
        | {"efficiency": gpus**-0.1, "tokens_per_s_per_gpu_low": 90, "more": None}
        for name in ("mle", "emo1")
        for gpus in (4, 1, 2)
    ]
    rows[0]["device"] = "CPU"
    path.write_text(json.dumps({"rows": rows, "failed": ["small tp2"]}))
    picture = draw_throughput(read_throughput(path))
    assert picture.series == ["strong · mle", "strong · emo1"]
    found = marks_of(picture, "found", "throughput", "strong · mle")
    assert [(m.x, m.y, m.y_low, m.y_high) for m in found[:1]] == [(1, 100, 90, None)]
    assert [m.y for m in marks_of(picture, "law", "efficiency", "strong · emo1")][0] == 1
    assert "6 cells of throughput.json" in picture.caption
    assert "Not measured: small tp2. On a CPU ranks share cores" in picture.caption
    path.write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match="expected two numbers of GPUs of one label"):
        draw_throughput(read_throughput(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ('{"rows": []}', "expected rows with label, gpus"),
        ('[{"label": "a", "gpus": 0}]', "row 1, 'gpus': expected a number above 0, got 0"),
        ('[{"label": "a", "gpus": 1%s}]' % ("0" * 400), "row 1, 'gpus': expected a number above 0"),
        ("[" * 100_000, "expected JSON"),
        (
            '[{"label": "a", "gpus": 2, "tokens_per_s_per_gpu": 5, "efficiency": 1, '
            '"tokens_per_s_per_gpu_low": "x"}]',
            "'tokens_per_s_per_gpu_low': expected a number above 0, got 'x'",
        ),
        (
            '{"failed": true, "rows": [{"label": "a", "gpus": 2, "tokens_per_s_per_gpu": 5, '
            '"efficiency": 1}]}',
            "failed: expected a list, got True",
        ),
        ('[{"gpus": 2}]', "row 1, 'label': expected a text, got None"),
        (
            '[{"label": "a", "gpus": 2, "tokens_per_s_per_gpu": 5}]',
            "'efficiency': expected a number above 0, got None",
        ),
    ],
)
def test_a_missing_throughput_is_an_error(tmp_path, content, message):
    path = tmp_path / "throughput.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_throughput(path)


def test_the_same_marks_give_the_same_bytes():
    panel = Panel("only", Axis("N, parameters", is_log=True), Axis("loss $a$"))
    marks = panel.points("_a$b$", "run", [1e6, 2e6], [3.0, 2.0])
    picture = Picture("one", "One $x$", "1 run.", (panel,), tuple(marks), {"run": "run"})
    for form, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert draw(picture, form) == draw(picture, form)
        assert draw(picture, form).startswith(start)
    assert marks[0] == Mark("only", "N, parameters", "loss $a$", "_a$b$", "run", 1e6, 3.0)


def test_numbers_on_axes_are_short():
    assert [format_count(v) for v in (0.5, 20, 999, 1e3, 35e4, 1.2e6, 7e9, 15e12)] == [
        *("0.5", "20", "999", "1k", "350k", "1.2M", "7B", "15T"),
    ]
    assert [format_flops(v) for v in (1e18, 2.5e20)] == ["1e18", "2.5e20"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draws": 19}, "--bootstrap: expected at least 20 draws, got 19"),
        ({"level": 1.0}, "--level: expected between 0 and 1, got 1.0"),
        ({"approach": "2"}, "--approach: expected 3 or vpnls, got 2"),
        ({"reach": 0.5}, "--reach: expected at least 1, got 0.5"),
        ({"seed": -1}, "--seed: expected at least 0, got -1"),
    ],
)
def test_settings_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        PictureSettings(**changed)
