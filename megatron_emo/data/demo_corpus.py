"""About 2 MB of English that every Python carries: its language reference and its docstrings."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.data.files import atomic_file

MIN_CHARACTERS = 40  # shorter docstrings ("Return self.") are noise and mostly repeated

# Tests teach no English, lib2to3's hold files that do not parse, and what pip installed is not
# the standard library.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class CorpusSummary:
    """What `write_demo_corpus` wrote."""

    path: Path
    """The JSONL file."""
    num_documents: int
    """Lines in it, one document each."""
    num_text_bytes: int
    """UTF-8 bytes of text, without the JSON around it."""
    num_duplicates: int
    """Docstrings left out because they had been seen."""


def write_demo_corpus(path: str | Path) -> CorpusSummary:
    """Write the demo corpus as JSON lines `{"text": ...}` and return its counts.

    The documents are those of `pydoc_data.topics` and the standard library's docstrings, each
    once. Sources are parsed, never imported. The same Python writes the same bytes anywhere. The
    order is that of the texts' hashes: Megatron splits off validation data by position, and this
    way every part holds the same mixture.

    Raises:
        OSError: if `path` cannot be written; an older file is then left as it was.
    """
    path = Path(path)
    texts = list(_topics()) + [text for text in _docstrings() if len(text) >= MIN_CHARACTERS]
    documents = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    with atomic_file(path) as handle:
        for text in documents:
            handle.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    num_text_bytes = sum(len(text.encode()) for text in documents)
    return CorpusSummary(path, len(documents), num_text_bytes, len(texts) - len(documents))


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte, of use here only

    for name in sorted(topics):
        yield topics[name].strip()


def _docstrings() -> Iterator[str]:
    """Yield every docstring of the standard library's own sources."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
            yield from docstrings_of(path.read_bytes())


def docstrings_of(source: bytes) -> list[str]:
    """Return the docstrings of a Python source, outer before inner; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    docstrings = (ast.get_docstring(node) for node in _definitions(tree))
    return [text for text in docstrings if text]


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    # Statement lists alone: ast.walk would visit every expression too, at twice the time.
    if isinstance(node, _DOCUMENTED):
        yield node
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        children = getattr(node, field, None)
        if isinstance(children, list):
            for child in children:
                yield from _definitions(child)
