"""Names inside files lead to no other folder, and nothing outside is copied out."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_emo.conversion.hf import INDEX, HFFolder, copy_tokenizer
from megatron_emo.cost_embedding.sources import (
    resolve_hf_dir,
    table_from_hf,
    table_from_safetensors,
)
from megatron_emo.evaluation.icl_tasks import TaskError, parse_task
from megatron_emo.foreign_files import WorldWritableWarning, file_inside, read_weight_map
from megatron_emo.torch_dist import (
    TensorReader,
    read_arguments,
    read_tensor,
    resolve_checkpoint_dir,
)

BAD_NAMES = [
    *("../outside", "..", ".", "", "a/../../outside", "/etc/passwd", "//etc/passwd", "a/b", "./a"),
    *("..\\outside", "C:\\outside", "a\0b", "\0", "a\nb", "/dev/zero", "/proc/self/environ"),
]
NO_NAMES = [None, 5, ["a"], {"a": "b"}, True]


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file of the user's that nothing may read."""
    path = tmp_path / "outside"
    path.write_text("private")
    return path


@pytest.mark.parametrize("name", [*BAD_NAMES, *NO_NAMES], ids=repr)
def test_only_plain_names_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match="index: expected the name of a file beside it, found"):
        file_inside(tmp_path, name, "index")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("./\\\0\n~a:"), max_size=8) | st.text(max_size=12))
def test_what_is_taken_lies_in_the_folder(name):
    folder = Path("/nowhere/folder")
    try:
        path = file_inside(folder, name, "index")
    except ValueError:
        return
    assert path.parent == folder and os.path.normpath(path) == str(path)


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "inside/../../outside", "loop"])
def test_links_out_of_the_folder_are_refused(tmp_path, secret, target):
    folder = tmp_path / "model"
    (folder / "inside").mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (folder / "a").symlink_to(target)
    if target == "loop":  # leads nowhere, so that opening it fails
        assert not file_inside(folder, "a", "index").is_file()
        return
    with pytest.raises(ValueError, match="found a link out of its folder.*copy the file there"):
        file_inside(folder, "a", "index")


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "b").write_text("{}")
    (snapshot / "a").symlink_to("../../blobs/b")
    assert file_inside(snapshot, "a", "index").read_text() == "{}"
    assert file_inside(tmp_path / "models--x", "absent", "index").name == "absent"


@pytest.mark.parametrize("name", [*BAD_NAMES, *NO_NAMES], ids=repr)
def test_an_index_names_files_beside_it_alone(tmp_path, secret, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (
        lambda: read_weight_map(folder / INDEX),
        lambda: HFFolder(folder).tensors,
        lambda: table_from_hf(folder),
    ):
        with pytest.raises(ValueError, match="expected the name of a file beside it"):
            read()


def write_checkpoint(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        state = {"a": torch.ones(4), "common_state/shard_0_1": [{"args": 1}]}
        dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_checkpoints_index_names_files_beside_it_alone(tmp_path, name):
    write_checkpoint(tmp_path / "run")
    write_checkpoint(tmp_path / "other")
    (shard,) = (tmp_path / "other").glob("*.distcp")
    shard.rename(tmp_path / "outside")  # what "../outside" would find is sound
    path = tmp_path / "run" / ".metadata"
    index = pickle.loads(path.read_bytes())
    for place in index.storage_data.values():
        place.relative_path = name
    path.write_bytes(pickle.dumps(index))
    for read in (read_tensor, lambda folder, key: TensorReader(folder).read(key)):
        with pytest.raises(ValueError, match="expected the name of a file beside it"):
            read(tmp_path / "run", "a")
    assert read_arguments(tmp_path / "run") is None


def test_a_shard_that_is_a_link_out_is_refused(tmp_path):
    write_checkpoint(tmp_path / "run")
    (shard,) = (tmp_path / "run").glob("*.distcp")
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link out of its folder"):
        read_tensor(tmp_path / "run", "a")
    (tmp_path / "link").symlink_to(tmp_path / "run")  # a folder may be reached by one
    shard.unlink()
    (tmp_path / "elsewhere").rename(shard)
    assert torch.equal(read_tensor(tmp_path / "link", "a"), torch.ones(4))


def test_weights_that_are_a_link_out_are_refused(tmp_path):
    save_file({"lm_head.weight": torch.ones(4, 2)}, tmp_path / "outside")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 4}')
    (folder / "model.safetensors").symlink_to("../outside")
    for read in (lambda: HFFolder(folder).tensors, lambda: table_from_hf(folder)):
        with pytest.raises(ValueError, match="link out of its folder"):
            read()
    # A file that the user names is the user's own business.
    assert table_from_safetensors(str(folder / "model.safetensors"))[1] == 4


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer.model"])
def test_a_tokenizer_cannot_bring_private_files_into_an_export(tmp_path, secret, name):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name}: found a link out of its folder"):
        copy_tokenizer(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [n for n in BAD_NAMES if ".." in n or n.startswith("/") or "\0" in n]
)
def test_a_task_reads_below_its_data_alone(name):
    task = {"name": "x", "template": "{text} {label}", "labels": {"0": "a", "1": "b"}}
    for kind, files in (("csv", name), ("parallel", {"text": name, "label": "x"})):
        if name == "..\\outside" or name == "C:\\outside":
            continue  # plain names where / alone parts folders
        with pytest.raises(TaskError, match="files: test: expected a path below --data"):
            parse_task(task | {"format": kind, "files": {"test": files}})


@pytest.mark.parametrize("revision", ["../../../outside", "/etc", "..", "a\0b"])
def test_a_hub_reference_leads_to_a_snapshot_alone(tmp_path, revision):
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text(revision)
    with pytest.raises((FileNotFoundError, ValueError)):
        resolve_hf_dir(tmp_path)


@pytest.mark.parametrize(
    ("mode", "warns"), [(0o777, True), (0o702, True), (0o775, False), (0o1777, False)]
)
def test_a_checkpoint_that_everyone_may_change_is_warned_of(tmp_path, mode, warns):
    write_checkpoint(tmp_path / "run")
    (tmp_path / "run").chmod(mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_checkpoint_dir(tmp_path / "run") == tmp_path / "run"
    assert [w.category for w in caught] == [WorldWritableWarning] * warns
    assert not warns or f"(mode {mode:o}); chmod o-w it" in str(caught[0].message)
