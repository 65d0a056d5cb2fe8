"""Tokens in the environment reach no log, checkpoint, event file or export."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pretraining import DATA, MODEL, TRAINING

SECRETS = {
    name: f"canary-{number}-5f1c2e"
    for number, name in enumerate(
        "WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN "
        "AWS_ACCESS_KEY_ID GITHUB_TOKEN OPENAI_API_KEY DB_PASSWORD SLURM_JWT NGC_API_KEY "
        "GOOGLE_APPLICATION_CREDENTIALS NCCL_SECRET_TOKEN EMO_API_KEY CUDA_PRIVATE_KEY".split()
    )
}
FLAGS = [
    *MODEL,
    *TRAINING,
    *("--train-iters", "2", "--eval-interval", "2", "--save-interval", "2", "--log-progress"),
    *("--objective", "emo1", "--emo-cost-embedding", "output-layer"),
    *DATA,
]


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def output_into(path: Path) -> Iterator[None]:
    """Send this process's output, that of its children as well, into a file."""
    kept = os.dup(1), os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def check_run(folder: str) -> None:
    from pretraining import pretrain

    from megatron_emo.conversion.export_hf import ExportOptions, export_hf

    out = Path(folder)
    places = ["--save", f"{out}/run", "--tensorboard-dir", f"{out}/tensorboard"]
    (out / "tensorboard").mkdir()
    with environment(SECRETS), output_into(out / "log.txt"):
        pretrain([*FLAGS, *places])
        print("environment of a child:", flush=True)
        export_hf(out / "run", out / "hf", ExportOptions(vocab_size=123, verify=False))
    with environment(SECRETS), output_into(out / "error.txt"):
        pretrain([*FLAGS, *places, "--emo-cost-embedding", "absent"], error="absent")


def files_with(folder: Path, text: str) -> list[str]:
    found = [
        path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()
    ]
    return sorted(str(path.relative_to(folder)) for path in found)


def test_no_secret_is_in_what_a_run_leaves(run_distributed, tmp_path):
    run_distributed(1)(check_run, folder=str(tmp_path))
    assert (tmp_path / "hf" / "config.json").is_file() and list(
        tmp_path.glob("run/iter_*/*.distcp")
    )
    assert files_with(tmp_path / "tensorboard", "lm loss")
    # The arguments that a checkpoint holds are found by such a search.
    assert files_with(tmp_path / "run", "emo_cost_embedding")
    for name, value in SECRETS.items():
        assert files_with(tmp_path, value) == [], name


def test_the_search_finds_what_is_there(tmp_path):
    import torch

    value = next(iter(SECRETS.values()))
    torch.save([{"args": value}], tmp_path / "a.distcp")
    (tmp_path / "b").write_text(f"x{value}x")
    assert files_with(tmp_path, value) == ["a.distcp", "b"]
