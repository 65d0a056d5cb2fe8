"""Documents, and the file, line and byte that errors name, against files laid out by hand."""

from __future__ import annotations

import gzip

import pytest

from megatron_emo.data.documents import (
    DocumentError,
    DocumentReader,
    InputFormat,
    decode_document,
    expand_inputs,
)


def read(path, keys=("text",), **input_format):
    reader = DocumentReader([path], InputFormat(**input_format))
    return [(doc.line, doc.offset, decode_document(doc, keys)) for doc in reader]


@pytest.mark.parametrize(
    ("text_documents", "expected"),
    [
        ("paragraph", [(2, 1, "one\n two"), (6, 12, "three")]),
        ("line", [(1, 0, ""), (2, 1, "one"), (3, 5, " two"), (4, 10, ""), (5, 11, ""),
                  (6, 12, "three")]),
        ("file", [(1, 0, "\none\n two\n\n\nthree")]),
    ],
)  # fmt: skip
def test_plain_text_falls_into_documents(tmp_path, text_documents, expected):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\none\n two\n\n\nthree\n")
    found = read(path, text_documents=text_documents)
    assert found == [(line, offset, [text]) for line, offset, text in expected]


@pytest.mark.parametrize(
    ("name", "is_json"),
    [("a.jsonl", True), ("a.jsonl.gz", True), ("a", True), ("a.txt", False), ("a.txt.gz", False)],
)
def test_auto_format_goes_by_name(tmp_path, name, is_json):
    assert InputFormat().is_json(tmp_path / name) is is_json


def test_json_lines_give_every_key_and_blank_lines_are_empty_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    first = b'\xef\xbb\xbf{"text": "caf\xc3\xa9", "b": "\\u4e00"}\r\n'
    path.write_bytes(first + b'\n{"text": "", "b": "x"}')
    assert read(path, keys=("b", "text")) == [
        (1, 3, ["一", "café"]),  # after the byte order mark
        (2, len(first), ["", ""]),
        (3, len(first) + 1, ["x", ""]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\xffb"}', r"byte 0xff at byte offset 26 of the file"),
        (b'{"text": "a"', r"not JSON: .* at column 13"),
        (b'{"body": "a"}', r"no key 'text' \(--json-keys\); found: body"),
        (b'{"text": 5}', r"key 'text' holds int, expected a string"),
        (b'{"text": null}', r"key 'text' holds NoneType"),
        (b'["text"]', r"expected a JSON object, found list"),
        (b'{"text": "a\\ud800"}', r"lone surrogate \(\\ud800\) at character 1"),
        (b"[" * 100_000, r"not readable JSON|not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", r"not readable JSON: .*limit"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_unusable_lines_are_named(tmp_path, line, message, compressed):
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    data = b'{"text": "ab"}\n' + line + b"\n"
    path.write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(DocumentError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_wrong_byte_within_a_paragraph_is_located_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\nthr\xe9e\nfour\n")
    with pytest.raises(DocumentError, match=r"a\.txt:4: not UTF-8: byte 0xe9 at byte offset 12 "):
        read(path)


def test_damaged_gzip_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "x"}\n' * 5)
    path.write_bytes(whole[:-9])
    with pytest.raises(DocumentError, match=r"a\.jsonl\.gz:\d+: damaged gzip data"):
        read(path)


def test_empty_file_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    paths = [tmp_path / "a.jsonl"]
    with pytest.raises(DocumentError, match=r"a\.jsonl:1: the file is empty \(0 bytes\)"):
        DocumentReader(paths, InputFormat())
    assert DocumentReader(paths, InputFormat(), on_empty_file="skip").empty_files == paths


def test_bytes_read_reaches_the_total(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 100)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100))
    reader = DocumentReader(expand_inputs([str(tmp_path / "*")]), InputFormat())
    assert (reader.bytes_read, len(list(reader))) == (0, 200)
    assert (
        reader.bytes_read
        == reader.total_bytes
        == sum(path.stat().st_size for path in tmp_path.iterdir())
    )


def test_expand_inputs_sorts_patterns_and_refuses_repeats_and_nothing(tmp_path):
    for name in ("b.txt", "a.txt", "odd[1].txt"):
        (tmp_path / name).write_text("x")
    names = [path.name for path in expand_inputs([str(tmp_path / "?.txt")])]
    assert names == ["a.txt", "b.txt"]
    assert expand_inputs([str(tmp_path / "odd[1].txt")]) == [tmp_path / "odd[1].txt"]
    with pytest.raises(ValueError, match=r"--input names .*a\.txt twice"):
        expand_inputs([str(tmp_path / "a.txt"), str(tmp_path / "*.txt")])
    with pytest.raises(FileNotFoundError, match=r"--input .*\.csv: no such file"):
        expand_inputs([str(tmp_path / "*.csv")])


@pytest.mark.parametrize("field", ["input_format", "text_documents"])
def test_unknown_format_names_its_flag(field):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} csv: expected one of"):
        InputFormat(**{field: "csv"})
