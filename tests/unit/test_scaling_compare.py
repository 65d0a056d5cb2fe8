"""Comparisons of two objectives: by hand, against scipy, and simulations of a known truth."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from megatron_emo.evaluation.intervals import wilson
from megatron_emo.evaluation.records import Record, write_records
from megatron_emo.scaling.command import build_parser
from megatron_emo.scaling.comparison import compare, compare_command
from megatron_emo.scaling.comparison.compare import (
    CompareSettings,
    compare_objectives,
    fit_baseline,
)
from megatron_emo.scaling.comparison.compare_report import format_comparison
from megatron_emo.scaling.comparison.decisions import decide
from megatron_emo.scaling.comparison.documents import DocumentPairs, read_document_pairs
from megatron_emo.scaling.comparison.downstream import compare_metric, select_values
from megatron_emo.scaling.comparison.pairs import Runs, pair_runs, parse_roles, read_runs
from megatron_emo.scaling.comparison.resampling import PairSampler, mean_interval
from megatron_emo.scaling.comparison.speedup import (
    effective_speedup,
    fit_line,
    frontier_exponent,
    frontier_speedup,
    pair_differences,
    pair_speedups,
)
from megatron_emo.scaling.laws.fit import describe_doubts, fit_runs
from megatron_emo.scaling.laws.frontier import Optima
from megatron_emo.scaling.laws.surfaces import Surface

TRUTH = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
SPEEDUP, SHARE, SLOWER = 1.3, 1.1, 1.25
SIZES = np.geomspace(0.25, 4, 5)


def simulate(
    speedup=SPEEDUP, noise=0.0, seeds=2, budgets=5, equal="tokens", rng=None, seed_noise=0.0
):
    """(baseline, other) on an IsoFLOP grid; the other gets as much from its tokens as `speedup`
    times as many, takes SHARE times the FLOPs and SLOWER times the hours."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for flops in np.geomspace(1e18, 1e20, budgets):
        for size in TRUTH.optimum(flops)[0] * SIZES:
            for seed in range(seeds):
                common = rng.normal(0, seed_noise)
                for is_other in (False, True):
                    tokens = flops / 6 / size
                    cost = SHARE if is_other else 1.0
                    tokens /= cost if equal == "flops" else 1.0
                    worth = tokens * (speedup if is_other else 1.0)
                    loss = TRUTH.loss(size, worth) + common + rng.normal(0, noise)
                    spent = 6 * size * tokens
                    hours = spent / 1e15 * (SLOWER if is_other else 1.0)
                    rows.append(
                        (is_other, size, tokens, spent * cost, loss, hours, flops, str(seed))
                    )
    return tuple(make_runs([row for row in rows if row[0] == side]) for side in (False, True))


def make_runs(rows, **changes):
    _, params, tokens, flops, loss, hours, budgets, seeds = zip(*rows, strict=True)
    arrays = [np.array(v, float) for v in (params, tokens, flops, loss, hours, budgets)]
    values = {"lines": np.arange(2, len(rows) + 2), "seeds": seeds, "names": None}
    names = ("params", "tokens", "flops", "loss", "hours", "budgets")
    return Runs(**(values | dict(zip(names, arrays, strict=True)) | {"documents": None} | changes))


def test_the_speedup_by_hand():
    # Above the floor of 2: 1.0 and 0.8; (1 / 0.8) ** (1 / 0.5).
    assert effective_speedup(np.array([3.0]), np.array([2.8]), 2.0, 0.5) == pytest.approx(1.5625)
    assert effective_speedup(np.array([2.8]), np.array([3.0]), 2.0, 0.5) == pytest.approx(0.64)
    assert np.isnan(effective_speedup(np.array([3.0, 2.0]), np.array([1.9, 3.0]), 2.0, 0.5)).all()


