"""Every parser on files that hypothesis makes up, and on all that once broke one.

200 files each: mutations of sound ones, and pieces of a grammar. Longer: `make fuzz`.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from guard import Hang, Parser, limited_memory, limited_seconds  # noqa: E402

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
TARGETS = sorted(
    path.stem
    for path in (Path(__file__).parent / "targets").glob("*.py")
    if path.stem != "__init__"
)
NUM_EXAMPLES = 200


@cache
def parser_of(target: str) -> Parser:
    return importlib.import_module(f"targets.{target}").PARSER


@cache
def seeds_of(target: str) -> list[bytes]:
    return parser_of(target).seeds()


@st.composite
def files(draw, target: str) -> bytes:
    """A sound file with up to three changes, or words in a row."""
    words = st.sampled_from(parser_of(target).words) | st.binary(max_size=4)
    if not draw(st.integers(0, 7)):
        return b"".join(draw(st.lists(words, max_size=12)))
    data = draw(st.sampled_from(seeds_of(target)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("bit", "cut", "drop", "insert", "replace", "repeat")))
        rest = draw(st.integers(0, 16))
        if kind == "bit" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + rest :]
        elif kind == "insert":
            data = data[:at] + draw(words) + data[at:]
        elif kind == "replace":
            word = draw(words)
            data = data[:at] + word + data[at + len(word) :]
        else:
            data = data[:at] + data[max(0, at - rest) :]
    return data


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_file_is_accepted(target, tmp_path):
    for seed in seeds_of(target):
        parser_of(target).parse(seed, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_made_up_files_raise_what_is_documented(target, tmp_path_factory):
    parser, folder = parser_of(target), tmp_path_factory.mktemp(target)
    parser.parse(seeds_of(target)[0], folder)  # imports take longer than a parser may

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(files(target))
    def check(data: bytes) -> None:
        parser(data, folder)

    with limited_memory():
        check()


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_what_broke_a_parser_does_so_no_more(path, tmp_path):
    parser = parser_of(path.parent.name)
    parser.parse(seeds_of(path.parent.name)[0], tmp_path)
    with limited_memory():
        is_accepted = parser(path.read_bytes(), tmp_path)
    assert is_accepted == path.name.startswith("passed")


def test_the_guard_sees_hangs_memory_and_other_errors(tmp_path):
    def hang(data: bytes, folder: Path) -> None:
        while True:
            pass

    def grow(data: bytes, folder: Path) -> None:
        bytearray(2 << 30)

    def fail(data: bytes, folder: Path) -> None:
        raise KeyError("x")

    with pytest.raises(Hang), limited_seconds(0.05):
        hang(b"", tmp_path)
    with pytest.raises(MemoryError), limited_memory():
        Parser(grow, list)(b"", tmp_path)
    with pytest.raises(KeyError):
        Parser(fail, list)(b"", tmp_path)
