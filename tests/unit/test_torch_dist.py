"""Tensors and tables out of torch_dist checkpoints, against what was saved."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from megatron_emo.cost_embedding.sources import table_from_torch_dist
from megatron_emo.torch_dist import read_arguments, read_tensor, resolve_checkpoint_dir

VOCAB_SIZE, DIM = 50, 8


class Spec(enum.Enum):
    """An enum among the saved arguments, as Megatron has them."""

    LOCAL = 1


class Canary:
    """Makes a folder when it is unpickled in earnest."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def saved_arguments(**fields) -> argparse.Namespace:
    return argparse.Namespace(
        padded_vocab_size=64, params_dtype=torch.bfloat16, spec=Spec.LOCAL, **fields
    )


def save_checkpoint(folder, tensors, arguments=None) -> None:
    """Write what megatron-core 0.19 writes under --ckpt-format torch_dist, without Megatron."""
    state = dict(tensors)
    if arguments is not None:
        state["common_state/shard_0_1"] = [{"args": arguments, "iteration": 7}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "embedding.word_embeddings.weight": torch.randn(64, DIM, dtype=torch.bfloat16),
        "output_layer.weight": torch.randn(64, DIM, dtype=torch.bfloat16),
        "optimizer.state.fp32_param.output_layer.weight": torch.randn(64, DIM),
    }


def test_the_untied_head_comes_out_without_padding(tmp_path, weights):
    save_checkpoint(tmp_path / "iter_0000007", weights, saved_arguments(vocab_size=VOCAB_SIZE))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    table, vocab_size = table_from_torch_dist(tmp_path)
    assert vocab_size == VOCAB_SIZE
    assert torch.equal(table, weights["output_layer.weight"][:VOCAB_SIZE])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_tied_head_is_the_word_embedding(tmp_path, weights, prefix):
    name = "embedding.word_embeddings.weight"
    save_checkpoint(tmp_path / "iter_0000007", {prefix + name: weights[name]})
    table, _ = table_from_torch_dist(tmp_path / "iter_0000007", vocab_size=40)
    assert torch.equal(table, weights[name][:40])


def test_an_iteration_can_be_chosen(tmp_path, weights):
    for iteration in (7, 12):
        shifted = {name: weight + iteration for name, weight in weights.items()}
        save_checkpoint(tmp_path / f"iter_{iteration:07d}", shifted)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    for asked, expected in ((None, 12), (7, 7)):
        table, _ = table_from_torch_dist(tmp_path, asked, vocab_size=64)
        assert torch.equal(table, weights["output_layer.weight"] + expected)
    with pytest.raises(FileNotFoundError, match=r"no folder iter_0000009, .*iter_0000012"):
        table_from_torch_dist(tmp_path, 9)


def test_an_unknown_vocabulary_size_is_asked_for(tmp_path, weights):
    save_checkpoint(tmp_path / "a", weights, saved_arguments(vocab_size=None))
    with pytest.raises(ValueError, match="64 rows with padding.*--vocab-size"):
        table_from_torch_dist(tmp_path / "a")
    save_checkpoint(tmp_path / "b", weights)
    with pytest.raises(ValueError, match="64 rows with padding.*--vocab-size"):
        table_from_torch_dist(tmp_path / "b")
    with pytest.raises(ValueError, match="--vocab-size 65: expected 1 to 64"):
        table_from_torch_dist(tmp_path / "b", vocab_size=65)


def test_a_checkpoint_without_a_head_is_refused(tmp_path, weights):
    save_checkpoint(tmp_path / "a", {"decoder.weight": weights["output_layer.weight"]})
    with pytest.raises(ValueError, match=r"expected one of \['output_layer.weight'.*decoder"):
        table_from_torch_dist(tmp_path / "a", vocab_size=4)


def test_arguments_of_older_checkpoints_are_read_from_common_pt(tmp_path, weights):
    save_checkpoint(tmp_path / "a", weights)
    torch.save({"args": saved_arguments(vocab_size=33)}, tmp_path / "a" / "common.pt")
    arguments = read_arguments(tmp_path / "a")
    assert (arguments.vocab_size, arguments.params_dtype) == (33, torch.bfloat16)


def test_classes_among_the_arguments_are_not_instantiated(tmp_path, weights):
    arguments = saved_arguments(vocab_size=33, data_path=("a", 1))
    save_checkpoint(tmp_path / "a", weights, arguments)
    found = read_arguments(tmp_path / "a")
    assert not isinstance(found.spec, Spec)
    assert (found.vocab_size, found.data_path) == (33, ("a", 1))


@pytest.mark.parametrize("place", ["common_state", "common.pt", ".metadata"])
def test_reading_a_checkpoint_runs_nothing_from_it(tmp_path, weights, place):
    folder, made = tmp_path / "a", tmp_path / "made"
    arguments = saved_arguments(vocab_size=5, canary=Canary(made))
    save_checkpoint(folder, weights, arguments if place == "common_state" else None)
    if place == "common.pt":
        torch.save({"args": arguments}, folder / "common.pt")
    if place == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Canary(made)))
        with pytest.raises(ValueError, match="found posix.mkdir, which has no place there"):
            table_from_torch_dist(folder)
    else:
        with pytest.raises(ValueError, match="--vocab-size"):
            table_from_torch_dist(folder)
        assert torch.equal(read_tensor(folder, "output_layer.weight"), list(weights.values())[1])
    assert not made.exists()


@pytest.mark.parametrize(
    "name", ["torch.save", "torch.distributed.checkpoint.filesystem.os", "builtins.eval"]
)
def test_the_index_may_name_index_classes_only(tmp_path, weights, name):
    save_checkpoint(tmp_path / "a", weights)
    module, _, attribute = name.rpartition(".")
    (tmp_path / "a" / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match=f"found {name}, which has no place there"):
        read_tensor(tmp_path / "a", "output_layer.weight")


def test_a_truncated_checkpoint_is_an_error_that_names_it(tmp_path, weights):
    save_checkpoint(tmp_path / "a", weights)
    (shard,) = (tmp_path / "a").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="checkpoint .*output_layer.weight"):
        read_tensor(tmp_path / "a", "output_layer.weight")


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, r"expected latest_checkpointed_iteration.txt or .metadata"),
        ({"latest_checkpointed_iteration.txt": "x"}, ValueError, "expected an iteration"),
        ({"latest_checkpointed_iteration.txt": "3"}, FileNotFoundError, "no folder iter_0000003"),
        (
            {"latest_checkpointed_iteration.txt": "3", "iter_0000003/mp_rank_00": ""},
            ValueError,
            r"expected the torch_dist format.*--ckpt-format torch_dist.*mp_rank_00",
        ),
    ],
)
def test_what_is_no_torch_dist_checkpoint_is_refused(tmp_path, files, error, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        resolve_checkpoint_dir(tmp_path)


def check_sharded_checkpoint(folder) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(1)
    whole = torch.randn(64, DIM)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    state = {"output_layer.weight": distribute_tensor(whole, mesh, [Shard(0)])}
    dcp.save(state, checkpoint_id=folder)
    torch.distributed.barrier()
    # Both ranks read the whole, each for itself: no collective, though there is a group.
    assert torch.equal(read_tensor(folder, "output_layer.weight"), whole)


def test_a_head_saved_by_two_tensor_parallel_ranks_is_put_together(tmp_path, run_distributed):
    run_distributed(2)(check_sharded_checkpoint, folder=str(tmp_path))
    assert len(list(tmp_path.glob("*.distcp"))) == 2
