"""tools/report.py through its main(), and its page in a real browser."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time

import pytest

from megatron_emo.evaluation.records import Interval, Record, write_records

HOSTILE = "<script>document.title = 'broken'</script>"
ABOUT = {"command": "evaluate.py mauve", "commit": "c0ffee", "date": "2026-01-02T03:04:05Z"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("report").main


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> str:
    """A folder of records: three objectives on two domains and a hostile one, two seeds."""
    folder = tmp_path_factory.mktemp("records")
    domains = {"wiki": 0.5, "books": 0.7, HOSTILE: 0.9}
    write_records(
        folder / "all.json",
        [
            Record(
                "mauve",
                base + 0.1 * at + 0.01 * seed,
                "1",
                "MAUVE",
                100,
                labels={"objective": objective, "domain": domain, "seed": str(seed)},
                interval=Interval(base, base + 0.4),
                provenance=ABOUT,
            )
            for domain, base in domains.items()
            for at, objective in enumerate(("mle", "emo1", "emo2"))
            for seed in (0, 1)
        ],
    )
    return str(folder)


def test_tables_pictures_and_a_page_come_out(tmp_path, records, main, capsys):
    notes = tmp_path / "notes.md"
    notes.write_text("Small runs.")
    outputs = [tmp_path / "out" / name for name in ("t.md", "p.html", "png")]
    flags = zip(("--markdown", "--html", "--png", "--notes"), [*outputs, notes], strict=True)
    main(["--records", records, *(str(word) for pair in flags for word in pair), "--title", "Ours"])
    markdown, page = (path.read_text() for path in outputs[:2])
    assert markdown.startswith("# Ours\n")
    assert "| emo1 |" in markdown and "0.6050 ± 0.0071" in markdown
    assert "<title>Ours</title>" in page and "Small runs." in page and "0.6050 ± 0.0071" in page
    assert len(page) < 500_000
    assert (outputs[2] / "mauve.png").read_bytes().startswith(b"\x89PNG")
    assert f"{outputs[1]}: 18 records, 1 tables" in capsys.readouterr().out


def test_without_outputs_the_tables_are_printed(records, main, capsys):
    main(["--records", records, "--rows", "domain", "--columns", "objective,metric"])
    assert "| domain | mle / mauve | emo1 / mauve | emo2 / mauve |" in capsys.readouterr().out


def test_documents_are_updated_and_checked(tmp_path, records, main, capsys):
    shutil.copy(f"{records}/all.json", tmp_path)
    path = tmp_path / "results.md"
    path.write_text(
        "<!-- records: all.json --rows objective --columns domain -->\n<!-- /records -->\n"
        "[0.505](all.json#mauve?objective=mle&domain=wiki), and 0.1 from nowhere.\n"
    )
    main(["--update", str(path), "--check", str(path)])
    said = capsys.readouterr().out
    assert "1 numbers and 1 tables agree" in said
    assert "a decimal without a reference" in said
    with pytest.raises(SystemExit, match=r"results.md:\d+: a decimal without a reference"):
        main(["--check", str(path), "--strict"])
    path.write_text(path.read_text().replace("0.505", "0.515"))
    with pytest.raises(SystemExit, match=r"0.515 is none of value 0.505"):
        main(["--check", str(path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--records: expected files or folders, got none"),
        (["--records", "{folder}/none.json"], "no such file or folder"),
        (["--records", "{folder}"], "no records"),
        (["--records", "{records}", "--metric", "x"], "--metric: expected any of 'mauve', got 'x'"),
        (["--records", "{records}", "--where", "x"], "--where: expected NAME=VALUE, got 'x'"),
        (["--records", "{records}", "--better", "mauve=up"], "--better: expected METRIC=high"),
        (["--records", "{records}", "--rows", "domain"], "put it into --rows or --columns"),
        (["--check", "{folder}/none.md"], "No such file"),
        (["--update", "{empty}"], "expected a block"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(tmp_path, records, main, argv, message):
    (tmp_path / "empty.md").write_text("Nothing.")
    places = {"folder": tmp_path, "records": records, "empty": tmp_path / "empty.md"}
    words = [word.format(**places) for word in argv]
    with pytest.raises(SystemExit, match=f"^report: .*{message}"):
        main([*words, "--html", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_help_shows_the_docstrings_command(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python tools/report.py --records results/ --html" in capsys.readouterr().out


class Browser:
    """A headless Chromium, told what to do through pipes: no port is opened."""

    def __init__(self, profile) -> None:
        read_end, self._out = os.pipe()
        self._in, write_end = os.pipe()
        # The browser reads orders from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = ["bash", "-c", shell, BROWSER, *flags, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        self.events: list[dict] = []
        self._buffer, self._count, self._session = b"", 0, None

    def call(self, method: str, **params) -> dict:
        """Return the answer to an order; what the page reports meanwhile is kept in `events`."""
        self._count += 1
        order = {"id": self._count, "method": method, "params": params}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._out, json.dumps(order).encode() + b"\0")
        while (message := self._read()).get("id") != self._count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def _read(self) -> dict:
        limit = time.monotonic() + 120
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, limit - time.monotonic()))
            block = os.read(self._in, 1 << 16) if ready else b""
            if not block:
                raise TimeoutError("the browser does not answer")
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int = 1200, scheme: str = "light") -> None:
        """Load a page and wait until it has loaded."""
        if self._session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str):
        """Return the value of JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key."""
        code = {"Tab": 9, "Enter": 13}[key]
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def complaints(self) -> list[dict]:
        """Return errors of the page, and whatever it tried to load beside itself."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        loaded = [
            event
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
            and not event["params"]["request"]["url"].startswith(("data:", "file:"))
        ]
        return [event for event in self.events if event["method"] in bad] + loaded

    def close(self) -> None:
        os.close(self._out)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no Chromium: none of chromium, google-chrome, chrome is on PATH")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory, records, main) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    rows = ["--rows", "domain,objective", "--title", "Ours"]
    main(["--records", records, *rows, "--html", str(path)])
    return path.as_uri()


