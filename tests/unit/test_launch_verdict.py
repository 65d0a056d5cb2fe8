"""All ranks decide alike: threads as ranks, on one store of this process."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist
from store_ranks import on_ranks

from megatron_emo.launch import verdict
from megatron_emo.launch.exit_codes import CheckpointError, ExitCode, VerdictError
from megatron_emo.launch.verdict import (
    agree,
    all_or_none,
    exchange_alone,
    format_ranks,
)


def test_an_exchange_returns_all_objects_by_rank():
    def body(rank, exchange):
        return [exchange({"rank": rank}), exchange(rank * [None])]

    expected = [[{"rank": r} for r in range(3)], [[], [None], [None, None]]]
    assert on_ranks(3, body) == [expected] * 3


def test_what_one_rank_finds_all_raise():
    def body(rank, exchange):
        agree(None, "data", exchange=exchange)
        agree("file.bin is torn" if rank == 2 else None, "data", exchange=exchange)

    errors = on_ranks(4, body)
    assert {str(error) for error in errors} == {"data: rank 2 of 4: file.bin is torn"}
    assert all(type(e) is VerdictError and e.exit_code == 78 and e.is_on_all_ranks for e in errors)


def test_the_error_may_be_another():
    def body(rank, exchange):
        agree("torn" if rank else None, "checkpoint", exchange=exchange, error=CheckpointError)

    assert {(type(e), e.exit_code) for e in on_ranks(2, body)} == {(CheckpointError, ExitCode.IO)}


def test_results_come_back_where_no_rank_raised():
    assert on_ranks(
        2, lambda rank, exchange: all_or_none(lambda: rank, "x", exchange=exchange)
    ) == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ValueError("--lr: found -1"), 78),
        (FileNotFoundError("--data-path x: no such file"), 78),
        (PermissionError("--save x"), 74),
        (CheckpointError("torn"), 74),
    ],
    ids=lambda value: type(value).__name__,
)
def test_findings_of_one_rank_end_all_with_its_code(raised, code):
    def check(rank):
        if rank == 1:
            raise raised

    errors = on_ranks(3, lambda rank, e: all_or_none(lambda: check(rank), "preflight", exchange=e))
    assert {str(error) for error in errors} == {f"preflight: rank 1 of 3: {raised}"}
    assert {(type(error), int(error.exit_code)) for error in errors} == {(VerdictError, code)}


def test_a_fault_of_ours_keeps_its_traceback_and_ends_the_others():
    def check(rank):
        return {}["lost"] if rank == 1 else None

    first, second = on_ranks(2, lambda rank, e: all_or_none(lambda: check(rank), "x", exchange=e))
    assert isinstance(second, KeyError)
    assert str(first) == "x: rank 1 of 2: KeyError: 'lost'" and first.exit_code == 70


def test_the_same_problem_everywhere_is_said_once_and_different_ones_by_rank():
    problems = ["a", None, "b", "b", "b"]
    text = verdict.format_problems("disk", problems)
    assert text == "disk: \n  rank 0 of 5: a\n  ranks 2-4 of 5: b"
    assert verdict.format_problems("disk", ["b", "b"]) == "b"
    assert verdict.format_problems("disk", ["b"]) == "b"


def test_ranks_in_words():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([5, 0, 1, 2, 7, 8]) == "ranks 0-2, 5, 7-8"


@pytest.mark.parametrize("absent", [[1], [0], [1, 3]], ids=str)
def test_ranks_that_do_not_answer_are_named_by_all_others(absent, monkeypatch):
    monkeypatch.setattr(verdict, "_GRACE_S", 0.2)
    start = time.monotonic()
    errors = on_ranks(4, lambda rank, exchange: exchange(rank), absent=absent, timeout_s=0.3)
    assert time.monotonic() - start < 5
    assert {str(error).partition(" of 4 did not answer within")[0] for error in errors} == {
        format_ranks(absent)
    }
    assert {error.exit_code for error in errors} == {78}


def test_a_second_start_does_not_read_the_keys_of_the_first():
    store = dist.HashStore()
    on_ranks(2, lambda rank, exchange: exchange("old"), store=store, prefix="job/0")
    assert on_ranks(2, lambda rank, e: e(rank), store=store, prefix="job/1") == [[0, 1], [0, 1]]


def test_a_store_does_not_grow_with_the_number_of_exchanges():
    store = dist.HashStore()

    def body(rank, exchange):
        for number in range(20):
            exchange(number)

    on_ranks(3, body, store=store)
    assert store.num_keys() <= 2, "the last result, and nothing of the others"


def test_a_store_that_never_answers_does_not_keep_the_caller(monkeypatch):
    forever = threading.Event()

    class CutOff(verdict.StoreExchange):
        def __init__(self):
            pass

        def roll_call(self, wait_s):
            forever.wait()

    monkeypatch.setattr(verdict, "_exchange", (None, CutOff()))
    assert verdict.roll_call(0.05) == "nor does the rendezvous store answer in 0.1 s"
    forever.set()


def test_a_roll_call_names_who_does_not_report(monkeypatch):
    words = on_ranks(3, lambda rank, exchange: exchange.roll_call(0.3), absent=[1])
    assert {text.partition(":")[0] for text in words} == {"rank 1 of 3 did not report within 0.3 s"}
    words = on_ranks(2, lambda rank, exchange: exchange.roll_call(20.0))
    assert {text.partition(":")[0] for text in words} == {"every rank reports the same"}


def test_one_process_needs_no_store(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert verdict.exchange_of_run() is exchange_alone
    with pytest.raises(VerdictError, match="^torn$"):
        agree("torn", "data", exchange=exchange_alone)


def test_the_environments_store_serves_before_a_process_group(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    launch |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    made = []
    for rank in ("0", "1"):
        for name, value in (launch | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(verdict, "_exchange", None)
        made.append(verdict.exchange_of_run(7.0))
        assert verdict.exchange_of_run() is made[-1] and made[-1].timeout_s == 7.0
    answers = []
    thread = threading.Thread(target=lambda: answers.append(made[1]("b")))
    thread.start()
    assert made[0]("a") == ["a", "b"]
    thread.join()
    assert answers == [["a", "b"]]


def test_no_store_at_the_address_is_said(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port
    del server
    launch = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(verdict, "_exchange", None)
    with pytest.raises(VerdictError, match=f"MASTER_PORT {port}: no store of rank 0 there within"):
        verdict.exchange_of_run(0.5)
