"""Files that are there whole or not at all, and what they hold."""

from __future__ import annotations

import csv
import json
import os

import pytest

from megatron_emo import whole_files
from megatron_emo.whole_files import write_csv, write_json, write_json_lines, write_whole


def test_what_is_written_comes_back(tmp_path):
    folder = tmp_path / "a" / "b"
    write_whole(folder / "bytes", b"\x00\xff")
    write_whole(folder / "text", "é\r\n")
    write_json(folder / "one.json", {"a": [1, 2.5, None, "é"]})
    write_json_lines(folder / "rows.jsonl", ({"n": n} for n in range(2)))
    write_csv(folder / "t.csv", ["a", "b"], [{"a": 1.1, "b": None, "c": 2}, {"b": "x, y"}])
    assert (folder / "bytes").read_bytes() == b"\x00\xff"
    assert (folder / "text").read_bytes() == "é\r\n".encode()
    assert json.loads((folder / "one.json").read_text()) == {"a": [1, 2.5, None, "é"]}
    assert [json.loads(x) for x in (folder / "rows.jsonl").read_text().splitlines()] == [
        {"n": 0},
        {"n": 1},
    ]
    with (folder / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1.1", ""], ["", "x, y"]]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moment", ["write", "replace", "number"])
def test_a_write_that_fails_leaves_the_former_content_and_no_part(tmp_path, monkeypatch, moment):
    path = tmp_path / "one.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(whole_files.Path, "write_bytes", fail)
    elif moment == "replace":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, ValueError)):
        write_json(path, {"a": float("nan") if moment == "number" else 2})
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["one.json"]
