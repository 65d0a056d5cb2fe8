"""Damaged checkpoints are named, file by file, on every rank; whole ones pass."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from megatron_emo.checkpoints import MANIFEST, Manifest, glance, inspect, manifest, sign


def on_ranks(world_size, function):
    """function(exchange, rank) on as many threads, as ranks; their results."""
    values, results = [None] * world_size, [None] * world_size
    barrier = threading.Barrier(world_size, timeout=30)

    def be(rank):
        def exchange(value):
            values[rank] = json.dumps(value)  # what a store can carry
            barrier.wait()
            answers = [json.loads(text) for text in values]
            barrier.wait()
            return answers

        try:
            results[rank] = function(exchange, rank)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def problems_of(folder, world_size=3, **options):
    """What `inspect` finds; the same on all ranks."""
    found = on_ranks(
        world_size, lambda exchange, rank: inspect(folder, exchange=exchange, rank=rank, **options)
    )
    assert all(findings == found[0] for findings in found), found
    return list(found[0].problems)


def write_checkpoint(folder, seed, signs=True):
    """What a run of two ranks leaves: Megatron's files, one shard more than torch would write."""
    generator = torch.Generator().manual_seed(seed)
    arguments = argparse.Namespace(verify_integrity=signs)
    state = {
        "decoder.weight": torch.randn(64, 32, generator=generator),
        "common_state/shard_0_1": [{"args": arguments, "iteration": 7}],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    (folder / "__1_0.distcp").write_bytes(bytes([seed]) * 5000)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    if signs:
        results = on_ranks(2, lambda exchange, rank: sign(folder, exchange=exchange, rank=rank))
        assert results == [[], []]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    for seed in (1, 2):
        write_checkpoint(root / str(seed), seed)
    write_checkpoint(root / "unsigned", 3, signs=False)
    return root


@pytest.fixture
def checkpoint(originals, tmp_path):
    return Path(shutil.copytree(originals / "1", tmp_path / "iter_0000007"))


def test_a_whole_one_passes_and_megatron_can_read_its_manifest(checkpoint):
    assert problems_of(checkpoint) == []
    content = json.loads((checkpoint / MANIFEST).read_text())
    names = [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    assert (content["algorithm"], sorted(content["files"])) == ("sha256", names)
    for name, expected in content["files"].items():
        data = (checkpoint / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (expected, content["bytes"][name])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename(path):
    path.rename(path.with_name("__7_0.distcp"))


def link(path):
    target = path.parent.parent / "elsewhere"
    shutil.move(path, target)
    path.symlink_to(target)


DAMAGE = {
    "bit flipped": (flip_a_bit, ["__1_0.distcp: altered"]),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        ["__1_0.distcp: 4999 bytes, saved were 5000"],
    ),
    "empty": (lambda path: path.write_bytes(b""), ["__1_0.distcp: 0 bytes, saved were 5000"]),
    "missing": (Path.unlink, ["__1_0.distcp: missing"]),
    "renamed": (rename, ["__1_0.distcp: missing", f"__7_0.distcp: not in {MANIFEST}"]),
    "unlisted": (
        lambda path: path.with_name("common.pt").write_bytes(b"x"),
        [f"common.pt: not in {MANIFEST}"],
    ),
    "hidden": (
        lambda path: path.with_name(".extra").write_bytes(b"x"),
        [f".extra: not in {MANIFEST}"],
    ),
    "folder": (
        lambda path: path.with_name("modelopt_state").mkdir(),
        ["modelopt_state: a folder, expected plain files alone"],
    ),
    "linked": (
        link,
        ["__1_0.distcp: a symbolic link, expected plain files alone"],
    ),
    "no index": (
        lambda path: path.with_name(".metadata").unlink(),
        [".metadata: missing"],
    ),
    "no manifest": (
        lambda path: path.with_name(MANIFEST).unlink(),
        [f"{MANIFEST}: missing, its save was cut off or the file was removed"],
    ),
    "no folder": (lambda path: shutil.rmtree(path.parent), ["iter_0000007: no such folder"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("world_size", [1, 3])
def test_damage_is_named_on_every_rank(checkpoint, kind, world_size):
    damage, expected = DAMAGE[kind]
    damage(checkpoint / "__1_0.distcp")
    assert problems_of(checkpoint, world_size) == expected


def test_shards_of_two_saves_are_told_apart(checkpoint, originals):
    shutil.copy(originals / "2" / "__0_0.distcp", checkpoint)
    assert problems_of(checkpoint) == ["__0_0.distcp: altered"]
    shutil.copy(originals / "2" / "__1_0.distcp", checkpoint)
    assert problems_of(checkpoint) == ["__0_0.distcp: altered", "__1_0.distcp: altered"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{\x80", "codec can't decode"),
        (b"[]", "expected an object with the files"),
        (b'{"files": {}}', r"expected ['.metadata', 'metadata.json'] among its files"),
        (b'{"algorithm": "md5", "files": {}}', "expected 'sha256', found 'md5'"),
        (b'{"files": {"../x": "%s"}}' % (b"0" * 64), "expected names of files in this folder"),
        (b'{"files": {"/etc/passwd": "%s"}}' % (b"0" * 64), "found '/etc/passwd'"),
        (b'{"files": {"a\\u0000b": "%s"}}' % (b"0" * 64), "expected names of files"),
        (b'{"files": {"a": "0"}}', "a: expected 64 hexadecimal digits"),
        (b'{"files": {"a": "%s", "a": "%s"}}' % (b"0" * 64, b"1" * 64), "'a' is there twice"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_manifest_is_a_problem_by_name(checkpoint, content, message):
    (checkpoint / MANIFEST).write_bytes(content)
    (problem,) = problems_of(checkpoint)
    assert problem.startswith(f"{MANIFEST}: ") and message in problem, problem


def test_sizes_must_be_of_the_same_files(checkpoint):
    content = json.loads((checkpoint / MANIFEST).read_text())
    for sizes in ({"other": 1}, dict.fromkeys(content["files"], -1), 5):
        (checkpoint / MANIFEST).write_text(json.dumps({**content, "bytes": sizes}))
        (problem,) = problems_of(checkpoint)
        assert "expected sizes" in problem


def test_megatrons_own_manifest_has_no_sizes_and_serves(checkpoint):
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["bytes"]
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    assert problems_of(checkpoint) == []
    flip_a_bit(checkpoint / "__0_0.distcp")
    assert problems_of(checkpoint) == ["__0_0.distcp: altered"]


def test_without_reading_all_a_flipped_bit_passes_and_a_size_does_not(checkpoint):
    flip_a_bit(checkpoint / "__1_0.distcp")
    assert problems_of(checkpoint, reads_all=False) == []
    (checkpoint / "__1_0.distcp").write_bytes(b"")
    assert problems_of(checkpoint, reads_all=False)


def test_a_checkpoint_of_megatrons_default_is_compared_with_its_index(originals, tmp_path):
    folder = Path(shutil.copytree(originals / "unsigned", tmp_path / "iter_0000003"))
    assert problems_of(folder) == []
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:3000])
    (problem,) = problems_of(folder)
    assert problem.startswith("__0_0.distcp: 3000 bytes, the index needs ")
    shard.unlink()
    assert problems_of(folder) == ["__0_0.distcp: missing"]
    (folder / ".metadata").write_bytes(b"junk")
    assert problems_of(folder)[0].startswith(".metadata: expected torch's checkpoint index")


def test_without_a_manifest_folders_are_passed_over_and_links_out_are_not(originals, tmp_path):
    folder = Path(shutil.copytree(originals / "unsigned", tmp_path / "iter_0000003"))
    (folder / "tokenizer").mkdir()
    assert problems_of(folder) == []
    link(folder / "__0_0.distcp")
    (problem,) = problems_of(folder)
    assert problem.startswith("__0_0.distcp: found a link out of its folder")


def test_a_save_that_was_cut_off_is_told_from_a_damaged_checkpoint(checkpoint):
    def is_cut_off():
        return glance(checkpoint).is_cut_off

    flip_a_bit(checkpoint / "__0_0.distcp")
    (checkpoint / "__1_0.distcp").unlink()
    assert not is_cut_off()  # its manifest says that it was whole once
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "metadata.json").unlink()
    assert is_cut_off()
    (checkpoint / ".metadata").unlink()
    assert is_cut_off()


def test_the_format_torch_is_refused_by_its_name(tmp_path):
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (problem,) = problems_of(tmp_path / "iter_0000007")
    assert problem.startswith("it is in the format torch; expected torch_dist")


@pytest.mark.parametrize("by_writer", [False, True])
def test_every_file_goes_to_one_rank_and_bytes_are_shared(by_writer):
    sizes = {f"__{rank}_{part}.distcp": 1000 + rank for rank in range(8) for part in range(2)}
    sizes |= {".metadata": 10, "metadata.json": 1}
    shares = manifest.divide(sizes, 4, by_writer)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 1010
    if by_writer:
        assert {"__2_0.distcp", "__2_1.distcp"} <= set(shares[2])


@pytest.mark.parametrize("step", ["sign", "inspect"])
def test_each_file_is_read_once_over_all_ranks(checkpoint, monkeypatch, step):
    read = []
    digest = manifest.digest
    monkeypatch.setattr(
        "megatron_emo.checkpoints.whole.digest", lambda path: read.append(path.name) or digest(path)
    )
    if step == "sign":
        on_ranks(3, lambda exchange, rank: sign(checkpoint, exchange=exchange, rank=rank))
    else:
        problems_of(checkpoint)
    assert sorted(read) == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]


def test_a_manifest_that_cannot_be_written_is_a_problem_on_every_rank(checkpoint, monkeypatch):
    (checkpoint / MANIFEST).unlink()

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "write", full)
    results = on_ranks(2, lambda exchange, rank: sign(checkpoint, exchange=exchange, rank=rank))
    assert results == [[f"{MANIFEST}: No space left on device"]] * 2
    assert not (checkpoint / MANIFEST).exists()


def test_a_shard_that_rank_0_does_not_see_yet_is_signed_by_its_writer(checkpoint, monkeypatch):
    (checkpoint / MANIFEST).unlink()
    shard = checkpoint / "__0_0.distcp"
    shard.rename(checkpoint.parent / "later")
    divide = manifest.divide

    def appears(sizes, world_size, by_writer):
        assert sizes[shard.name] == 0
        if not shard.exists():
            shutil.copy(checkpoint.parent / "later", shard)
        return divide(sizes, world_size, by_writer)

    monkeypatch.setattr("megatron_emo.checkpoints.whole.divide", appears)
    assert sign(checkpoint, exchange=lambda value: [value], rank=0) == []
    monkeypatch.undo()
    assert problems_of(checkpoint) == []


def test_a_shard_that_the_index_names_and_nobody_has_cannot_be_signed(checkpoint):
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "__0_0.distcp").unlink()
    (problem,) = on_ranks(1, lambda exchange, rank: sign(checkpoint, exchange=exchange, rank=rank))[
        0
    ]
    assert problem == "__0_0.distcp: No such file or directory"
    assert not (checkpoint / MANIFEST).exists()


def test_a_file_that_cannot_be_read_is_a_problem_on_every_rank(checkpoint, monkeypatch):
    digest = manifest.digest

    def broken(path):
        if path.name == "__1_0.distcp":
            raise OSError(5, "Input/output error")
        return digest(path)

    monkeypatch.setattr("megatron_emo.checkpoints.whole.digest", broken)
    assert problems_of(checkpoint) == ["__1_0.distcp: cannot be read: Input/output error"]
