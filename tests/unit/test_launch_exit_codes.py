"""Which error ends a run with which code."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_emo.launch import exit_codes
from megatron_emo.launch.exit_codes import (
    CheckpointError,
    ConfigError,
    DiskError,
    NonFiniteError,
    Preempted,
    VerdictError,
    exit_code_of,
    run_and_exit,
)

TABLE = [
    (None, 0),
    (SystemExit(0), 0),
    (SystemExit(16), 16),
    (SystemExit(17), 17),
    (NonFiniteError("loss is nan"), 65),
    (RuntimeError("no one knows"), 70),
    (AssertionError(), 70),
    (SystemExit(None), 70),
    (SystemExit("words"), 70),
    (ConnectionResetError("peer"), 70),
    (TimeoutError("peer"), 70),
    (OSError(28, "No space left on device"), 74),
    (CheckpointException("reading", {0: (ValueError("torn"), None)}), 74),
    (CheckpointError("torn"), 74),
    (DiskError("full"), 74),
    (Preempted("SIGTERM"), 75),
    (ConfigError("--lr"), 78),
    (VerdictError("--lr"), 78),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), TABLE, ids=lambda value: repr(value)[:40])
def test_every_error_has_its_code(error, code, capsys):
    told = []

    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_and_exit(main, on_fault=told.append, on_end=told.append)
    assert caught.value.code == code
    assert told == ([error, code] if code else [0])
    assert error is None or code == exit_code_of(error)


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """Return ended(error, rank) -> stderr and what torchrun would read."""

    def run(error, rank=0, world_size=2):
        path = tmp_path / "error.json"
        path.unlink(missing_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

        def main():
            raise error

        with pytest.raises(SystemExit):
            run_and_exit(main)
        return capsys.readouterr().err, json.loads(path.read_text())["message"]

    return run


def test_an_error_of_ours_is_one_line_with_its_rank(ended):
    stderr, told = ended(CheckpointError("iter_0000002/x: torn"), rank=1)
    assert stderr == "error: rank 1: iter_0000002/x: torn\n"
    assert told["message"] == "CheckpointError: iter_0000002/x: torn"
    assert told["extraInfo"]["py_callstack"] == "iter_0000002/x: torn"


def test_what_all_ranks_raise_rank_0_says(ended):
    error = VerdictError("--lr")
    error.is_on_all_ranks = True
    assert ended(error, rank=0)[0] == "error: --lr\n"
    stderr, told = ended(error, rank=1)
    assert stderr == "" and told["message"] == "VerdictError: --lr"


def test_an_error_nobody_foresaw_keeps_its_traceback(ended):
    stderr, told = ended(KeyError("lost"))
    assert "Traceback" in stderr and "KeyError: 'lost'" in stderr
    assert "Traceback" in told["extraInfo"]["py_callstack"]


@pytest.mark.parametrize(
    "secondary",
    [
        RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4321"),
        torch.distributed.DistNetworkError("recv failed"),
    ],
    ids=["gloo", "store"],
)
def test_torchrun_blames_the_rank_that_failed_before_the_one_that_noticed(ended, secondary):
    noticed = int(ended(secondary, rank=0)[1]["extraInfo"]["timestamp"])
    failed = int(ended(ValueError("first"), rank=1)[1]["extraInfo"]["timestamp"])
    assert failed < noticed


def test_who_lost_a_peer_says_which(monkeypatch, capsys, tmp_path):
    path = tmp_path / "error.json"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

    def main():
        raise RuntimeError("Timed out waiting 15000ms for recv operation to complete")

    with pytest.raises(SystemExit) as caught:
        run_and_exit(main, find_lost=lambda: "rank 1 of 2 did not report")
    assert caught.value.code == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: rank 0: lost a peer; rank 1 of 2 did not report"
    told = json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"]
    assert told.splitlines()[-1] == "rank 1 of 2 did not report"


def test_a_failing_log_does_not_hide_what_ended_the_run(capsys):
    def main():
        raise ConfigError("--lr")

    def fail(_):
        raise OSError("disk full")

    with pytest.raises(SystemExit) as caught:
        run_and_exit(main, on_fault=fail, on_end=fail)
    assert caught.value.code == 78 and "error: --lr" in capsys.readouterr().err


def test_with_a_process_group_alive_the_process_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(exit_codes.os, "_exit", left.append)

    def main():
        raise ConfigError("--lr")

    with pytest.raises(SystemExit):
        run_and_exit(main)
    assert left == [78]
