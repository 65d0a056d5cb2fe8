"""Documents out of JSON lines and plain text, each with the file, line and byte it came from."""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

INPUT_FORMATS = ("auto", "jsonl", "text")
TEXT_DOCUMENTS = ("paragraph", "line", "file")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DocumentError(ValueError):
    """A document that cannot be used; the message opens with `FILE:LINE:`."""


@dataclass(frozen=True)
class RawDocument:
    """One document's bytes, not yet decoded."""

    path: str
    line: int
    """Line it starts on, from 1."""
    offset: int
    """Byte it starts at in the file (decompressed, if the file is .gz), from 0."""
    data: bytes
    is_json: bool

    @property
    def location(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class InputFormat:
    """How files fall into documents."""

    input_format: str = "auto"
    """jsonl: one JSON object per line; text: plain text; auto: .txt and .txt.gz are text, every
    other name is JSON lines, as it is for Megatron's own tool."""
    text_documents: str = "paragraph"
    """What a document is in plain text: a paragraph (blank lines separate them), a line, a file."""

    def __post_init__(self) -> None:
        if self.input_format not in INPUT_FORMATS:
            raise ValueError(f"--input-format {self.input_format}: expected one of {INPUT_FORMATS}")
        if self.text_documents not in TEXT_DOCUMENTS:
            raise ValueError(
                f"--text-documents {self.text_documents}: expected one of {TEXT_DOCUMENTS}"
            )

    def is_json(self, path: Path) -> bool:
        if self.input_format != "auto":
            return self.input_format == "jsonl"
        return not path.name.removesuffix(".gz").endswith(".txt")


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and glob patterns name, patterns in sorted order.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        ValueError: if a file is named twice, which would count it double.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise FileNotFoundError(f"--input {pattern}: no such file")
        paths.extend(files)
    repeated = [path for index, path in enumerate(paths) if path in paths[:index]]
    if repeated:
        raise ValueError(f"--input names {repeated[0]} twice")
    return paths


class DocumentReader:
    """Iterates over the documents of several files, and knows how far it has come.

    Raises OSError at once for a file that cannot be opened, and DocumentError at once for a file of
    no bytes (unless `on_empty_file` is "skip"), while iterating for a damaged .gz file.
    """

    def __init__(
        self, paths: Sequence[Path], input_format: InputFormat, on_empty_file: str = "fail"
    ) -> None:
        sizes = {path: _size(path) for path in paths}
        self.empty_files = [path for path, size in sizes.items() if size == 0]
        if self.empty_files and on_empty_file == "fail":
            raise DocumentError(f"{self.empty_files[0]}:1: the file is empty (0 bytes)")
        self.total_bytes = sum(sizes.values())
        self._sizes = sizes
        self._input_format = input_format
        self._bytes_done = 0
        self._raw: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes taken from disk so far; compressed ones where the file is compressed."""
        return self._bytes_done + (self._raw.tell() if self._raw is not None else 0)

    def __iter__(self) -> Iterator[RawDocument]:
        for path, size in self._sizes.items():
            with path.open("rb") as self._raw:
                yield from self._documents(path, self._raw)
            self._raw = None
            self._bytes_done += size

    def _documents(self, path: Path, raw: IO[bytes]) -> Iterator[RawDocument]:
        is_json = self._input_format.is_json(path)
        stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        lines = _numbered_lines(path, stream)
        if is_json or self._input_format.text_documents == "line":
            for line, offset, data in lines:
                yield RawDocument(str(path), line, offset, data.rstrip(b"\r\n"), is_json)
        elif self._input_format.text_documents == "file":
            data = b"".join(data for _, _, data in lines)
            yield RawDocument(str(path), 1, 0, data.rstrip(b"\r\n"), False)
        else:
            yield from _paragraphs(path, lines)


def decode_document(document: RawDocument, keys: Sequence[str]) -> list[str]:
    """Return the document's text for each key; plain text is the same under every key.

    Raises:
        DocumentError: for bytes that are not UTF-8, lines that are not a JSON object, keys that are
            missing or hold no string, and lone surrogates, which no tokenizer can encode.
    """
    text = _decode_utf8(document)
    if not document.is_json:
        return [text] * len(keys)
    if not text.strip():  # a blank line between objects: an empty document
        return [""] * len(keys)
    return [_value(document, record, key) for record in [_parse(document, text)] for key in keys]


def _size(path: Path) -> int:
    with path.open("rb") as handle:  # opened, for a file that may not be read to show at once
        return os.fstat(handle.fileno()).st_size


def _numbered_lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line from 1, byte offset, bytes); a byte order mark at the start is dropped."""
    line, offset = 0, 0
    try:
        # The handler below needs the line that was read last.
        for line, data in enumerate(stream, start=1):  # noqa: B007
            start = len(_BYTE_ORDER_MARK) if line == 1 and data.startswith(_BYTE_ORDER_MARK) else 0
            yield line, offset + start, data[start:]
            offset += len(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DocumentError(f"{path}:{line + 1}: damaged gzip data: {error}") from error


def _paragraphs(path: Path, lines: Iterator[tuple[int, int, bytes]]) -> Iterator[RawDocument]:
    first, start, parts = 0, 0, []
    for line, offset, data in lines:
        if data.strip():
            if not parts:
                first, start = line, offset
            parts.append(data)
        elif parts:
            yield RawDocument(str(path), first, start, b"".join(parts).rstrip(b"\r\n"), False)
            parts = []
    if parts:
        yield RawDocument(str(path), first, start, b"".join(parts).rstrip(b"\r\n"), False)


def _decode_utf8(document: RawDocument) -> str:
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = document.line + document.data.count(b"\n", 0, error.start)
        raise DocumentError(
            f"{document.path}:{line}: not UTF-8: byte 0x{document.data[error.start]:02x} "
            f"at byte offset {document.offset + error.start} of the file ({error.reason})"
        ) from error


def _parse(document: RawDocument, text: str) -> dict:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"{document.location}: not JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; nesting without end
        raise DocumentError(f"{document.location}: not readable JSON: {error}") from error
    if not isinstance(record, dict):
        raise DocumentError(
            f"{document.location}: expected a JSON object, found {type(record).__name__}"
        )
    return record


def _value(document: RawDocument, record: dict, key: str) -> str:
    if key not in record:
        found = ", ".join(sorted(record)[:10]) or "none"
        raise DocumentError(f"{document.location}: no key {key!r} (--json-keys); found: {found}")
    value = record[key]
    if not isinstance(value, str):
        raise DocumentError(
            f"{document.location}: key {key!r} holds {type(value).__name__}, expected a string"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"{document.location}: key {key!r} holds a lone surrogate "
            f"(\\u{ord(value[error.start]):04x}) at character {error.start}"
        ) from error
    return value


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which files are read, and how they fall into documents."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines or text files, or quoted glob patterns; names ending in .gz are unpacked",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of a JSON line that hold text (default: text)",
    )
    group.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default=InputFormat.input_format,
        help="auto: names ending in .txt or .txt.gz are text, all others JSON lines "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--text-documents",
        choices=TEXT_DOCUMENTS,
        default=InputFormat.text_documents,
        help="what one document is in a text file; paragraphs end at blank lines "
        "(default: %(default)s)",
    )


def take_input_format(args: dict) -> InputFormat:
    """Return the InputFormat of parsed flags, and take its fields out of `args`."""
    return InputFormat(args.pop("input_format"), args.pop("text_documents"))
