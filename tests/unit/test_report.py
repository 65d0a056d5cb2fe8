"""Rules of the report: what is pooled, which cell is best, how numbers and pages are written."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from megatron_emo.evaluation.records import Interval, Record, write_records
from megatron_emo.report.command import render_block
from megatron_emo.report.html import PageError, format_page
from megatron_emo.report.layout import choose_layouts, order_keys, select
from megatron_emo.report.markdown import escape, format_markdown, format_table
from megatron_emo.report.metrics import BETTER, parse_better
from megatron_emo.report.plots import COLOURS, THEMES, draw_png, has_own_scales, make_plots
from megatron_emo.report.student import t_quantile
from megatron_emo.report.tables import make_cell, make_tables
from megatron_emo.report.text import find_decimals, format_number, table_caption
from megatron_emo.report.trace import check_document, update_document

HOSTILE = "<script>alert('x|y')</script>"


def make_record(metric="mauve", value=0.5, **changes) -> Record:
    labels = {
        k: v for k, v in changes.items() if k in ("objective", "domain", "seed_label", "task")
    }
    labels = {"seed" if k == "seed_label" else k: v for k, v in labels.items()}
    others = {k: v for k, v in changes.items() if k in Record.__dataclass_fields__}
    defaults = {
        "definition": "a definition",
        "unit": "1",
        "n": 10,
        "provenance": {"command": "evaluate.py mauve", "commit": "c0ffee", "date": "2026-01-02"},
    }
    return Record(metric=metric, value=value, **{**defaults, "labels": labels, **others})


def within(low: float, high: float) -> Interval:
    return Interval(low, high)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantile_is_scipys(level):
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 5, 9, 30, 101):
        expected = stats.t.ppf((1 + level) / 2, degrees)
        assert t_quantile(level, degrees) == pytest.approx(expected, rel=1e-9)


class TestCells:
    def test_seeds_give_mean_deviation_and_students_interval(self):
        cell = make_cell([make_record(value=v, seed_label=str(v)) for v in (1.0, 2.0, 3.0)])
        # t(2) is 4.302653 at 95%, and 4.302653 / sqrt(3) is 2.484138.
        assert (cell.value, cell.sd, cell.n) == (2.0, 1.0, 3)
        assert cell.interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
        assert cell.interval.high == pytest.approx(2 + 2.484138, abs=1e-6)

    def test_samples_of_one_run_are_averaged_before_runs_are_counted(self):
        records = [
            make_record(value=1.0, seed_label="1", seed=10),
            make_record(value=3.0, seed_label="1", seed=11),
            make_record(value=4.0, seed_label="2", seed=10),
        ]
        cell = make_cell(records)
        assert cell.values == (2.0, 4.0)
        assert cell.value == 3.0
        assert cell.sd == pytest.approx(math.sqrt(2))

    def test_without_seed_labels_the_records_seed_counts(self):
        cell = make_cell([make_record(value=v, seed=int(v)) for v in (1.0, 2.0)])
        assert (cell.value, cell.n) == (1.5, 2)

    def test_one_record_keeps_its_interval(self):
        cell = make_cell([make_record(value=0.5, interval=within(0.4, 0.7))])
        assert (cell.value, cell.sd, cell.n) == (0.5, None, 1)
        assert (cell.interval.low, cell.interval.high) == (0.4, 0.7)

    def test_a_record_over_seeds_is_taken_apart(self):
        per_seed = {"7": 1.0, "8": 2.0, "9": 6.0}
        record = make_record(value=3.0, n=3, n_unit="seeds", settings={"per_seed": per_seed})
        assert make_cell([record]).values == (1.0, 2.0, 6.0)

    def test_the_same_record_from_two_files_counts_once(self):
        assert make_cell([make_record(seed=1), make_record(seed=1)]).n == 1

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"domain": "books"}, r"differ in the label domain \(wiki, books\).*--where domain="),
            ({"unit": "%"}, "differ in unit: '1' and '%'"),
            ({"definition": "b"}, "differ in definition"),
            ({"model_sha256": "f" * 64}, "records of different models.*--label seed=N"),
            ({"seed": 1, "value": 0.6, "settings": {"k": 2}}, "two records of one seed.*in k:"),
        ],
    )
    def test_what_is_unlike_is_not_pooled(self, other, message):
        one = make_record(objective="mle", domain="wiki", seed=1)
        two = replace(one, **{"seed": 2, **{k: v for k, v in other.items() if k != "domain"}})
        if "domain" in other:
            two = replace(two, labels={**two.labels, "domain": other["domain"]})
        with pytest.raises(ValueError, match=rf"mauve \(objective=mle\): .*{message}"):
            make_cell([one, two], ("objective",))

    def test_models_of_labelled_seeds_may_differ(self):
        records = [make_record(value=v, seed_label=str(v), model=f"m{v}") for v in (1.0, 2.0)]
        assert make_cell(records).n == 2


def _ends(cell):
    return cell.interval.low, cell.interval.high


def best_of(records, better=BETTER, **layout):
    (table,) = make_tables(records, better, **layout)
    return {row for row, _ in table.best}


class TestBest:
    def records(self, *intervals, **changes):
        return [
            make_record(
                **{"value": (low + high) / 2, "interval": within(low, high), **changes},
                objective=f"o{at}",
            )
            for at, (low, high) in enumerate(intervals)
        ]

    def test_the_best_stands_apart(self):
        assert best_of(self.records((0.1, 0.2), (0.3, 0.5), (0.2, 0.29))) == {("o1",)}

    def test_competitors_may_be_columns(self):
        records = [
            make_record(value=value, interval=within(value - 0.1, value + 0.1), **labels)
            for value, labels in (
                (0.3, {"objective": "mle", "task": "easy"}),
                (0.7, {"objective": "emo1", "task": "easy"}),
                (0.1, {"objective": "mle", "task": "hard"}),
                (0.2, {"objective": "emo1", "task": "hard"}),
            )
        ]
        (table,) = make_tables(records, BETTER, rows=["task"], columns=["objective"])
        assert table.compared == ("objective",)
        assert table.best == {(("easy",), ("emo1",))}
        assert (
            "Bold: the highest of a row, compared by objective" in table_caption(table, BETTER)[-1]
        )

    def test_low_is_better_where_the_metric_says_so(self):
        records = self.records((1.0, 2.0), (2.5, 3.0), metric="token_perplexity")
        assert best_of(records) == {("o0",)}
        assert best_of(records, parse_better(["token_perplexity=high"])) == {("o1",)}

    @pytest.mark.parametrize("third", [(0.15, 0.35), (0.2, 0.3)])
    def test_intervals_that_overlap_or_touch_leave_none(self, third):
        assert best_of(self.records((0.1, 0.2), (0.3, 0.5), third)) == set()

    def test_nothing_is_best_without_interval_direction_or_one_definition(self):
        records = self.records((0.1, 0.2), (0.3, 0.5))
        assert best_of([replace(records[0], interval=None), records[1]]) == set()
        assert best_of(self.records((0.1, 0.2), (0.3, 0.5), metric="diversity")) == set()
        assert best_of([replace(records[0], definition="other"), records[1]]) == set()
        assert best_of(records[:1]) == set()

    def test_rows_of_other_data_do_not_compete(self):
        records = [
            make_record(value=v, interval=within(v - 0.01, v + 0.01), objective=o, domain=d)
            for o, d, v in (("a", "x", 0.1), ("b", "x", 0.2), ("a", "y", 0.9), ("b", "y", 0.8))
        ]
        assert best_of(records, rows=["objective", "domain"]) == {("b", "x"), ("a", "y")}
        every = ["objective", "domain"]
        assert best_of(records, rows=every, compared=every) == {("a", "y")}

    def test_seeds_compete_with_students_interval(self):
        near = [(0.10, 0.11), (0.12, 0.13)]
        records = [
            make_record(value=v, objective=f"o{at}", seed_label=str(v))
            for at, values in enumerate(near)
            for v in values
        ]
        # Two seeds: half a width is 12.7 * 0.00707 / sqrt(2) = 0.064, more than the gap of 0.02.
        assert best_of(records) == set()


class TestLayout:
    def test_what_varies_becomes_rows_rivals_side_by_side(self):
        records = [
            make_record(metric, objective=o, domain=d, seed_label=s, task="same")
            for metric in ("mauve", "diversity")
            for o in ("mle", "emo")
            for d in ("x", "y")
            for s in ("1", "2")
        ]
        ((layout, _),) = choose_layouts(records)
        assert (layout.rows, layout.columns) == (("domain", "objective"), ("metric",))
        ((layout, _),) = choose_layouts(records[:8])
        assert (layout.rows, layout.columns) == (("objective",), ("domain",))

    def test_metrics_of_other_labels_get_a_table_of_their_own(self):
        records = [make_record(objective=o, domain="x") for o in "ab"]
        records += [make_record("accuracy", objective=o, task="t") for o in "ab"]
        assert [layout.rows for layout, _ in choose_layouts(records)] == [("objective",)] * 2

    def test_models_that_labels_do_not_tell_apart_become_rows(self):
        records = [make_record(model="a"), make_record(model="b", value=0.6)]
        ((layout, _),) = choose_layouts(records)
        assert layout.rows == ("model",)

    def test_without_metric_among_names_each_metric_has_a_table(self):
        records = [make_record(m, objective="a", domain="x") for m in ("mauve", "tvd")]
        tables = make_tables(records, BETTER, ["objective"], ["domain"])
        assert [table.metrics for table in tables] == [["mauve"], ["tvd"]]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (["nope"], "--rows, --columns: expected any of 'objective', 'metric', 'model', got"),
            (["metric"], "expected different labels, got 'metric' twice"),
        ],
    )
    def test_unknown_names_are_refused(self, rows, message):
        with pytest.raises(ValueError, match=message):
            choose_layouts([make_record(objective="a")], rows, ["metric"])

    def test_order_is_natural_and_begins_with_what_others_are_held_against(self):
        keys = [("emo10",), ("emo2",), ("mle",), ("10",), ("9",), ("",)]
        ordered = [key[0] for key in order_keys(keys, ["objective"])]
        assert ordered == ["mle", "9", "10", "emo2", "emo10", ""]

    def test_select_takes_any_of_the_values_and_orders_metrics(self):
        records = [make_record(m, objective=o) for m in ("tvd", "mauve") for o in "abc"]
        found = select(records, ["mauve", "tvd"], {"objective": ["a", "c"]})
        assert [(r.metric, r.labels["objective"]) for r in found] == [
            *(("mauve", "a"), ("mauve", "c"), ("tvd", "a"), ("tvd", "c"))
        ]
        with pytest.raises(ValueError, match="--where objective: expected any of 'a', 'b', 'c'"):
            select(records, [], {"objective": ["d"]})


class TestText:
    @pytest.mark.parametrize(
        ("value", "half", "decimals"),
        [
            (0.5, 0.0123, 3),
            (70.0, 3.4, 1),
            (12345.0, 250.0, 0),
            (0.5, 0.099, 3),
            (1e-9, 1e-12, None),
        ],
    )
    def test_two_digits_of_the_spread_are_left(self, value, half, decimals):
        interval = within(value - half, value + half)
        assert find_decimals([make_cell([make_record(value=value, interval=interval)])]) == decimals

    def test_four_digits_where_no_spread_is_known(self):
        assert find_decimals([make_cell([make_record(value=12.3456)])]) == 2
        assert find_decimals([make_cell([make_record(value=0.0)])]) == 1

    def test_minus_is_a_minus_and_zero_has_none(self):
        assert format_number(-0.126, 2) == "−0.13"
        assert format_number(-0.001, 2) == "0.00"
        assert format_number(1.5e-10, None) == "1.5e-10"

    def test_markdown_table_to_the_letter(self):
        records = [
            make_record("rep-2", value, unit="%", objective="mle", seed_label=str(value))
            for value in (8.0, 9.0)
        ]
        records += [make_record("mauve", 0.5, objective="mle", interval=within(0.4, 0.6))]
        records += [make_record("mauve", 0.9, objective=HOSTILE, interval=within(0.8, 1.0))]
        (table,) = make_tables(records, BETTER)
        assert format_table(table).splitlines() == [
            "| objective | rep-2 (%) | mauve |",
            "| --- | ---: | ---: |",
            "| mle | 8.50 ± 0.71 (n=2) | 0.50 [0.40, 0.60] |",
            r"| &lt;script&gt;alert('x\|y')&lt;/script&gt; | – | **0.90 [0.80, 1.00]** |",
        ]

    def test_the_rule_and_the_definitions_are_said(self):
        records = [make_record(objective=o, interval=within(0.4, 0.6)) for o in "ab"]
        text = format_markdown(make_tables(records, BETTER), records, BETTER, "T & U")
        assert text.startswith("# T &amp; U\n\n## mauve, by objective\n")
        assert "[low, high]: bootstrap interval (95%)." in text
        assert "Bold: the highest of a column, compared by objective, where its interval" in text
        assert "- **mauve** (a number): a definition" in text

    def test_markdown_escapes_what_means_something(self):
        assert escape("a_b *c* `d` _e_\n<f>") == r"a_b \*c\* \`d\` \_e\_ &lt;f&gt;"


class TestPictures:
    def records(self, objectives=("mle", "emo"), scale=1.0):
        return [
            make_record(
                "mauve", base * scale**at + 0.01 * int(s), objective=o, domain=d, seed_label=s
            )
            for at, d in enumerate(("a domain with quite a long name", "y"))
            for o, base in zip(objectives, (0.5, 0.6), strict=True)
            for s in "123"
        ]

    def test_marks_stand_at_means_bars_at_intervals_strokes_at_seeds(self):
        from megatron_emo.report.plots import _draw

        (plot,) = make_plots(self.records(), BETTER)
        (axes,) = _draw(plot, THEMES["light"]).axes
        drawn = [list(line.get_xdata()) for line in axes.get_lines()]
        cell = plot.cells["y", "emo"]
        assert cell.value == pytest.approx(0.62)
        for expected in ([cell.value], list(cell.values), [cell.interval.low, cell.interval.high]):
            assert any(one == pytest.approx(expected) for one in drawn if len(one) == len(expected))
        assert len(drawn) == 3 * len(plot.cells)
        bars = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
        assert {line.get_color() for line in bars} == set(COLOURS[:2])
        for line in bars:
            is_emo = list(line.get_xdata()) in [
                list(_ends(plot.cells[g, "emo"])) for g in plot.groups
            ]
            assert line.get_color() == COLOURS[is_emo]
        assert "higher is better" in axes.figure.get_supxlabel()

    @pytest.mark.parametrize("scale", [1.0, 100.0])
    def test_labels_do_not_overlap_and_one_legend_names_each_series(self, scale):
        from megatron_emo.report.plots import _draw

        (plot,) = make_plots(self.records(scale=scale), BETTER)
        assert has_own_scales(plot) == (scale > 1)
        figure = _draw(plot, THEMES["light"])
        figure.draw_without_rendering()
        texts = [text for axes in figure.axes for text in [axes.title, *axes.get_yticklabels()]]
        texts += [text for axes in figure.axes for text in axes.get_xticklabels()]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert len(boxes) > 4
        assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["mle", "emo"]

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_pictures_keep_their_colours(self, theme):
        from PIL import Image

        (plot,) = make_plots(self.records(), BETTER)
        content = draw_png(plot, theme)
        assert draw_png(plot, theme) == content
        image = Image.open(io.BytesIO(content)).convert("RGB")
        found = {colour for _, colour in image.getcolors()}
        for name in (*COLOURS[:2], THEMES[theme]["ink"], THEMES[theme]["faint"]):
            assert tuple(bytes.fromhex(name[1:])) in found
        assert image.getpixel((0, 0)) == tuple(bytes.fromhex(THEMES[theme]["paper"][1:]))

    def test_long_names_of_short_groups_do_not_overlap(self):
        from megatron_emo.report.plots import _draw

        records = [
            make_record(objective="mle", domain=f"{at} a name " + "of many words " * 6, value=at)
            for at in range(4)
        ]
        (plot,) = make_plots([*records, make_record(objective="emo", domain="x")], BETTER)
        figure = _draw(plot, THEMES["light"])
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
        assert len(boxes) == 5
        assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])

    def test_names_that_matplotlib_reads_as_code_are_shown(self):
        (plot,) = make_plots(self.records(objectives=("_a", "$b$ $")), BETTER)
        assert draw_png(plot).startswith(b"\x89PNG")

    def test_a_metric_of_one_value_has_no_picture(self):
        assert make_plots([make_record(objective="a")], BETTER) == []


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


class TestPage:
    def page(self, records, title="A title", notes=""):
        tables, plots = make_tables(records, BETTER), make_plots(records, BETTER)
        return format_page(records, tables, plots, BETTER, title, notes)

    def test_nothing_in_records_becomes_markup(self):
        record = make_record(
            objective=HOSTILE,
            definition=HOSTILE,
            model=HOSTILE,
            unit=HOSTILE,
            data={HOSTILE: HOSTILE},
            provenance={"command": HOSTILE, "commit": HOSTILE, "date": HOSTILE},
        )
        others = [replace(record, labels={"objective": '" onload="x'}, value=0.7)]
        page = self.page([record, *others], title=HOSTILE, notes=f"{HOSTILE} </pre>")
        tags = Outline(page).tags
        assert sum(tag == "script" for tag, _ in tags) == 1
        assert sum(tag == "pre" for tag, _ in tags) == 1
        assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
        assert "alert(" in page and "<script>alert" not in page

    def test_nothing_is_loaded_and_the_page_is_the_same_each_time(self):
        records = [make_record(objective=o, value=v) for o, v in (("a", 0.1), ("b", 0.2))]
        page = self.page(records)
        addresses = [
            value
            for _, attributes in Outline(page).tags
            for name, value in attributes.items()
            if name in ("src", "href", "srcset")
        ]
        assert all(address.startswith(("#", "data:")) for address in addresses)
        assert not re.search(r"@import|url\(|https?://", page)
        assert "default-src 'none'" in page
        assert page == self.page(records)

    def test_headings_descend_by_one_and_the_language_is_said(self):
        records = [make_record(m, objective=o) for m in ("mauve", "tvd") for o in "ab"]
        tags = Outline(self.page(records, notes="Said.")).tags
        levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
        assert dict(tags)["html"] == {"lang": "en"}
        assert all("alt" in attributes for tag, attributes in tags if tag == "img")

    def test_what_was_run_is_said(self):
        record = make_record(model="gpt", model_sha256="ab" * 32, data={"wiki.jsonl": "cd" * 32})
        page = self.page([record])
        for shown in ("evaluate.py mauve", "c0ffee", "2026-01-02", "ab" * 32, "cd" * 32):
            assert shown in page

    def test_too_much_for_a_page_is_refused(self, monkeypatch):
        monkeypatch.setattr("megatron_emo.report.html.MOST_BYTES", 5_000)
        with pytest.raises(PageError, match="--html: expected at most 5000 bytes, got"):
            self.page([make_record()])

    def test_pictures_that_do_not_fit_are_named(self, monkeypatch):
        records = [make_record(m, objective=o) for m in ("mauve", "tvd") for o in "ab"]
        whole = self.page(records)
        monkeypatch.setattr("megatron_emo.report.html.MOST_BYTES", len(whole.encode()) - 2_000)
        page = self.page(records)
        assert whole.count("<img") == 2 and page.count("<img") == 1
        assert "Left out for the size of the page: tvd." in page
        assert len(page.encode()) < len(whole.encode()) - 2_000


class TestTrace:
    @pytest.fixture
    def document(self, tmp_path):
        """Write records.json, and return write(text) -> path of a document beside it."""
        records = [
            make_record(value=v, objective="emo 1", seed_label=str(s), interval=within(0, 1))
            for s, v in enumerate((0.50, 0.52, 0.54))
        ]
        records += [make_record(value=0.25, objective="mle", n=200, interval=within(0.194, 0.31))]
        write_records(tmp_path / "records.json", records)

        def write(text):
            path = tmp_path / "results.md"
            path.write_text(text)
            return path

        return write

    @pytest.mark.parametrize(
        "shown",
        [
            "0.52",
            "0.52 ± 0.02, n = 3",
            "52.0%",
            "EMO-1: 0.520",
            "0.50, 0.52 and 0.54",
            "a 95% interval [0.470, 0.570]",
        ],
    )
    def test_right_numbers_pass(self, document, shown):
        path = document(f"So [{shown}](records.json#mauve?objective=emo%201) it is.\n")
        trace = check_document(path, render_block)
        assert trace.findings == ()
        assert trace.num_numbers >= 1

    @pytest.mark.parametrize(
        ("shown", "message"),
        [
            ("0.53", "0.53 is none of value 0.25"),
            ("0.254", "0.254 is none of"),
            ("−0.25", "−0.25 is none of"),
            ("2.5%", "2.5% is none of"),
            ("0.95", "0.95 is none of"),
            ("0.25, n = 300", "300 is none of"),
            ("none", r"expected a number in \[none\]"),
        ],
    )
    def test_wrong_numbers_are_found_with_their_line(self, document, shown, message):
        path = document(f"One.\n\nSo [{shown}](records.json#mauve?objective=mle).\n")
        (finding,) = check_document(path, render_block).findings
        assert finding.line == 3
        assert re.search(message, finding.message)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("records.json#tvd", "--metric: expected any of 'mauve', got 'tvd'"),
            ("records.json#mauve?objective=x", "--where objective: expected any of"),
            ("records.json#mauve", "records differ in the label objective"),
            ("other.json#mauve", "no such file"),
        ],
    )
    def test_references_to_nothing_are_found(self, document, target, message):
        (finding,) = check_document(document(f"[0.5]({target})"), render_block).findings
        assert message in finding.message

    def test_tables_are_written_and_later_held_to_their_records(self, document):
        flags = "records.json --rows objective --metric mauve"
        path = document(f"# R\n\n<!-- records: {flags} -->\n<!-- /records -->\nAfter.\n")
        assert "the table is not that of the records" in _messages(path)
        assert update_document(path, render_block) == 1
        text = path.read_text()
        assert "| emo 1 | **0.520 ± 0.020 (n=3)** |" in text
        assert text.endswith("<!-- /records -->\nAfter.\n")
        assert _messages(path) == ""
        path.write_text(text.replace("0.520", "0.530"))
        assert "0.530" in _messages(path)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("records.json --row objective", "unrecognized arguments: --row objective"),
            ("records.json --rows nope", "expected any of 'objective'"),
            ("none.json --rows objective", "no such file"),
        ],
    )
    def test_blocks_with_mistakes_are_found(self, document, flags, message):
        path = document(f"<!-- records: {flags} -->\n<!-- /records -->\n")
        assert re.search(message, _messages(path))

    def test_decimals_without_reference_are_listed_but_not_those_of_code(self, document):
        path = document("It is 0.7.\n\n```\n0.8\n```\nand `0.9` in 2 of 3.\n")
        assert check_document(path, render_block).loose == (1,)

    def test_records_without_command_are_found(self, tmp_path):
        write_records(tmp_path / "bare.json", [replace(make_record(), provenance={})])
        path = tmp_path / "results.md"
        path.write_text("[0.5](bare.json#mauve)")
        assert "expected records that say their command" in _messages(path)

    def test_records_have_to_be_committed_as_they_are(self, document):
        path = document("[0.25](records.json#mauve?objective=mle)")
        folder = path.parent
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]

        def git(*words):
            if shutil.which("git") is None:
                pytest.skip("git is not installed")
            subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

        git("init")
        new = "records.json: expected a committed file, found one that is new or changed"
        assert _messages(path) == new
        git("add", "records.json")
        assert _messages(path) == new
        git("commit", "-m", "records")
        assert _messages(path) == ""
        (folder / "records.json").write_text((folder / "records.json").read_text() + "\n")
        assert _messages(path) == new


def _messages(path) -> str:
    return "\n".join(finding.message for finding in check_document(path, render_block).findings)
