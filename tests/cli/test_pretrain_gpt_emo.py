"""The entry point as a user calls it: --help, and a plain process without torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def call(*flags: str) -> subprocess.CompletedProcess:
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launch}
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt_emo.py"), *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_help_shows_megatrons_flags_and_ours():
    result = call("--help")
    assert result.returncode == 0, result.stderr
    for flag in ("--objective", "--emo-cost-embedding", "--emo-ramp-iters", "--num-layers"):
        assert flag in result.stdout, flag


def test_one_process_trains_without_a_launcher(tmp_path):
    flags = f"""
        --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8
        --max-position-embeddings 8 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3
        --train-iters 2 --eval-iters 0 --eval-interval 2 --log-interval 1 --mock-data --split 1,0,0
        --tokenizer-type NullTokenizer --vocab-size 50 --num-workers 0
        --objective emo2 --emo-weight-max 2 --save {tmp_path} --save-interval 2
    """.split()
    result = call(*flags)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
