"""Tables out of model folders and checkpoints, against what the models and files were made of."""

from __future__ import annotations

import argparse
import json
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import DefaultSavePlanner

import megatron_emo.cost_embedding.sources as sources
from megatron_emo.cost_embedding import unit_rows, verify_cost_embedding
from megatron_emo.cost_embedding.prepare import prepare_cost_embedding
from megatron_emo.cost_embedding.provenance import Provenance, provenance_of_hf
from megatron_emo.cost_embedding.sources import (
    summarize_table,
    table_from_hf,
    table_from_npy,
    table_from_safetensors,
)
from megatron_emo.vocabulary import (
    fingerprint_vocabulary,
)

VOCAB_SIZE, DIM = 50, 8

# Hugging Face folders


def tiny_model(kind: str):
    transformers = pytest.importorskip("transformers")
    special = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=DIM, n_layer=1, n_head=2, n_positions=8, **special
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=DIM,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=kind == "tied llama",
            **special,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def tensors_read(monkeypatch) -> list[str]:
    """The names of the tensors that were read out of safetensors files."""
    names = []
    real_open = sources.safe_open

    class Recorder:
        def __init__(self, *args, **kwargs) -> None:
            self.file = real_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(sources, "safe_open", Recorder)
    return names


@pytest.mark.parametrize("max_shard_size", ["5GB", "2KB"])
@pytest.mark.parametrize(
    ("kind", "stored_as"),
    [
        ("gpt2", "transformer.wte.weight"),
        ("llama", "lm_head.weight"),
        ("tied llama", "model.embed_tokens.weight"),
    ],
)
def test_the_head_of_a_model_folder_and_no_other_tensor_is_read(
    tmp_path, tensors_read, kind, stored_as, max_shard_size
):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    is_sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert is_sharded == (max_shard_size == "2KB")
    table, vocab_size = table_from_hf(tmp_path)
    assert torch.equal(table, model.get_output_embeddings().weight)
    assert vocab_size == VOCAB_SIZE
    assert tensors_read == [stored_as]


