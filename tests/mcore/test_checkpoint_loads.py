"""Loads through Megatron: what is not whole, or of another model, is refused by every rank; what
--fallback takes goes on as the run did."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from distributed_pool import pool_of
from pretraining import DATA, MODEL, TRAINING, pretrain, read_scalars

from megatron_emo.checkpoints import MANIFEST, glance, read_tracker, sign, write_tracker
from megatron_emo.torch_dist import TRACKER, TensorReader

TP2 = ["--tensor-model-parallel-size", "2"]
RUN = [*MODEL, *TRAINING, *DATA, *TP2, "--objective", "mle"]
SAVED_LAST = 10


@pytest.fixture(scope="module")
def original(_pools, tmp_path_factory):
    """A run's folder with checkpoints of iterations 5 and 10, and the losses of all 10."""
    folder = tmp_path_factory.mktemp("original")
    flags = ["--save", str(folder / "run"), "--save-interval", "5"]
    argv = [*RUN, *flags, "--tensorboard-dir", str(folder)]
    pool_of(_pools, 2).run(pretrain, argv=argv)
    return folder / "run", read_scalars(folder)["lm loss"]


@pytest.fixture
def saved(original, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(original[0], tmp_path / "run"))


def look(folder, message, falls_back, latest):
    """In a rank: what a start does with `folder` before it builds a model."""
    from megatron_emo.launch.exit_codes import CheckpointError
    from megatron_emo.training import checkpoint_loads

    args = argparse.Namespace(
        load=folder,
        pretrained_checkpoint=None,
        ckpt_step=None,
        fallback=falls_back,
        verify_integrity=True,
        enable_msc=False,
        ckpt_format="torch_dist",
        ckpt_convert_format=None,
        rank=int(os.environ["RANK"]),
    )
    if message is None:
        checkpoint_loads.look_ahead(args)
        assert args.ckpt_step == latest
        return
    with pytest.raises(CheckpointError) as error:
        checkpoint_loads.look_ahead(args)
    assert message in str(error.value), error.value
    assert error.value.exit_code == 74 and error.value.is_on_all_ranks


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def mix(path):
    shutil.copy(path.parent.parent / "iter_0000005" / path.name, path)


def link(path):
    path.unlink()
    path.symlink_to(path.parent.parent / "iter_0000005" / path.name)