@pytest.mark.parametrize("equal", ["tokens", "flops"])
@pytest.mark.parametrize("law", ["known", "3", "vpnls"])
def test_a_known_speedup_comes_out(equal, law):
    base, other = simulate(equal=equal)
    pairs = pair_runs(base, other, "emo1")
    surface = TRUTH if law == "known" else fit_baseline(base, law).surface
    found = pair_speedups(pairs, surface)
    close = {"rtol": 1e-9 if law == "known" else 1e-3}
    np.testing.assert_allclose(found["tokens"], SPEEDUP, **close)
    np.testing.assert_allclose(found["flops"], SPEEDUP / SHARE, **close)
    np.testing.assert_allclose(found["hours"], SPEEDUP / SLOWER, **close)
    gone = pair_differences(pairs, surface)
    params, tokens = pairs.other.params, pairs.other.tokens
    for name, ratio in (("tokens", 1.0), ("flops", SHARE), ("hours", SLOWER)):
        # What the baseline reaches with as much of it as the other took.
        truth = pairs.other.loss - TRUTH.loss(params, tokens * ratio)
        np.testing.assert_allclose(gone[name], truth, atol=1e-9 if law == "known" else 1e-4)
    if equal == "tokens":
        np.testing.assert_array_equal(gone["tokens"], pairs.other.loss - pairs.base.loss)


def test_the_whole_comparison_without_noise():
    base, other = simulate(seeds=1)
    settings = CompareSettings(draws=30, at_flops=(1e21,))
    found = compare_objectives(pair_runs(base, other, "emo1"), base, other, settings)
    assert found.law.E == pytest.approx(1.69, abs=1e-4) and not found.failures
    for group in (found.overall, *found.sizes, *found.budgets):
        assert group.speedups["tokens"].value == pytest.approx(SPEEDUP, rel=1e-3)
        assert group.differences["tokens"].value < group.differences["flops"].value < 0
    assert len(found.budgets) == 5 and [g.n for g in [found.overall.speedups["flops"]]] == [25]
    interval = found.overall.speedups["flops"].interval
    assert interval.low <= SPEEDUP / SHARE + 1e-3 and interval.high >= SPEEDUP / SHARE - 1e-3
    assert interval.high - interval.low < 1e-2
    for trend in found.trends:
        assert trend.per_decade == pytest.approx(1, abs=1e-3) and trend.n == 25
        assert trend.at[0][0] == 1e21
    # At each objective's own best sizes the multiplier is the same: K of E + K C^-gamma falls by
    # speedup^-gamma where B falls by speedup^-beta.
    assert found.frontiers.speedup == pytest.approx(SPEEDUP / SHARE, rel=0.01)
    assert found.frontiers.num_optima == (5, 5)


def test_intervals_cover_the_truth():
    # 100 studies of 40 pairs; 90% intervals, of resampled pairs under a known law.
    covered = {"tokens": 0, "flops": 0, "trend": 0, "loss": 0}
    for study in range(100):
        rng = np.random.default_rng(study)
        base, other = simulate(noise=0.004, budgets=4, rng=rng, seed_noise=0.0)
        pairs = pair_runs(base, other, "emo1")
        settings = CompareSettings(draws=200, seed=study)
        found = compare_objectives(pairs, base, other, settings, TRUTH)
        for name, truth in (("tokens", SPEEDUP), ("flops", SPEEDUP / SHARE)):
            interval = found.overall.speedups[name].interval
            covered[name] += interval.low <= truth <= interval.high
        clean = np.mean(TRUTH.loss(pairs.base.params, SPEEDUP * pairs.base.tokens))
        clean -= np.mean(TRUTH.loss(pairs.base.params, pairs.base.tokens))
        interval = found.overall.differences["tokens"].interval
        covered["loss"] += interval.low <= clean <= interval.high
        slope = next(t for t in found.trends if t.resource == "tokens").per_decade_interval
        covered["trend"] += slope.low <= 1 <= slope.high
    # Of 100 intervals at 90%, 82 to 97 hold the truth with a probability of 99%.
    assert all(82 <= count <= 97 for count in covered.values()), covered


def test_a_law_that_cannot_be_believed_is_noted():
    base, other = simulate(seeds=1, budgets=3)
    flat = Surface(E=1.0, A=400, B=0.3, alpha=0.34, beta=0.001)
    rng = np.random.default_rng(0)
    base, other = (
        Runs(**vars(r) | {"loss": flat.loss(r.params, r.tokens) + rng.normal(0, 1e-3, len(r))})
        for r in (base, other)
    )
    found = compare_objectives(
        pair_runs(base, other, "emo1"), base, other, CompareSettings(draws=2)
    )
    doubts = describe_doubts(True, fit_baseline(base, "vpnls").at_bound)
    assert doubts and found.doubts == tuple(f"law of the baseline: {doubt}" for doubt in doubts)
    assert found.notes[0] == found.doubts[0]
    assert any(found.doubts[0] in line for line in format_comparison(found, "mle", 0.9))