def test_a_folder_saved_without_the_head_gives_the_tied_embedding(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(table_from_hf(tmp_path)[0], model.lm_head.weight)


def test_an_untied_head_that_is_not_stored_is_missed_by_name(tmp_path):
    tiny_model("llama").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"expected one of \['lm_head.weight'\], found \["):
        table_from_hf(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*save_pretrained"):
        table_from_hf(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="2KB")
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    save_file({"lm_head.weight": torch.ones(VOCAB_SIZE, DIM)}, tmp_path / "outside.safetensors")
    entries["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises((ValueError, FileNotFoundError), match="outside"):
        table_from_hf(folder)


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_folder_without_a_model_is_refused(tmp_path, where):
    with pytest.raises(FileNotFoundError, match="--from-hf .*config.json"):
        table_from_hf(tmp_path / where)


# What is known of a source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("kind", "is_tied"), [("gpt2", True), ("llama", False), ("tied llama", True)]
)
def test_whether_the_head_is_tied_is_told(tmp_path, kind, is_tied):
    tiny_model(kind).save_pretrained(tmp_path / "model", max_shard_size="2KB")
    assert provenance_of_hf(tmp_path / "model") == Provenance("", is_tied)
    info, *_ = prepare_cost_embedding(tmp_path / "out", from_hf=str(tmp_path / "model"))
    assert (info.revision, info.tied) == ("", is_tied)


def test_a_snapshot_of_the_hubs_cache_has_its_commit(tmp_path, monkeypatch):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    model = tiny_model("llama")
    model.save_pretrained(snapshot)
    assert provenance_of_hf(snapshot).revision == COMMIT
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    info, *_ = prepare_cost_embedding(tmp_path / "out", from_hf=str(repository))
    assert (info.revision, info.vocab_size) == (COMMIT, VOCAB_SIZE)
    assert torch.equal(table_from_hf(repository)[0], model.lm_head.weight)
    monkeypatch.chdir(snapshot)
    assert provenance_of_hf(".").revision == COMMIT


@pytest.mark.parametrize("text", [f"{COMMIT}\nan etag\n1700000000.0\n", "damaged", ""])
def test_a_download_into_a_folder_has_its_commit_beside_it(tmp_path, text):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/download/config.json.metadata").write_text(text)
    assert provenance_of_hf(tmp_path).revision == (COMMIT if COMMIT in text else "")


def test_a_commit_in_the_config_is_taken(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_commit_hash": COMMIT}))
    assert provenance_of_hf(tmp_path).revision == COMMIT


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("folder", ["iter_0000120", "release", "renamed"])
def test_a_checkpoint_has_its_iteration(tmp_path, folder, is_tied):
    table = torch.randn(64, DIM)
    tensors = {"embedding.word_embeddings.weight": table}
    if not is_tied:
        tensors["output_layer.weight"] = -table
    arguments = argparse.Namespace(vocab_size=VOCAB_SIZE, iteration=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state = tensors | {"common_state/shard_0_1": [{"args": arguments}]}
        planner = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, checkpoint_id=tmp_path / folder, planner=planner, no_dist=True)
    output = tmp_path / "out"
    info, *_ = prepare_cost_embedding(output, from_checkpoint=str(tmp_path / folder))
    revisions = {"iter_0000120": "iteration 120", "release": "release", "renamed": "iteration 7"}
    assert (info.revision, info.tied) == (revisions[folder], is_tied)
    expected = unit_rows((table if is_tied else -table)[:VOCAB_SIZE])
    assert torch.equal(load_file(output)["cost_embedding"], expected)


def test_a_matrix_in_a_file_has_no_revision(tmp_path):
    np.save(tmp_path / "table.npy", np.ones((4, 2)))
    save_file({"w": torch.ones(4, 2)}, tmp_path / "table")
    for source in (
        {"from_npy": f"{tmp_path}/table.npy"},
        {"from_safetensors": f"{tmp_path}/table"},
    ):
        info, *_ = prepare_cost_embedding(tmp_path / "out", **source, overwrite=True)
        assert (info.revision, info.tied) == ("", None)


# Tensors in files


def test_a_matrix_in_a_file_is_found_by_name_or_when_it_is_the_only_tensor(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    table = torch.randn(5, 3)
    save_file({"w": table}, one)
    save_file({"w": table, "ids": torch.arange(4)}, two)
    for name in (f"{one}", f"{one}:w", f"{two}:w"):
        found, vocab_size = table_from_safetensors(name)
        assert torch.equal(found, table) and vocab_size == 5
    with pytest.raises(ValueError, match=r"FILE:TENSOR with one of \['ids', 'w'\]"):
        table_from_safetensors(str(two))
    with pytest.raises(ValueError, match=r"ids: expected a matrix of .*int64"):
        table_from_safetensors(f"{two}:ids")
    with pytest.raises(FileNotFoundError, match="three"):
        table_from_safetensors(f"{tmp_path}/three.safetensors:w")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_numpy_matrix_is_read_whatever_its_layout(tmp_path, dtype, order):
    table = np.asarray(np.random.default_rng(0).normal(size=(5, 3)), dtype=dtype, order=order)
    np.save(tmp_path / "table.npy", table)
    found, vocab_size = table_from_npy(tmp_path / "table.npy")
    assert vocab_size == 5 and found.tolist() == table.tolist()
    prepare_cost_embedding(tmp_path / "out", from_npy=str(tmp_path / "table.npy"))
    info = verify_cost_embedding(tmp_path / "out")
    assert info.source == f"npy:{tmp_path}/table.npy" and (info.vocab_size, info.dim) == (5, 3)


def test_numpy_files_that_are_no_matrix_are_refused(tmp_path):
    file = tmp_path / "table.npy"
    with pytest.raises(FileNotFoundError, match="--from-npy .*table.npy: no such file"):
        table_from_npy(file)
    np.save(file, np.ones((40, 3)))
    whole = file.read_bytes()
    for content in (b"", b"not numpy's", whole[:-8]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="--from-npy .*expected a .npy file of numbers"):
            table_from_npy(file)
    np.save(file, np.array([{"code": 1}], dtype=object))
    with pytest.raises(ValueError, match="--from-npy .*expected a .npy file of numbers"):
        table_from_npy(file)
    for array in (np.ones(4), np.ones((2, 3), dtype=np.int64)):
        np.save(file, array)
        with pytest.raises(ValueError, match="--from-npy .*expected a matrix of fp64"):
            table_from_npy(file)


# The whole way


def save_tokenizer(folder, tokens: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ids = {token: index for index, token in enumerate(tokens)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel(ids, unk_token=tokens[0])
        ),
        unk_token=tokens[0],
    ).save_pretrained(folder)


def test_a_prepared_file_has_the_tokenizers_rows_and_fingerprint(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tokens = [f"<{i}>" for i in range(30)]
    save_tokenizer(tmp_path / "tokenizer", tokens)
    output = tmp_path / "out" / "table.safetensors"
    info, *_ = prepare_cost_embedding(
        output, from_hf=tmp_path / "model", tokenizer_model=tmp_path / "tokenizer"
    )
    assert verify_cost_embedding(output) == info
    assert (info.vocab_size, info.dim) == (30, DIM)
    assert info.tokenizer_fingerprint == fingerprint_vocabulary(tokens)
    expected = torch.nn.functional.normalize(model.lm_head.weight[:30].detach(), dim=1)
    torch.testing.assert_close(load_file(output)["cost_embedding"], expected, rtol=0, atol=2e-7)
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare_cost_embedding(output, from_hf=tmp_path / "model")


@pytest.mark.parametrize("vocab_size", [0, -3, 51])
def test_a_vocabulary_the_table_does_not_have_is_refused(tmp_path, vocab_size):
    save_file({"w": torch.ones(50, 2)}, tmp_path / "in")
    with pytest.raises(ValueError, match=f"--vocab-size {vocab_size}: expected 1 to 50"):
        prepare_cost_embedding(
            tmp_path / "out", from_safetensors=str(tmp_path / "in"), vocab_size=vocab_size
        )


def test_the_summary_finds_what_was_put_into_the_table():
    torch.manual_seed(3)
    common = torch.ones(64)
    table = 2 * common + torch.randn(40, 64)
    words = ["cat", "dog", "sea", "ice"]
    tokens = {i: f"<{i}>" for i in range(40)} | dict(enumerate(words))
    for i in range(4):
        table[i + 20] = 3 * table[i] + 0.01 * torch.randn(64)
    summary = summarize_table(table, tokens)
    cosines = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    exact = (cosines.sum() - 40) / (40 * 39)
    assert summary.mean_cosine == pytest.approx(float(exact), abs=0.01)
    nearest = {word: found[0][0] for word, found in summary.neighbours.items()}
    assert nearest == {word: f"<{i + 20}>" for i, word in enumerate(words)}
    assert summarize_table(table, tokens) == summary
