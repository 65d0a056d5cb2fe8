"""Files of rows: what is gone on with, what is refused and why, after a cut at any moment."""

from __future__ import annotations

import json
import os

import pytest

from megatron_emo.evaluation.rows import RowFile, read_rows

RECIPE = {"model": "a", "shots": 2, "lengths": (3, 4), "data": {"train": "x"}}
ROWS = [{"id": index, "text": f"naïve 中\u2028{index}"} for index in range(5)]


def begin(path, recipe=RECIPE, group=2, **how) -> RowFile:
    return RowFile(path, recipe, total=5, group=group, **how)


def write(path, recipe=RECIPE, rows=ROWS, **how) -> None:
    file = begin(path, recipe, **how)
    file.append(rows)
    file.finish()


def texts(path) -> list[str]:
    return [row["text"] for row in read_rows(path)]


def test_a_file_holds_rows_and_its_note_the_recipe(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    write(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    note = json.loads((tmp_path / "new" / "a.jsonl.recipe.json").read_text())
    assert [json.loads(line) for line in lines[:-1]] == [
        {**row, "settings": note["settings"]} for row in ROWS
    ]
    assert note["recipe"] == json.loads(json.dumps(RECIPE))
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("group, kept", [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 2, 2, 4, 5])])
def test_whole_groups_are_taken_over(tmp_path, group, kept):
    path = tmp_path / "a.jsonl"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for number, found in enumerate(kept):
        path.write_bytes(b"".join(lines[:number]) + b"".join(lines[number:])[:-9][:20])
        file = begin(path, group=group, resume=True)
        assert [row["id"] for row in file.found] == list(range(found))
        file.append(ROWS[found:])
        file.finish()
        assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shots": 3}, "has shots 2, expected 3;"),
        ({"data": {"train": "y"}}, "has data {'train': 'x'}, expected {'train': 'y'};"),
        ({"extra": True, "model": "b"}, "has extra None, expected True; model 'a', expected 'b';"),
        ({"lengths": [3, 5]}, r"has lengths \[3, 4\], expected \[3, 5\];"),
    ],
)
def test_what_differs_is_named(tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    write(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"--answers .*a.jsonl:1: {message} --overwrite starts"):
        begin(path, RECIPE | change, resume=True, flag="--answers")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [os.remove, lambda note: open(note, "w").close()])
def test_without_its_note_a_file_is_known_by_its_hash(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    write(path)
    damage(tmp_path / "a.jsonl.recipe.json")
    with pytest.raises(ValueError, match="expected settings [0-9a-f]{16}, got [0-9a-f]{16}: ano"):
        begin(path, RECIPE | {"shots": 3}, resume=True)
    assert begin(path, resume=True).found == read_rows(path)


def test_rows_of_a_stranger_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 0}\n')
    with pytest.raises(ValueError, match="a.jsonl:1: expected settings [0-9a-f]{16}, got None: "):
        begin(path, resume=True)
    write(path, overwrite=True)
    mixed = path.read_text(encoding="utf-8") + '{"id": 5}\n'
    path.write_text(mixed, encoding="utf-8")
    with pytest.raises(ValueError, match="a.jsonl:6: expected settings"):
        begin(path, resume=True)
    assert path.read_text(encoding="utf-8") == mixed


def test_a_replacement_that_was_cut_off_is_gone_on_with(tmp_path):
    path, new = tmp_path / "a.jsonl", RECIPE | {"shots": 3}
    write(path)
    old = path.read_bytes()
    begin(path, new, overwrite=True).append(ROWS[:2])
    assert path.read_bytes() == old
    with pytest.raises(ValueError, match="a.jsonl.part:1: has shots 3, expected 2; --overwrite"):
        begin(path, resume=True)
    file = begin(path, new, resume=True)
    assert len(file.found) == 2
    file.append(ROWS[2:])
    file.finish()
    assert texts(path) == [row["text"] for row in ROWS] and path.read_bytes() != old


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.part"])
def test_what_is_there_is_not_lost_by_chance(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"--output .*{name}: exists; --resume goes on, --ov"):
        begin(tmp_path / "a.jsonl")
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_rows_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in (
        ("{}\nno json\n", "a.jsonl:2: expected JSON"),
        ("[]\n", "a.jsonl:1: expected an object, got list"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_rows(path)
    path.write_text('{"a": 1}\n{"a": ')
    assert read_rows(path) == [{"a": 1}]
    with pytest.raises(ValueError, match="--batch-size: expected at least 1, got 0"):
        begin(tmp_path / "b.jsonl", group=0)