@pytest.mark.parametrize("kept", [0, 12, 17])
def test_draws_without_a_law_are_counted_and_too_few_have_no_interval(monkeypatch, kept):
    base, other = simulate(seeds=1, noise=0.01, budgets=3)
    calls = iter(range(100))

    def fit_some(*args, **named):
        if "start" in named and next(calls) >= kept:
            raise ValueError("no law here")
        return fit_runs(*args, **named)

    monkeypatch.setattr(compare, "fit_runs", fit_some)
    pairs = pair_runs(base, other, "emo1")
    found = compare_objectives(pairs, base, other, CompareSettings(draws=20))
    assert (found.lawless, found.refits) == (20 - kept, 20)
    estimates = [*found.overall.differences.values(), *found.overall.speedups.values()]
    assert [one.interval is None for one in estimates] == [kept < 16] * len(estimates)
    end = "" if kept == 17 else ", too many for intervals over all pairs"
    assert found.describe_lost()[0] == f"{20 - kept} of 20 resamples have no law{end}"


def test_a_lone_law_is_part_of_the_interval():
    rng = np.random.default_rng(3)
    base, other = simulate(noise=0.004, seeds=1, rng=rng)
    pairs = pair_runs(base, other, "emo1")
    settings = CompareSettings(draws=60)
    fitted = compare_objectives(pairs, base, other, settings)
    known = compare_objectives(pairs, base, other, settings, fitted.law)
    widths = [
        c.overall.speedups["tokens"].interval.high - c.overall.speedups["tokens"].interval.low
        for c in (fitted, known)
    ]
    assert widths[0] > 1.1 * widths[1] and fitted.overall.speedups["tokens"].n == 25


def test_a_loss_below_the_floor_has_no_speedup():
    base, other = simulate(seeds=1)
    other.loss[7] = 1.5
    pairs = pair_runs(base, other, "emo1")
    settings = CompareSettings(draws=20)
    found = compare_objectives(pairs, base, other, settings, TRUTH)
    assert found.undefined == (9,) and found.overall.speedups["tokens"].n == 24
    assert found.overall.speedups["tokens"].value == pytest.approx(SPEEDUP)
    assert found.overall.differences["tokens"].n == 25


def test_the_line_is_scipys():
    rng = np.random.default_rng(0)
    x = rng.normal(19, 1, 12)
    y = 0.3 - 0.02 * x + rng.normal(0, 0.05, 12)
    line, theirs = fit_line(x, y), stats.linregress(x, y)
    t = stats.t.ppf(0.95, 10)
    interval = line.slope_interval(0.9)
    assert line.slope == pytest.approx(theirs.slope)
    assert interval.low == pytest.approx(theirs.slope - t * theirs.stderr)
    value, at_zero = line.at(0.0, 0.9)
    assert value == pytest.approx(theirs.intercept)
    assert at_zero.high == pytest.approx(theirs.intercept + t * theirs.intercept_stderr)
    with pytest.raises(ValueError, match="expected at least 3 points at different C, got 1"):
        fit_line(np.ones(5), y[:5])


def test_the_frontiers_speedup_is_a_regression_with_a_pinned_slope():
    rng = np.random.default_rng(0)
    gamma = frontier_exponent(TRUTH)
    assert gamma == pytest.approx(0.34 * 0.28 / 0.62)
    sides = []
    for height, count in ((2.0, 6), (1.9, 4)):
        flops = np.geomspace(1e18, 1e20, count)
        loss = TRUTH.E + height * flops**-gamma * np.exp(rng.normal(0, 0.01, count))
        sides.append(Optima(flops, flops, flops, loss))
    found, interval = frontier_speedup(*sides, TRUTH, 0.9)
    y = np.concatenate([np.log(s.loss - TRUTH.E) + gamma * np.log(s.flops) for s in sides])
    test = stats.ttest_ind(y[:6], y[6:])
    expected = test.confidence_interval(0.9)
    assert math.log(found) * gamma == pytest.approx(y[:6].mean() - y[6:].mean())
    assert math.log(interval.low) * gamma == pytest.approx(expected.low)
    assert math.log(interval.high) * gamma == pytest.approx(expected.high)
    low = Optima(*(getattr(sides[0], n) for n in ("flops", "params", "tokens")), np.full(6, 1.0))
    with pytest.raises(ValueError, match="expected optima above E = 1.69"):
        frontier_speedup(low, sides[1], TRUTH, 0.9)
    with pytest.raises(ValueError, match="expected at least 3 optima in all, got 2"):
        frontier_speedup(sides[0].take([0]), sides[1].take([0]), TRUTH, 0.9)


