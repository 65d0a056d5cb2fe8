"""What keeps a run from starting: each mismatch is planted on one rank, and refused on both."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from pretraining import DATA, MODEL, TRAINING, VOCAB_SIZE

from megatron_emo.cost_embedding import write_cost_embedding
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir

BASE = [*MODEL, *TRAINING, *DATA, "--objective", "emo1"]
ONE_ITERATION = ("--train-iters", "1", "--eval-iters", "0")
MOST_SECONDS = 5.0


def another_argument(argv, monkeypatch):
    argv += ["--lr", "4e-3"]


def another_variable(argv, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")


def another_version(argv, monkeypatch):
    found = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "safetensors" else found(name)
    )


def another_table(argv, monkeypatch):
    """The same flag, another file: hosts with copies of their own."""
    os.chdir("host_1")


def a_flag_that_is_none(argv, monkeypatch):
    argv += ["--no-such-flag"]


def a_flag_megatron_asserts(argv, monkeypatch):
    argv += ["--lr", "-1"]


def a_tokenizer_of_another_size(argv, monkeypatch):
    argv[argv.index("--vocab-size") + 1] = "124"


PLANTED = {
    another_argument: r"--lr +0 +0\.005\n +1 +0\.004$",
    another_variable: r"variable NCCL_ALGO +0 +\(absent\)\n +1 +Ring$",
    another_version: r"version of safetensors +0 .*\n +1 +0\.1$",
    another_table: r"--emo-cost-embedding-id +0 +\w{64}",
    a_flag_that_is_none: "arguments: rank 1 of 2: unrecognized arguments: --no-such-flag",
    a_flag_megatron_asserts: r"arguments: rank 1 of 2: .*assert args.min_lr <= args.lr",
    a_tokenizer_of_another_size: "cost embedding: rank 1 of 2: .* it has 123 rows, .* has 124",
}


def check_refused(folder, plant, error, flags):
    """Start in a rank, with `plant` on rank 1, and expect that error."""
    from megatron_emo.launch.exit_codes import VerdictError
    from megatron_emo.training import compat, cpu, run

    argv = [*BASE, "--emo-cost-embedding", "table.safetensors", *flags]
    os.chdir(folder)
    cpu.enable([])
    import megatron.training  # noqa: F401  before the clock starts

    start, start_of_work = time.monotonic(), time.process_time()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if os.environ["RANK"] == "1" and plant is not None:
            globals()[plant](argv, monkeypatch)
        with pytest.raises(VerdictError) as caught:
            run.pretrain_gpt(argv)
    took, work = time.monotonic() - start, time.process_time() - start_of_work
    os.chdir(folder)
    compat.reset_megatron_state()
    message = str(caught.value)
    assert re.search(error, message), message
    assert caught.value.is_on_all_ranks and caught.value.exit_code == 78
    # On a machine of its own it takes its work's time; on a busy one the clock proves little, but
    # that no timeout was waited for.
    assert work < MOST_SECONDS and took < 20 * MOST_SECONDS, (work, took)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """A folder with a table, and one in it with another table of the same size and name."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "host_1").mkdir()
    for where, seed in ((folder, 1), (folder / "host_1", 2)):
        table = torch.randn(VOCAB_SIZE, 4, generator=torch.Generator().manual_seed(seed))
        write_cost_embedding(
            where / "table.safetensors", table, source="t", tokenizer_fingerprint=""
        )
    return folder


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_differs_on_one_rank_ends_both(run_distributed, two_hosts, plant):
    run_distributed(2)(
        check_refused,
        folder=str(two_hosts),
        plant=plant.__name__,
        error=f"(?m){PLANTED[plant]}",
        flags=[],
    )


def test_a_torn_data_file_is_found_on_one_rank_and_raised_on_both(
    run_distributed, two_hosts, short_documents, tmp_path
):
    prefix = str(tmp_path / "documents")
    for suffix in (".bin", ".idx"):
        shutil.copy(short_documents + suffix, prefix + suffix)
    with open(prefix + ".bin", "r+b") as file:
        file.truncate(100)
    flags = ["--data-path", prefix]
    argv = [word for word in BASE if word != "--mock-data"]
    assert len(argv) == len(BASE) - 1
    run_distributed(2)(
        check_data_refused,
        argv=[*argv, *flags],
        error="preflight: rank 0 of 2: .*documents.bin: 100 bytes, expected",
    )


