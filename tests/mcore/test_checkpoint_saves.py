"""Saves through Megatron: whole before they have a name, asynchronous ones too."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from distributed_pool import DistributedPool
from pretraining import DATA, MODEL, TRAINING, pretrain

from megatron_emo.checkpoints import glance, inspect, read_tracker, write_tracker

TP2 = ["--tensor-model-parallel-size", "2"]
RUN = [*MODEL, *TRAINING, *DATA, *TP2, "--objective", "mle"]


def pretrain_noting_names(argv, folder):
    """In a rank: pretrain; note whether each checkpoint was whole when the tracker named it."""
    from megatron_emo.training import checkpoint_saves

    write = checkpoint_saves.write_durably

    def write_and_note(path, data):
        named = Path(path).parent / f"iter_{int(data):07d}"
        problems = glance(named).problems
        with open(f"{folder}/named", "a") as file:
            file.write(f"{int(data)} {problems}\n")
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saves, "write_durably", write_and_note)
        pretrain(argv)


def test_a_checkpoint_is_whole_when_the_tracker_names_it(run_distributed, tmp_path):
    flags = ["--async-save", "--async-strategy", "mcore", "--save-interval", "5"]
    saves = tmp_path / "saves"
    argv = [*RUN, *flags, "--save", str(saves), "--tensorboard-dir", str(tmp_path)]
    run_distributed(2)(pretrain_noting_names, argv=argv, folder=str(tmp_path))
    assert (tmp_path / "named").read_text() == "5 []\n10 []\n"
    assert read_tracker(saves) == 10
    for folder in saves.glob("iter_*"):
        assert not inspect(folder, exchange=lambda value: [value], rank=0).problems


def test_without_verification_nothing_is_hashed_and_the_tracker_is_as_safe(
    run_distributed, tmp_path
):
    flags = ["--no-verify-integrity", "--save-interval", "10"]
    saves = tmp_path / "saves"
    argv = [*RUN, *flags, "--save", str(saves), "--tensorboard-dir", str(tmp_path)]
    run_distributed(2)(pretrain_noting_names, argv=argv, folder=str(tmp_path))
    assert (tmp_path / "named").read_text() == "10 []\n"
    names = sorted(path.name for path in (saves / "iter_0000010").iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    run_distributed(2)(pretrain, argv=[*argv, "--load", str(saves)])


def fill_disk(argv):
    """In a rank: rank 1 cannot write a file as large as its shard, and both end with it."""
    import os
    import resource

    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_emo.launch.exit_codes import exit_code_of

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    outputs = os.dup(1), os.dup(2)
    if os.environ["RANK"] == "1":
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the log is larger already
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointException) as error:
            pretrain(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
    assert exit_code_of(error.value) == 74


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_leaves_the_last_checkpoint(tmp_path):
    saves = tmp_path / "saves"
    argv = [*RUN, "--save", str(saves), "--load", str(saves), "--save-interval", "5"]
    argv += ["--tensorboard-dir", str(tmp_path)]
    # Ranks of its own: the store of those that serve all tests is a larger file than the limit.
    with contextlib.closing(DistributedPool(2)) as pool:
        pool.run(pretrain, argv=argv)
        shutil.rmtree(saves / "iter_0000010")
        write_tracker(saves, 5)
        pool.run(fill_disk, argv=argv)
    assert read_tracker(saves) == 5 and not glance(saves / "iter_0000005").problems
    assert glance(saves / "iter_0000010").is_cut_off