def test_decisions_of_small_sizes():
    base, other = simulate(seeds=4, budgets=2)
    pairs = pair_runs(base, other, "emo1")
    # 8 sizes of 4 pairs, of which both budgets have two: 8 pairs.
    differences = np.full(len(pairs), -0.01)
    differences[(pairs.sizes == 0) & (np.arange(len(pairs)) % 4 < 3)] = 0.01
    differences[(pairs.sizes == 4) & (np.arange(len(pairs)) % 4 == 1)] = 0.02
    targets, decisions = decide([(pairs, differences)], 0.9, 100, 0)
    assert targets[0].difference == pytest.approx(-0.01) and targets[0].is_decided
    counts = [found.right for found in decisions]
    assert counts == [1, 4, 4, 8, 6, 4, 4]
    assert decisions[0].accuracy == 0.25 and decisions[0].interval == wilson(1, 4, 0.9)
    both = decide([(pairs, differences), (pairs, -differences)], 0.9, 100, 0)[1]
    assert both[0].n == 8 and both[0].right == 2
    differences[pairs.sizes == pairs.sizes.max()] = [0.01, -0.01, 0.02, -0.015]
    assert not decide([(pairs, differences)], 0.9, 100, 0)[0][0].is_decided
    with pytest.raises(ValueError, match="expected at least 2 sizes, got 1"):
        decide([(pairs.take(np.flatnonzero(pairs.sizes == 0)), differences)], 0.9, 100, 0)


def test_a_metric_at_equal_loss():
    base, other = simulate(seeds=1, budgets=3)
    names = tuple(f"run{i}" for i in range(15))
    base = Runs(**vars(base) | {"names": tuple(f"mle{n}" for n in names)})
    other = Runs(**vars(other) | {"names": tuple(f"emo{n}" for n in names)})
    pairs = pair_runs(base, other, "emo1")

    def record(name, value, **more):
        return Record("mauve", value, "1", "test", 5, labels={"run": name} | more)

    rng = np.random.default_rng(0)
    records = []
    for runs, extra in ((base, 0.0), (other, 0.05)):
        for name, loss in zip(runs.names, runs.loss, strict=True):
            records.append(record(name, 0.9 - 0.2 * loss + extra + rng.normal(0, 0.002)))
    found = compare_metric(pairs, select_values(records, "mauve", {}), 0.9, 200, 0)
    assert found.slope == pytest.approx(-0.2, abs=0.01)
    equal = found.at_equal_loss_interval
    assert equal.low < 0.05 < equal.high and equal.high - equal.low < 0.005
    values = np.array([r.value for r in records])
    assert found.difference == pytest.approx(values[15:].mean() - values[:15].mean())
    assert found.interval.low < found.difference < found.interval.high and found.n == 15
    # The coefficient by another route: residuals of both on the loss (Frisch, Waugh, Lovell).
    loss = np.concatenate([base.loss, other.loss])
    side = np.repeat([0.0, 1.0], 15)

    def residuals(y):
        return y - np.polyval(np.polyfit(loss, y, 1), loss)

    c = (residuals(values) @ residuals(side)) / (residuals(side) @ residuals(side))
    assert found.at_equal_loss == pytest.approx(c)
    with pytest.raises(ValueError, match="expected a record of every run, got none of mlerun0"):
        compare_metric(pairs, select_values(records[1:], "mauve", {}), 0.9, 10, 0)
    with pytest.raises(ValueError, match="two records of run mlerun0: expected one"):
        select_values([*records, records[0]], "mauve", {})
    assert len(select_values([*records, record("x", 1.0, k="v")], "mauve", {"k": "v"})) == 1
    with pytest.raises(ValueError, match="--metric bleu: expected one of mauve"):
        select_values(records, "bleu", {})