FIRST = "document.querySelector('table[data-grid]')"
COLUMN = f"[...{FIRST}.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[2].firstChild.data)"


def test_the_script_runs_and_the_table_shows_the_numbers(browser, page):
    browser.open(page)
    assert int(browser.evaluate("document.documentElement.dataset.ready")) >= 4
    assert browser.evaluate("document.title") == "Ours"
    text = browser.evaluate(f"{FIRST}.textContent")
    assert "0.6050 ± 0.0071" in text
    assert HOSTILE in text
    assert browser.evaluate("document.images[0].complete && document.images[0].naturalWidth") > 0
    assert browser.complaints() == []


def test_tables_are_sorted_and_filtered(browser, page):
    browser.open(page)
    click = f"{FIRST}.tHead.rows[0].cells[2].querySelector('button').click()"
    head = f"{FIRST}.tHead.rows[0].cells[2].getAttribute('aria-sort')"
    for direction in ("ascending", "descending"):
        browser.evaluate(click)
        values = [float(text.split()[0]) for text in browser.evaluate(COLUMN)]
        assert values == sorted(values, reverse=direction == "descending")
        assert browser.evaluate(head) == direction
    browser.evaluate(
        "var box = document.querySelector('.filter input'); box.value = 'WIKI emo';"
        "box.dispatchEvent(new Event('input'))"
    )
    assert [text.split()[0] for text in browser.evaluate(COLUMN)] == ["0.7050", "0.6050"]
    assert browser.evaluate("document.querySelector('.filter output').value") == "2 of 9"
    assert browser.complaints() == []


def test_keys_are_enough(browser, page):
    browser.open(page)
    for _ in range(20):
        browser.press("Tab")
        if browser.evaluate("document.activeElement.matches('th button')"):
            break
    shown = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert shown == "solid"
    browser.press("Enter", "\r")
    sorted_by = "document.activeElement.closest('th').getAttribute('aria-sort')"
    assert browser.evaluate(sorted_by) == "ascending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_legible_and_narrow_screens_do_not_scroll_sideways(browser, page, scheme):
    browser.open(page, width=400, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    ratios = browser.evaluate(
        """
        (() => {
          const parts = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const light = (colour) => {
            const [r, g, b] = parts(colour).map((c) =>
              c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return ["h1", "p", "a", "td", "td small", ".caption", "th button"].map((name) => {
            const ink = light(getComputedStyle(document.querySelector(name)).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          });
        })()
        """
    )
    assert min(ratios) >= 4.5
    source = browser.evaluate("document.images[0].currentSrc === document.images[0].src")
    assert source == (scheme == "light")