def check_data_refused(argv, error):
    from megatron_emo.training import compat, run

    with pytest.raises(ValueError, match=error):
        run.pretrain_gpt(argv)
    compat.reset_megatron_state()


def test_another_vocabulary_than_the_checkpoints_is_refused(run_pretraining, initial_checkpoint):
    message = "--vocab-size: the tokenizer has 120 tokens, the checkpoint .* was trained with 123"
    flags = ("--load", str(initial_checkpoint), "--vocab-size", "120")
    run_pretraining(2, *flags, cost="output-layer", error=message)
    run_pretraining(1, *flags, "--finetune", cost="output-layer", error=message)


def test_a_load_folder_that_is_not_there_is_refused(run_pretraining, tmp_path):
    message = "--load .*absent: found no latest_checkpointed_iteration.txt there"
    run_pretraining(2, "--load", str(tmp_path / "absent"), error=message)
    itself = ("--load", str(tmp_path / "absent"), "--save", str(tmp_path / "absent"))
    only = ("--exit-on-missing-checkpoint", "--save-interval", "1")
    run_pretraining(2, *itself, *only, error=message)


def test_no_room_for_the_next_checkpoint_is_refused(run_pretraining, tmp_path):
    flags = ("--save", str(tmp_path / "run"), "--save-interval", "5")
    message = r"--save .*/run: .* free, expected .* checkpoints of .* KiB \(estimated\)"
    run_pretraining(2, *flags, "--emo-disk-checkpoints", "1e12", error=message)


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """Folders of two Hugging Face tokenizers of one size, with a token that differs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folders = []
    for name in ("first", "second"):
        words = {f"w{i}": i for i in range(50)} | {f"{name}": 50, "<eos>": 51}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        folder = tmp_path_factory.mktemp(name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", unk_token="w0"
        ).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def test_a_run_that_resumes_itself_starts_and_then_keeps_its_tokenizer(
    run_pretraining, two_tokenizers, tmp_path
):
    folder = str(tmp_path / "run")
    base = [word for word in [*MODEL, *TRAINING, *DATA] if word != "NullTokenizer"]
    del base[base.index("--tokenizer-type") : base.index("--vocab-size") + 2]
    base += ["--tokenizer-type", "HuggingFaceTokenizer", *ONE_ITERATION]
    base += ["--save", folder, "--load", folder, "--save-interval", "1"]
    first, second = two_tokenizers
    started = run_pretraining(2, "--tokenizer-model", first, base=base, cost="output-layer")
    assert sorted(started["lm loss"]) == [1]
    saved = read_arguments(resolve_checkpoint_dir(folder))
    assert saved.emo_vocab_size == 52 and len(saved.emo_tokenizer_id) == 64
    message = (
        f"--tokenizer-model: this tokenizer has fingerprint .*{saved.emo_tokenizer_id}; resume with"
    )
    run_pretraining(2, "--tokenizer-model", second, base=base, cost="output-layer", error=message)


def test_the_estimate_of_a_checkpoint_is_near_its_size(initial_checkpoint):
    from megatron_emo.launch import disk

    size = disk.newest_checkpoint_bytes(Path(initial_checkpoint))
    saved = read_arguments(resolve_checkpoint_dir(initial_checkpoint))
    # So small a model is half metadata.
    assert 0.3 * size < disk.estimate_checkpoint_bytes(saved) < size


def check_doctor(argv, code, expected):
    """tools/doctor.py with a run's flags, on every rank."""
    import contextlib
    import io

    from megatron_emo.launch.doctor import diagnose
    from megatron_emo.training import compat, run

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = diagnose(60.0, lambda: run.check_only(list(argv), 60.0))
    compat.reset_megatron_state()
    assert found == code, out.getvalue()
    if os.environ["RANK"] == "0":
        assert re.search(expected, out.getvalue()), out.getvalue()


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        ([], 0, r"(?s)2 ranks agree on \d{3} .*world \(2 ranks\): .*slowest rank .*verdict: sound"),
        (["--lr", "-1"], 78, "verdict: would not start\nerror: .*assert args.min_lr <= args.lr"),
    ],
    ids=["sound", "refused"],
)
def test_the_doctor_looks_at_a_runs_flags_without_starting_it(
    run_distributed, flags, code, expected
):
    argv = [*BASE, "--tensor-model-parallel-size", "2", *flags]
    run_distributed(2)(check_doctor, argv=argv, code=code, expected=expected)