def test_seeds_are_resampled_within_cells():
    rng = np.random.default_rng(0)
    # The cells' own means differ by far more than seeds do; two seeds each.
    cells = np.repeat(np.arange(8), 2)
    values = cells * 10.0 + rng.normal(0, 1, 16)
    sampler = PairSampler(cells, 0)
    weights = sampler.draw_many(4000)
    assert sampler.unit == "seeds within cells"
    np.testing.assert_allclose(weights.sum(axis=1), 16)
    # The variance of the mean over cells: that of each cell's mean of 2, by its unbiased estimate.
    expected = sum(np.var(values[cells == c], ddof=1) / 2 for c in range(8)) / 8**2
    assert np.var(weights @ values / 16) == pytest.approx(expected, rel=0.1)
    alone = PairSampler(np.arange(16), 0)
    assert alone.unit == "pairs"
    drawn = alone.draw_many(4000) @ values / 16
    assert np.var(drawn) == pytest.approx(np.var(values) / 16, rel=0.1)
    assert mean_interval(values[:1], cells[:1], 10, 0.9, 0) is None


def test_few_seeds_have_the_interval_of_student():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 4)
    found = mean_interval(values, np.arange(4), 10, 0.9, 0)
    expected = stats.t.interval(0.9, 3, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected) and found.method == "student"
    # Two cells of two seeds: the pooled deviation of each from its cell's mean, 2 degrees.
    cells = np.array([0, 0, 1, 1])
    found = mean_interval(values + 100 * cells, cells, 10, 0.9, 0)
    scatter = math.sqrt(((values[0] - values[1]) ** 2 + (values[2] - values[3]) ** 2) / 4)
    half = stats.t.ppf(0.95, 2) * scatter / 2
    assert found.high - found.low == pytest.approx(2 * half)
    assert mean_interval(np.arange(6.0), np.arange(6), 10, 0.9, 0).method == "bootstrap"
    held = 0
    for study in range(300):
        values = np.random.default_rng(study).normal(0, 1, 2)
        interval = mean_interval(values, np.zeros(2), 10, 0.9, 0)
        held += interval.low <= 0 <= interval.high
    assert 255 <= held <= 285


def test_documents_are_resampled_with_the_pairs():
    rng = np.random.default_rng(0)
    nats, tokens = rng.normal(-1, 3, (3, 40)), rng.integers(5, 50, 40).astype(float)
    documents, cells = DocumentPairs(nats, tokens), np.arange(3)
    assert documents.difference == pytest.approx(nats.sum() / (3 * tokens.sum()))
    found = documents.interval(PairSampler(cells, 1), 400, 0.9, 1)
    sampler, again = PairSampler(cells, 1), np.random.default_rng([1, 2])
    drawn = []
    for _ in range(400):
        rows = np.repeat(np.arange(3), sampler.draw().astype(int))
        columns = again.integers(0, 40, 40)
        drawn.append(nats[rows][:, columns].mean(axis=0).sum() / tokens[columns].sum())
    assert [found.low, found.high] == pytest.approx(
        np.quantile(drawn, [0.05, 0.95], method="weibull").tolist()
    )


