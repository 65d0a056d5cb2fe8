"""Records and texts: what is written comes back, what is not a number or a text is named."""

from __future__ import annotations

import hashlib
import json

import pytest

from megatron_emo.evaluation.command import format_record, parse_labels
from megatron_emo.evaluation.records import (
    Interval,
    Record,
    RecordError,
    hash_file,
    hash_model,
    read_records,
    write_records,
)
from megatron_emo.evaluation.texts import read_texts


def make_record(**changes) -> Record:
    values = {
        "metric": "rep-2",
        "value": 12.5,
        "unit": "%",
        "definition": "simctg",
        "n": 40,
        "seed": 3,
        "interval": Interval(11.0, 14.0, 0.8, "bootstrap"),
        "settings": {"orders": [2, 3], "cut": None},
        "labels": {"objective": "emo1"},
        "data": {"a.jsonl": "00"},
        **changes,
    }
    return Record(**values)


def test_records_come_back_as_they_were(tmp_path):
    records = [make_record(), make_record(metric="zipf", value=-1, interval=None, seed=None)]
    write_records(tmp_path / "new" / "r.json", records)
    assert read_records([tmp_path / "new" / "r.json"]) == records
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]
    plain = json.loads((tmp_path / "new" / "r.json").read_text())["records"][0]
    assert plain["value"] == 12.5 and plain["interval"]["low"] == 11.0
    assert {"commit", "date", "command", "versions"} <= set(plain["provenance"])


def test_commands_keep_no_absolute_path(monkeypatch):
    from megatron_emo.evaluation import records

    monkeypatch.setattr(
        "sys.argv", ["/far/away/evaluate.py", "text", "--texts", "/home/me/d/a.txt"]
    )
    command = records.provenance.__wrapped__()["command"]
    assert command == "evaluate.py text --texts d/a.txt"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, "3"])
def test_a_value_is_a_finite_number(value):
    with pytest.raises(RecordError, match="rep-2: value: expected a"):
        make_record(value=value)


def test_intervals_are_ordered():
    with pytest.raises(RecordError, match="low <= high"):
        Interval(2.0, 1.0)
    with pytest.raises(RecordError, match="low <= high"):
        Interval(float("nan"), 1.0)


def test_folders_give_their_record_files_in_order_and_leave_other_json_out(tmp_path):
    write_records(tmp_path / "b.json", [make_record(metric="b")])
    write_records(tmp_path / "a" / "z.json", [make_record(metric="a")])
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    assert [record.metric for record in read_records([tmp_path])] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"seed": 1}', "schema: expected 'megatron_emo.records/1'"),
        ('{"schema": "megatron_emo.records/1", "records": [{"metric": "x"}]}', "missing .*value"),
        (
            '{"schema": "megatron_emo.records/1", "records": [{"metric": "x", "value": 1, '
            '"unit": "1", "definition": "d", "n": 1, "wrong": 2}]}',
            "unknown .*wrong",
        ),
    ],
)
def test_a_file_named_must_hold_records(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=message):
        read_records([path])


def test_missing_paths_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_records([tmp_path / "absent"])
    with pytest.raises(RecordError, match="no records"):
        read_records([tmp_path])


def test_hashes_are_of_contents(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert hash_file(tmp_path / "config.json") == hashlib.sha256(b"{}").hexdigest()
    before = hash_model(tmp_path)
    (tmp_path / "README.md").write_text("a card is not the model")
    assert hash_model(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert hash_model(tmp_path) != before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", '{"text": "a b"}\n\n{"text": "c\\u2028d"}\n'),
        ("t.json", '["a b", {"text": "c\\u2028d"}]'),
        ("t.json", '{"text": ["a b", "c\\u2028d"], "n": 2}'),
        ("t.txt", "a b\n  \nc\u2028d\n"),
    ],
)
def test_texts_of_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(tmp_path / name) == ["a b", "c\u2028d"]
    assert read_texts(tmp_path / name, limit=1) == ["a b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text"\n', r"t.jsonl:2: expected JSON"),
        ("t.jsonl", b'{"body": "a"}\n', r"t.jsonl:1: --field: expected one of \['body'\]"),
        ("t.jsonl", b'{"text": 3}\n', "expected a string, got int"),
        ("t.json", b'{"original": ["a"], "n": 1}', r"--field: expected one of \['original'\]"),
        ("t.json", b"3", "expected a list of texts, got int"),
        ("t.txt", b"\xff", "expected UTF-8, byte 0"),
        ("t.txt", b"\n\n", "found none"),
    ],
)
def test_what_is_not_a_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_labels():
    assert parse_labels(["objective=emo1", "note=a=b"]) == {"objective": "emo1", "note": "a=b"}
    for wrong in ("objective", "=emo1"):
        with pytest.raises(ValueError, match="--label: expected NAME=VALUE"):
            parse_labels([wrong])


def test_a_record_is_printed_in_one_line():
    line = format_record(make_record())
    assert line.split() == "rep-2 12.5 % [11, 14] (n=40 texts, simctg)".split()