DAMAGE = {
    "bit": (flip_a_bit, "__1_0.distcp: altered"),
    "cut": (lambda path: os.truncate(path, 100), "__1_0.distcp: 100 bytes, saved were"),
    "gone": (Path.unlink, "__1_0.distcp: missing"),
    "renamed": (lambda path: path.rename(path.with_name("x.distcp")), "__1_0.distcp: missing; x"),
    "mixed": (mix, "__1_0.distcp: "),
    "linked": (link, "__1_0.distcp: a symbolic link"),
    "unlisted": (
        lambda path: path.with_name("common.pt").write_bytes(b"."),
        f"common.pt: not in {MANIFEST}",
    ),
    "no manifest": (lambda path: path.with_name(MANIFEST).unlink(), f"{MANIFEST}: missing"),
    "no folder": (lambda path: shutil.rmtree(path.parent), "iter_0000010: no such folder"),
    "tracker": (lambda path: (path.parent.parent / TRACKER).write_text(""), f"{TRACKER}: expected"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_both_ranks_refuse_it_by_name_and_both_fall_back(run_distributed, saved, kind):
    damage, message = DAMAGE[kind]
    damage(saved / "iter_0000010" / "__1_0.distcp")
    run = run_distributed(2)
    run(look, folder=str(saved), message=message, falls_back=False, latest=None)
    latest = SAVED_LAST if kind == "tracker" else 5
    run(look, folder=str(saved), message=None, falls_back=True, latest=latest)


def refuse(argv, message):
    """In a rank: the run ends before its first step, with CheckpointError."""
    from megatron_emo.launch.exit_codes import CheckpointError
    from megatron_emo.training import compat, run

    os.chdir(Path(argv[argv.index("--tensorboard-dir") + 1]))
    try:
        with pytest.raises(CheckpointError, match=message):
            run.pretrain_gpt(argv)
    finally:
        compat.reset_megatron_state()


@pytest.fixture
def resume(run_distributed, tmp_path, saved):
    """Return resume(*flags, error=None) -> losses of the resumed run."""

    def call(*flags, error=None):
        logs = tmp_path / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        argv = [*RUN, "--load", str(saved), *flags, "--tensorboard-dir", str(logs)]
        if error is not None:
            run_distributed(2)(refuse, argv=argv, message=error)
            return {}
        run_distributed(2)(pretrain, argv=argv)
        return read_scalars(logs).get("lm loss", {})

    return call


def test_fallback_goes_on_bit_for_bit_and_replaces_what_was_damaged(resume, saved, original):
    last = saved / "iter_0000010"
    flip_a_bit(last / "__0_0.distcp")
    resume(error=r"iter_0000010: __0_0.distcp: altered\n.*--fallback .* iter_0000005")
    losses = resume("--fallback", "--save", str(saved), "--save-interval", "5")
    assert losses == {i: original[1][i] for i in range(6, 11)}
    assert read_tracker(saved) == SAVED_LAST
    assert not glance(last).problems and (saved / "iter_0000010.replaced").is_dir()
    expected, found = TensorReader(original[0] / last.name), TensorReader(last)
    assert expected.shapes == found.shapes
    for name in expected.shapes:
        assert torch.equal(expected.read(name), found.read(name)), name


def test_what_a_cut_save_left_is_removed_before_the_next(resume, saved):
    last = saved / "iter_0000010"
    write_tracker(saved, 5)
    for name in (MANIFEST, "metadata.json", ".metadata", "__0_0.distcp"):
        (last / name).unlink()
    (last / "__7_0.distcp").write_bytes(b"of a larger run")
    resume("--save", str(saved), "--save-interval", "5")
    names = sorted(path.name for path in last.iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", MANIFEST, "metadata.json"]
    assert not glance(last).problems and not (saved / "iter_0000010.replaced").exists()


def rewrite_index(folder, change):
    """Change the keys of the index, as another model's save would have them."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def rename_key(old, new):
    def change(metadata):
        entries = metadata.state_dict_metadata
        if new is None:
            del entries[old]
        else:
            entries[new] = entries[old] if new.endswith("extra") else entries.pop(old)
        for index in [x for x in metadata.storage_data if x.fqn == old]:
            place = metadata.storage_data[index]
            if new is not None:
                renamed = type(index)(new, index.offset, index.index)
                metadata.storage_data[renamed] = place
            if new is None or not new.endswith("extra"):
                del metadata.storage_data[index]

    return change


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("new", "messages"),
    [
        (
            "decoder.final_layer_norm.weight",
            rf"not in the checkpoint: {NORM} \[32\] \(renamed from decoder.final_layer_norm"
            r"(.|\n)*of no part of this model: decoder.final_layer_norm.weight \[32\]",
        ),
        (None, rf"not in the checkpoint: {NORM} \[32\]$"),
        ("decoder.extra", r"model: in the checkpoint, and of no part of this model: decoder.extra"),
    ],
    ids=["renamed", "missing", "left over"],
)
def test_keys_of_another_model_are_refused_by_name(resume, saved, new, messages):
    write_tracker(saved, 5)
    rewrite_index(saved / "iter_0000005", rename_key(NORM, new))
    assert sign(saved / "iter_0000005", exchange=lambda value: [value], rank=0) == []
    resume(error=messages)
    if new == "decoder.extra":  # asked for in so many words, it is only said
        assert sorted(resume("--dist-ckpt-strictness", "log_all")) == [6, 7, 8, 9, 10]


def test_the_strictest_setting_passes_a_plain_resume(resume, saved, original):
    write_tracker(saved, 5)
    losses = resume("--dist-ckpt-strictness", "raise_all")
    assert losses == {i: original[1][i] for i in range(6, 11)}


def compare_vocabulary(rows, fits):
    """In a rank: an embedding of 123 tokens, padded to 128, beside one of `rows` in a file."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_emo.training import checkpoint_loads

    def embedding(size):
        weight = torch.empty(size, 4)
        return ShardedTensor.from_rank_offsets("embedding", weight, allow_shape_mismatch=True)

    parts = {"embedding": embedding(128)}, {"embedding": embedding(rows)}
    saved = argparse.Namespace(make_vocab_size_divisible_by=16, tensor_model_parallel_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_loads, "read_arguments", lambda folder: saved)
        patch.setattr("megatron.training.get_tokenizer", lambda: argparse.Namespace(vocab_size=123))
        problems = checkpoint_loads._vocabulary_problems(Path("x"), *parts)
    assert (problems == []) == fits, problems


@pytest.mark.parametrize(("rows", "fits"), [(128, True), (144, True), (96, False), (160, False)])
def test_rows_of_another_vocabulary_are_told_from_padding(run_distributed, rows, fits):
    run_distributed(1)(compare_vocabulary, rows=rows, fits=fits)