def write_documents(path, nats, tokens=(10, 20, 30)):
    rows = [
        {"id": i, "sha256": f"h{i}", "nats": n, "tokens": t, "settings": "s"}
        for i, (n, t) in enumerate(zip(nats, tokens, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_must_be_the_same_and_give_the_loss(tmp_path):
    base, other = simulate(seeds=1, budgets=1)
    files = [write_documents(tmp_path / f"{i}.jsonl", (30, 70, 80)) for i in range(10)]
    sides = [
        Runs(**vars(runs) | {"loss": np.full(5, 3.0), "documents": tuple(files[part])})
        for runs, part in ((base, slice(0, 5)), (other, slice(5, 10)))
    ]
    pairs = pair_runs(*sides, "emo1")
    found = read_document_pairs(pairs)
    assert found.nats.shape == (5, 3) and not found.nats.any()
    write_documents(files[7], (29, 69, 80))
    pairs.other.loss[2] = 178 / 60
    whole = compare_objectives(pairs, *sides, CompareSettings(draws=50), TRUTH)
    # One pair of five is 2 nats of 60 tokens lower.
    assert whole.overall.documents.value == pytest.approx(-2 / 60 / 5)
    assert whole.overall.documents.interval.low < -2 / 60 / 5 <= 0
    assert [group.documents.interval is None for group in whole.sizes] == [False] * 5
    write_documents(files[7], (30, 70, 80))
    pairs.other.loss[2] = 3.0
    write_documents(files[9], (30, 70, 80.9))
    with pytest.raises(ValueError, match="have 3.01500 nats/token, expected the 3.00000 of line 6"):
        read_document_pairs(pairs)
    write_documents(files[9], (30, 70, 80), (10, 21, 29))
    with pytest.raises(
        ValueError, match=r"9.jsonl: expected the documents and tokens of .*0.jsonl"
    ):
        read_document_pairs(pairs)


COLUMNS = "objective=way,params=N,tokens=D,flops=C,loss=L,seed=seed,hours=h,budget=goal"
HEAD = ["way", "N", "D", "C", "L", "h", "goal", "seed"]


def write_table(path, sides, **extra):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*HEAD, *extra])
        for name, runs in sides.items():
            columns = (runs.params, runs.tokens, runs.flops, runs.loss, runs.hours, runs.budgets)
            for i, row in enumerate(zip(*columns, runs.seeds, strict=True)):
                writer.writerow([name, *row, *(values(name, i) for values in extra.values())])
    return path


def run_command(*flags):
    args = build_parser("x").parse_args(["compare", *map(str, flags)])
    return args.run(args)


def test_the_command_from_a_csv(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base, other = simulate(noise=0.002, rng=rng)
    third = simulate(speedup=0.8, noise=0.002, rng=rng)[1]
    third = third.take(range(len(third) - 1))
    table = write_table(
        tmp_path / "runs.csv",
        {"mle": base, "emo1": other, "tailr": third},
        run=lambda name, i: f"{name}-{i}",
    )
    records = [
        Record(
            "accuracy", 0.5 + 0.01 * (name == "emo1") - 0.1 * loss, "1", "x", 9, model=f"{name}-{i}"
        )
        for name, runs in (("mle", base), ("emo1", other), ("tailr", third))
        for i, loss in enumerate(runs.loss)
    ]
    write_records(tmp_path / "records.json", records)
    out = tmp_path / "new" / "compare.json"
    flags = ["--csv", table, "--columns", f"{COLUMNS},run=run", "--bootstrap", 40]
    run_command(
        *flags, "--json", out, "--records", tmp_path / "records.json", "--metric", "accuracy"
    )
    result = json.loads(out.read_text())
    emo, tailr = result["objectives"]
    assert (emo["objective"], tailr["objective"]) == ("emo1", "tailr")
    for one, speedup in ((emo, SPEEDUP), (tailr, 0.8)):
        overall = one["overall"]["speedups"]
        assert overall["tokens"]["value"] == pytest.approx(speedup, rel=0.05)
        ratio = overall["tokens"]["value"] / overall["flops"]["value"]
        assert ratio == pytest.approx(SHARE)
        assert len(one["budgets"]) == 5 and len(one["trends"]) == 3
        assert len(one["pairs"]["speedup_tokens"]) == one["n"]
    assert tailr["n"] == 49 and len(tailr["unpaired_lines"]) == 1
    assert emo["metrics"][0]["at_equal_loss"] == pytest.approx(0.01)
    assert result["law"]["E"] == pytest.approx(1.69, abs=0.1)
    assert len(result["decisions"]["target"]) == 2
    shown = capsys.readouterr().out
    for part in (
        "emo1 against mle: 50 pairs, 90% intervals of resampled seeds within cells",
        "speedup in hours",
        "best sizes",
        "trend      flops: x ",
        "WARNING    without a partner: lines 51",
        "target     tailr: +",
        "metric     accuracy (1): ",
    ):
        assert part in shown, part
    # With the law of a file nothing is fitted, and its numbers are those of the file.
    law = tmp_path / "law.json"
    law.write_text(json.dumps(TRUTH.to_json()))
    result = run_command(*flags, "--law", law, "--others", "emo1", "--decide-by", "tokens")
    assert result["law"]["E"] == 1.69 and len(result["objectives"]) == 1


def test_the_command_without_flops_says_so(tmp_path, capsys):
    base, other = simulate(seeds=1)
    table = write_table(tmp_path / "runs.csv", {"mle": base, "emo1": other})
    columns = "objective=way,params=N,tokens=D,loss=L"
    result = run_command("--csv", table, "--columns", columns, "--bootstrap", 5)
    speedups = result["objectives"][0]["overall"]["speedups"]
    assert speedups["flops"]["value"] == pytest.approx(speedups["tokens"]["value"])
    assert "hours" not in speedups
    assert "no flops column: C = 6 N D, without what a loss adds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "sft"], "--baseline: expected one of mle, emo1, got 'sft'"),
        (["--others", "mle"], "--others: expected some of mle, emo1 beside the baseline"),
        (["--bootstrap", 1], "--bootstrap: expected at least 2 draws, got 1"),
        (["--level", 1], "--level: expected between 0 and 1, got 1.0"),
        (["--seed", -1], "--seed: expected at least 0, got -1"),
        (["--at-flops", 0], "--at-flops: expected above 0, got 0.0"),
        (["--metric", "mauve"], "--records: expected with --metric, got none"),
        (["--records", "x"], "--metric: expected with --records, got none"),
    ],
)
def test_flags_out_of_range(tmp_path, flags, message):
    base, other = simulate(seeds=1)
    table = write_table(tmp_path / "runs.csv", {"mle": base, "emo1": other})
    with pytest.raises(ValueError, match=message):
        run_command("--csv", table, "--columns", COLUMNS, *flags)


