"""The codes that real processes end with, and what they say last.

Runs of pretrain_gpt_emo's main are forked from one process that has imported Megatron.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_runs import forked_runs
from pretraining import DATA, MODEL, TRAINING

ROOT = Path(__file__).resolve().parents[2]
RUN = [*MODEL, *TRAINING, *DATA, "--train-iters", "1", "--eval-iters", "0"]
RUN += ["--objective", "emo2", "--emo-weight-max", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with forked_runs(tmp_path_factory.mktemp("runs")) as started:
        yield started


def lines_of_error(outcome, rank=0):
    return [line for line in outcome.log(rank).splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def saved(runs, tmp_path_factory):
    """The folder of a run that ended well."""
    folder = tmp_path_factory.mktemp("saved")
    outcome = runs.run([*RUN, "--save", str(folder), "--save-interval", "1"], world_size=1)
    assert outcome.codes == [0], outcome.log()
    assert outcome.losses and not lines_of_error(outcome)
    return folder


def test_a_run_that_ends_well_and_help_end_with_0(runs, saved):
    outcome = runs.run(["--help"], world_size=1)
    assert outcome.codes == [0] and "--emo-disk-checkpoints" in outcome.log()


SAVE = ("--save-interval", "1", "--save")
REFUSED = {
    "unknown flag": (["--no-such-flag"], 78, "unrecognized arguments: --no-such-flag"),
    "no number": (["--lr", "fast"], 78, "argument --lr: invalid float value: 'fast'"),
    "assertion": (["--lr", "-1"], 78, "assert args.min_lr <= args.lr"),
    "no load": (["--load", "absent"], 78, "--load absent: found no latest_checkpointed_iteration"),
    "no table": (["--emo-cost-embedding", "absent"], 78, "--emo-cost-embedding: .*absent"),
    "no tokenizer": (
        ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "absent.model"],
        78,
        "absent.model",
    ),
    "no data": (["--data-path", "absent"], 78, "--data-path absent: absent.idx does not exist"),
    "no folder": ([*SAVE, "/dev/null/run"], 74, "--save /dev/null/run: cannot be written"),
    "no room": ([*SAVE, "run", "--emo-disk-checkpoints", "1e12"], 74, "--save run: .* free"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_refuses_is_one_line_and_a_code(runs, case):
    flags, code, message = REFUSED[case]
    base = [word for word in RUN if word != "--mock-data"] if case == "no data" else RUN
    outcome = runs.run([*base, *flags], world_size=1)
    assert outcome.codes == [code], outcome.log()[-2000:]
    (line,) = lines_of_error(outcome)
    assert re.search(message, line), line
    assert "Traceback" not in outcome.log()


def test_an_unreadable_tracker_ends_with_74(runs, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("seven")
    outcome = runs.run([*RUN, "--load", str(tmp_path)], world_size=1)
    assert outcome.codes == [74], outcome.log()[-2000:]
    assert "found 'seven'" in lines_of_error(outcome)[0]


def leave_without_a_word(rank):
    """What megatron/training/checkpointing.py does where it cannot read."""
    import megatron.training.training as training_loop

    def load_checkpoint(*args, **kwargs):
        sys.exit()

    training_loop.load_checkpoint = load_checkpoint


def fail_on_rank_1(rank):
    from megatron_emo.training import steps

    def forward_step(*args, **kwargs):
        raise KeyError("lost")

    if rank == 1:
        steps.forward_step = forward_step


def learn_faster_on_rank_1(rank):
    if rank == 1:
        sys.argv += ["--lr", "4e-3"]


def test_a_bare_exit_of_megatron_ends_with_74_and_not_with_0(runs, saved):
    setup = (Path(__file__), leave_without_a_word.__name__)
    outcome = runs.run([*RUN, "--load", str(saved), "--train-iters", "2"], 1, setup=setup)
    assert outcome.codes == [74], outcome.log()[-2000:]
    assert "Megatron could not read the checkpoint" in lines_of_error(outcome)[0]


def test_an_error_nobody_foresaw_ends_with_70_and_its_peer_names_the_rank(runs):
    outcome = runs.run(RUN, 2, setup=(Path(__file__), fail_on_rank_1.__name__))
    assert outcome.codes[1] == 70
    assert "KeyError: 'lost'" in outcome.log(1) and "Traceback" in outcome.log(1)
    # A peer that waited for it is killed after the moment that a launcher gives it, or says so.
    assert outcome.codes[0] in (70, -9), outcome.log()[-2000:]


def test_ranks_that_do_not_agree_end_with_78_and_rank_0_prints_the_table(runs):
    outcome = runs.run(RUN, 2, setup=(Path(__file__), learn_faster_on_rank_1.__name__))
    assert outcome.codes == [78, 78], outcome.log()[-2000:]
    assert lines_of_error(outcome, 0) and not lines_of_error(outcome, 1)
    table = outcome.log(0).partition("error: ranks do not agree")[2]
    assert table.splitlines()[2].split() == ["--lr", "0", "0.005"]
    assert table.splitlines()[3].split() == ["1", "0.004"]


SCRIPT = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
from megatron_emo.launch.exit_codes import ConfigError, run_and_exit
from megatron_emo.launch.verdict import exchange_of_run, roll_call

def main():
    exchange_of_run(60.0)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 1:
        FAULT
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()

if __name__ == "__main__":
    run_and_exit(main, find_lost=roll_call)
"""
TIMEOUT_S = 4
FAULTS = {
    "raises": ("raise ValueError('no such token')", "ValueError: no such token"),
    "refuses": ("raise ConfigError('--lr')", "--lr"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    "leaves": ("os._exit(0)", "rank 1 of 2 did not report within 5 s"),
    "hangs": ("signal.pause()", "rank 1 of 2 did not report within 5 s"),
}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=[] if name == "raises" else [pytest.mark.slow]) for name in FAULTS],
)
def test_torchruns_last_lines_name_the_rank_and_its_error(tmp_path, fault):
    statement, last = FAULTS[fault]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("FAULT", statement).replace("TIMEOUT", str(TIMEOUT_S)))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=240,
    )
    print(f"{fault}: {time.monotonic() - start:.1f} s with start and imports")
    cause = done.stderr.rpartition("Root Cause")[2]
    assert last in cause, done.stderr[-3000:]
    is_seen_by_peer = fault in ("leaves", "hangs")
    assert f"rank      : {0 if is_seen_by_peer else 1} " in cause, cause
    codes = {"refuses": 78, "is killed": -9}
    assert f"exitcode  : {codes.get(fault, 70)} " in cause, cause
