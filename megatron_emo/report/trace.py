"""Check that what a Markdown file says of measurements is what committed records say.

Two forms carry a reference:

- A link to a record file, metric and labels behind the #; all numbers of its text are checked:
  [0.512 ± 0.010](results/records.json#mauve?objective=emo1&domain=wikitext)
- A table between two comments, with the flags of tools/report.py; it has to be the table that they
  give, and `--update` writes it:
  <!-- records: results/records.json --rows objective --columns domain --metric mauve -->
  <!-- /records -->

Paths come before flags and are relative to the Markdown file. A number of a link's text is right if
it is the value, the standard deviation, an end or the level of the interval, n, or the value of one
seed, rounded to the decimals that are written; behind it a % asks for a hundred times a number of
unit 1.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.evaluation.records import Record, RecordError, read_records
from megatron_emo.report.layout import select
from megatron_emo.report.tables import Cell, make_cell

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+\.json)#([^()\s]+)\)")
_BLOCK = re.compile(r"<!-- records: (.*?) -->\n(.*?)<!-- /records -->", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,−-])([-−+]?)(\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?)\s?(%?)(?![\w])")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """What is wrong, and in which line."""

    line: int
    message: str


@dataclass(frozen=True)
class Trace:
    """What a check found."""

    num_numbers: int
    """Of links."""
    num_tables: int
    findings: tuple[Finding, ...]
    loose: tuple[int, ...]
    """Lines with a decimal number that carries no reference."""


Render = Callable[[str, Path], str]
"""(flags, folder of the document) -> a table."""


def check_document(path: Path, render: Render) -> Trace:
    """Return what does not hold of a Markdown file.

    Raises:
        OSError: a file that cannot be read.
    """
    text = _blank(path.read_text(encoding="utf-8"), _CODE)
    findings: list[Finding] = []
    numbers = 0
    for match in _LINK.finditer(text):
        count, messages = _check_link(match, path.parent)
        numbers += count
        findings += [Finding(_line_of(text, match), message) for message in messages]
    blocks = list(_BLOCK.finditer(text))
    for match in blocks:
        messages = _check_block(match, path.parent, render)
        findings += [Finding(_line_of(text, match), message) for message in messages]
    loose = _find_loose(_blank(_blank(text, _BLOCK), _LINK))
    return Trace(numbers, len(blocks), tuple(sorted(findings, key=lambda f: f.line)), loose)


def update_document(path: Path, render: Render) -> int:
    """Write the tables of a Markdown file anew, whole or not at all; return how many there are.

    Raises:
        ValueError: flags that give no table, or a file without any block.
    """
    text = path.read_text(encoding="utf-8")

    def replace(match: re.Match) -> str:
        return f"<!-- records: {match[1]} -->\n{render(match[1], path.parent)}\n<!-- /records -->"

    updated, count = _BLOCK.subn(replace, text)
    if not count:
        raise ValueError(f"{path}: expected a block '<!-- records: FILE flags -->', found none")
    part = path.with_name(f".{path.name}.part")
    part.write_text(updated, encoding="utf-8")
    part.replace(path)
    return count


def _blank(text: str, pattern: re.Pattern) -> str:
    """Put spaces for what the pattern finds: places and lines stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _line_of(text: str, match: re.Match) -> int:
    return text.count("\n", 0, match.start()) + 1


def _check_link(match: re.Match, folder: Path) -> tuple[int, list[str]]:
    shown, target, fragment = match.groups()
    where = f"{target}#{fragment}"
    path = folder / urllib.parse.unquote(target)
    try:
        cell = find_cell(read_records([path]), fragment)
    except (RecordError, ValueError, OSError) as error:
        return 0, [f"{where}: {error}"]
    messages = _check_source(path, target, cell.records)
    found = list(_NUMBER.finditer(shown))
    if not found:
        messages.append(f"{where}: expected a number in [{shown}]")
    known = list(_known_values(cell))
    for number in found:
        if not _is_known(number, known, cell.unit):
            values = ", ".join(f"{name} {value:.6g}" for name, value in known)
            messages.append(f"{where}: {number[0].strip()} is none of {values}")
    return len(found), messages


def find_cell(records: list[Record], fragment: str) -> Cell:
    """Return the cell of METRIC?label=value&label=value; seeds are pooled.

    Raises:
        ValueError: no such metric or label, or labels that leave different records.
    """
    metric, _, query = fragment.partition("?")
    labels = urllib.parse.parse_qsl(query, keep_blank_values=True)
    where = {name: [value] for name, value in labels}
    return make_cell(select(records, [urllib.parse.unquote(metric)], where), tuple(where))


def _known_values(cell: Cell) -> Iterator[tuple[str, float]]:
    yield "value", cell.value
    if cell.sd is not None:
        yield "sd", cell.sd
        yield "n", cell.n
        yield from (("a seed's", value) for value in cell.values)
    else:
        yield "n", cell.records[0].n
    if cell.interval is not None:
        yield "low", cell.interval.low
        yield "high", cell.interval.high
        yield "level", cell.interval.level


def _is_known(number: re.Match, known: list[tuple[str, float]], unit: str) -> bool:
    sign, digits, percent = number.groups()
    digits = digits.replace(",", "")
    written = float(digits) * (-1 if sign in ("-", "−") and sign else 1)
    mantissa, _, exponent = digits.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    half = 0.5 * 10.0**-decimals * (1 + 1e-9)
    for name, value in known:
        if (name == "level" and not percent) or (name == "n" and percent):
            continue
        true = 100 * value if percent and (unit != "%" or name == "level") else value
        if abs(true - written) <= half + 1e-12 * abs(true):
            return True
    return False


def _check_block(match: re.Match, folder: Path, render: Render) -> list[str]:
    flags, table = match[1], match[2].strip()
    try:
        expected = render(flags, folder).strip()
    except (RecordError, ValueError, OSError) as error:
        return [f"records: {flags}: {error}"]
    messages = []
    for name in itertools.takewhile(lambda word: not word.startswith("-"), shlex.split(flags)):
        messages += _check_source(folder / name, name, read_records([folder / name]))
    if table == expected:
        return messages
    pairs = zip(table.splitlines(), expected.splitlines(), strict=False)
    line = next((f"{a!r}, expected {b!r}" for a, b in pairs if a != b), "its length differs")
    return [*messages, f"records: {flags}: the table is not that of the records: {line}"]


def _check_source(path: Path, name: str, records: tuple[Record, ...] | list[Record]) -> list[str]:
    """It has to be committed, and the records have to say by which command they came."""
    messages = []
    if _is_committed(path) is False:
        messages.append(f"{name}: expected a committed file, found one that is new or changed")
    if not all(record.provenance.get("command") for record in records):
        messages.append(f"{name}: expected records that say their command (provenance.command)")
    return messages


def _is_committed(path: Path) -> bool | None:
    """Say whether a file, or all of a folder, is in git as it lies there; None outside of git."""
    path = path.resolve()
    command = [
        "git",
        "status",
        "--porcelain",
        "--untracked-files=all",
        "--ignored",
        "--",
        path.name,
    ]
    try:
        run = subprocess.run(command, cwd=path.parent, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if run.returncode else not run.stdout


def _find_loose(text: str) -> tuple[int, ...]:
    lines = enumerate(text.splitlines(), 1)
    return tuple(
        number for number, line in lines if any("." in m[2] for m in _NUMBER.finditer(line))
    )