def test_what_runs_lack_is_refused_before_the_bootstraps(tmp_path, monkeypatch):
    base, other = (runs.take(range(7)) for runs in simulate(seeds=1))
    table = write_table(tmp_path / "runs.csv", {"mle": base, "emo1": other})
    monkeypatch.delattr(compare_command, "compare_objectives")
    columns = COLUMNS.replace("hours=h,", "")
    with pytest.raises(ValueError, match="--decide-by hours: expected an hours= column, got none"):
        run_command("--csv", table, "--columns", columns, "--decide-by", "hours")
    with pytest.raises(ValueError, match="emo1: expected at least 8 pairs for a joint fit, got 7"):
        run_command("--csv", table, "--columns", COLUMNS, "--joint", 20)


def test_tables_that_cannot_be_compared(tmp_path):
    base, other = simulate(seeds=1)
    path = tmp_path / "runs.csv"

    def refuse(message, columns=COLUMNS, **sides):
        write_table(path, sides)
        with pytest.raises(ValueError, match=message):
            run_command("--csv", path, "--columns", columns, "--bootstrap", 3)

    refuse("expected two objectives, got mle", mle=base)
    far = Runs(**vars(other) | {"params": other.params * 3})
    refuse("emo1: expected runs of the baseline's sizes and budgets", mle=base, emo1=far)
    twice = base.take([0, 1, 1])
    refuse("lines 3 and 4: two runs of one size, budget and seed", mle=twice, emo1=other)
    few = [runs.take(range(10)) for runs in (base, other)]
    refuse("--approach vpnls: expected at least 3 budgets, got 2", mle=few[0], emo1=few[1])
    refuse("'X': expected one of", COLUMNS.replace("=L", "=X"), mle=base, emo1=other)
    path.write_text("way,N,D,L\nmle,1,1,1\nmle,1,1," + "9" * 200_000 + "\n")
    with pytest.raises(ValueError, match="runs.csv: line .: field larger than field limit"):
        read_runs(path, parse_roles("objective=way,params=N,tokens=D,loss=L"))
    hole = Runs(**vars(other) | {"loss": np.where(np.arange(25) == 3, np.nan, other.loss)})
    refuse("line 30, 'L': expected a number above 0, got 'nan'", mle=base, emo1=hole)
    zero = Runs(**vars(other) | {"loss": np.where(np.arange(25) == 3, 0.0, other.loss)})
    refuse("line 30, 'L': expected a number above 0, got '0.0'", mle=base, emo1=zero)


def test_columns_are_named_by_role():
    assert parse_roles("objective=a b,params=N=1,tokens=x,y,loss=L") == {
        "objective": "a b",
        "params": "N=1",
        "tokens": "x,y",
        "loss": "L",
    }
    for text, message in (
        ("params=N,tokens=D,loss=L", "expected objective=NAME"),
        ("objective=o,params=N,tokens=D,loss=L,loss=M", "expected each role once, with a name"),
        ("objective=o,params=,tokens=D,loss=L", "expected each role once, with a name"),
        ("size=N", "expected ROLE=NAME with objective"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_roles(text)


def test_runs_are_read_in_order(tmp_path):
    base, other = simulate(seeds=1)
    runs = read_runs(
        write_table(tmp_path / "runs.csv", {"b": other, "a": base}), parse_roles(COLUMNS)
    )
    assert list(runs) == ["b", "a"] and runs["a"].lines[0] == 27
    np.testing.assert_array_equal(runs["a"].loss, base.loss)
