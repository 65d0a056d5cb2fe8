"""The demo corpus against what the running interpreter itself says about its modules."""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap

import pytest

from megatron_emo.data.demo_corpus import docstrings_of, write_demo_corpus
from megatron_emo.data.files import atomic_file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "folder" / "corpus.jsonl"
    summary = write_demo_corpus(path)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return summary, texts


def test_holds_about_two_megabytes_in_distinct_documents(corpus):
    summary, texts = corpus
    assert summary.num_documents == len(texts) == len(set(texts)) > 3000
    assert summary.num_text_bytes == sum(len(text.encode()) for text in texts)
    assert 1.5e6 < summary.num_text_bytes < 4e6


def test_holds_docstrings_as_the_interpreter_shows_them(corpus):
    _, texts = corpus
    for thing in (json.dumps, textwrap.TextWrapper, inspect):
        assert inspect.getdoc(thing) in texts


def test_holds_the_language_reference(corpus):
    _, texts = corpus
    assert sum("with_stmt" in text and "context manager" in text for text in texts) >= 1


def test_order_depends_on_the_texts_alone(corpus):
    _, texts = corpus
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert digests == sorted(digests)


def test_docstrings_of_finds_every_definition_and_no_other_string():
    source = b'''"""Module."""
x = "no docstring"
try:
    def f():
        """Function in a block."""
        class Inner:
            """Class in a function."""
            async def g(self): "Coroutine."
except ValueError:
    def f():
        """Fallback."""
'''
    assert docstrings_of(source) == [
        "Module.",
        "Function in a block.",
        "Class in a function.",
        "Coroutine.",
        "Fallback.",
    ]


@pytest.mark.parametrize("source", [b"def f(:", b"# coding: latin-1\n\x00", b"\xff\xfe"])
def test_docstrings_of_passes_over_what_is_no_python(source):
    assert docstrings_of(source) == []


def test_atomic_file_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_file(path) as handle:
        handle.write(b"new")
        raise KeyError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with atomic_file(path) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"new"
