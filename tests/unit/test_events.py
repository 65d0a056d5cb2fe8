"""The event log: what is written can be read, whatever happens to the file, and holds no secret."""

from __future__ import annotations

import json
import math
import os
import threading
from datetime import UTC, datetime, timedelta

import pytest

from megatron_emo.launch.events import (
    FIELDS,
    EventLog,
    event_file,
    read_events,
    read_last_events,
    time_of,
)
from megatron_emo.launch.redaction import redact_command

STEP = {
    "train_iters": 10,
    "losses": {"lm loss": 2.5},
    "learning_rate": 1e-3,
    "grad_norm": None,
    "loss_scale": 1.0,
    "step_ms": 12.5,
    "work_ms": None,
    "tokens_per_s": 1e4,
    "consumed_samples": 8,
    "skipped": 0,
    "nan": 0,
}


@pytest.fixture
def log(tmp_path):
    opened = EventLog(tmp_path / "events", rank=3)
    yield opened
    opened.close()


def test_a_record_comes_back_typed_and_timed(log, tmp_path):
    before = datetime.now(UTC)
    log.write("step", 4, **STEP)
    assert log.path == tmp_path / "events" / "rank_00003.jsonl"
    line = log.path.read_text()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    (record,) = read_events(log.path)
    assert record == json.loads(line)
    assert {name: record[name] for name in STEP} == STEP
    assert (record["kind"], record["rank"], record["iteration"]) == ("step", 3, 4)
    assert record["time"].endswith("Z")
    assert timedelta(seconds=-0.001) <= time_of(record) - before < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("stop", {}, "unknown kind 'stop', expected one of start, step"),
        ("end", {}, "exit_code is missing"),
        ("end", {"exit_code": "0"}, "exit_code is str, expected int"),
        ("end", {"exit_code": True}, "exit_code is bool, expected int"),
        ("end", {"exit_code": 1 << 63}, "expected 63 bits"),
        ("end", {"exit_code": 0, "why": "done"}, r"unknown fields \['why'\]"),
    ],
)
def test_another_kind_field_or_type_is_a_programming_error(log, kind, fields, message):
    with pytest.raises(ValueError, match=f"event {kind}: .*{message}"):
        log.write(kind, 0, **fields)
    assert log.path.read_text() == ""


def test_numbers_that_json_lacks_are_strings_that_float_reads(log):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300}
    log.write("step", 1, **(STEP | {"losses": values, "grad_norm": math.nan}))
    (record,) = read_events(log.path)
    assert record["losses"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1e300}
    assert all(
        float(record["losses"][name]) == value or value != value for name, value in values.items()
    )
    assert "NaN" not in log.path.read_text().replace('"NaN"', "")


def test_restarts_append_and_a_torn_line_costs_itself_alone(tmp_path):
    folder = tmp_path / "events"
    for code in (1, 0):
        log = EventLog(folder, rank=0)
        log.write("end", 5, exit_code=code)
        log.close()
    path = event_file(folder, 0)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        expected = [1, 0] if cut == len(whole) - 1 else [1]
        assert [record["exit_code"] for record in read_events(path)] == expected
        log = EventLog(folder, rank=0)
        log.write("end", 5, exit_code=7)
        log.close()
        assert [record["exit_code"] for record in read_events(path)] == [*expected, 7]


def test_what_is_no_record_is_passed_over(log):
    log.write("end", 1, exit_code=0)
    good = log.path.read_bytes()
    timeless = b'{"time": "0001-01-01T00:00:00", ' + good.split(b", ", 1)[1].strip()
    bad = [
        timeless,
        b"",
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"kind": 3}',
        good.replace(b'"end"', b'"newer"').strip(),
        good.replace(b"0}", b"null}").strip(),
        good.replace(b'"time": "2', b'"time": "x2').strip(),
    ]
    for line in bad:
        log.path.write_bytes(good + line + b"\n" + good)
        assert len(list(read_events(log.path))) == 2, line


@pytest.mark.parametrize("num_lines", [0, 1, 3, 30])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_end_of_a_file_is_read_by_whole_lines(log, num_lines, more):
    for iteration in range(30):
        log.write("end", iteration, exit_code=0)
    lines = log.path.read_bytes().splitlines(keepends=True)
    num_bytes = max(1, sum(map(len, lines[30 - num_lines :])) + more)
    num_whole = max(0, num_lines - (more < 0))
    found = [record["iteration"] for record in read_last_events(log.path, num_bytes)]
    assert found == list(range(30 - num_whole, 30))


def test_threads_do_not_mix_their_lines(log):
    def write(offset):
        for number in range(200):
            log.write("end", offset + number, exit_code=number)

    threads = [threading.Thread(target=write, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(record["iteration"] for record in read_events(log.path))
    assert found == sorted(1000 * i + n for i in range(4) for n in range(200))


def test_a_full_disk_is_told_once_and_the_run_goes_on(log, capsys):
    log.write("end", 1, exit_code=0)
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._file)
    for _ in range(3):
        log.write("end", 2, exit_code=0)
    assert capsys.readouterr().err.count("warning: event log") == 1


def test_a_short_write_does_not_spoil_the_next_line(log, monkeypatch, capsys):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]))
    log.write("end", 1, exit_code=0)
    monkeypatch.setattr(os, "write", write)
    log.write("end", 2, exit_code=0)
    assert [record["iteration"] for record in read_events(log.path)] == [2]
    assert "no space for the whole line" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    log = EventLog(tmp_path / "file" / "events", rank=0)
    log.write("end", 1, exit_code=0)
    log.close()
    assert capsys.readouterr().err.count("the run goes on") == 1


def test_secrets_of_the_environment_are_struck_out_wherever_they_came_in(tmp_path, monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_canary1234",
        "WANDB_API_KEY": 'quo"te\\canary',
        "AWS_SECRET_ACCESS_KEY": "canary/+=aws",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one
    log = EventLog(tmp_path, rank=0)
    text = "1 error at https://user:hf_canary1234@host " + " ".join(secrets.values())
    log.write("fault", 1, error="OSError", message=text, traceback=text, exit_code=74)
    log.close()
    assert "canary" not in log.path.read_text()
    (record,) = read_events(log.path)
    assert record["message"].startswith("1 error at https://user:<redacted>@host <redacted>")


def test_values_of_secret_flags_are_struck_out():
    argv = "run.py --wandb-api-key k1 --hf-token=t1 --tokenizer-model m --my-passwd p1 p2 --lr 1e-3"
    assert redact_command(argv.split()) == (
        "run.py --wandb-api-key <redacted> --hf-token=<redacted> --tokenizer-model m "
        "--my-passwd <redacted> <redacted> --lr 1e-3"
    ).split(" ")


def test_every_kind_of_the_schema_can_be_written(log):
    samples = {str: "x", int: 1, float: 0.5, bool: True, list: [1], dict: {"a": 1.0}}
    for kind, fields in FIELDS.items():
        values = {
            name: next(samples[t] for t in types if t in samples) for name, types in fields.items()
        }
        log.write(kind, 1, **values)
    assert [record["kind"] for record in read_events(log.path)] == list(FIELDS)
