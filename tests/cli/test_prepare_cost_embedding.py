"""tools/prepare_cost_embedding.py through its main()."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_emo.cost_embedding import CostEmbeddingInfo, load_cost_embedding_shard, unit_rows


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("prepare_cost_embedding").main


@pytest.fixture
def head(tmp_path) -> torch.Tensor:
    """A matrix, also in the file head.safetensors."""
    weight = torch.randn(20, 6)
    weight[4] = 0.0
    save_file({"lm_head.weight": weight, "bias": weight[:, 0].contiguous()}, tmp_path / "head")
    return weight


def test_a_table_is_made_described_and_verified(tmp_path, head, main, capsys):
    output = str(tmp_path / "table.safetensors")
    main(["--from-safetensors", f"{tmp_path}/head:lm_head.weight", "--output", output])
    made = capsys.readouterr().out
    main(["--info", output])
    described = capsys.readouterr().out
    main(["--verify", output])
    verified = capsys.readouterr().out
    assert torch.equal(load_file(output)["cost_embedding"], unit_rows(head))
    info = CostEmbeddingInfo.from_file(output)
    assert (info.vocab_size, info.dim, info.num_zero_rows) == (20, 6, 1)
    for shown in (made, described, verified):
        assert info.sha256 in shown
    assert "mean cosine" in made


def test_options_reach_the_file(tmp_path, head, main):
    output = str(tmp_path / "table.safetensors")
    source = ["--from-safetensors", f"{tmp_path}/head:lm_head.weight"]
    options = ["--dtype", "bf16", "--no-normalize", "--vocab-size", "16"]
    main([*source, "--output", output])
    main([*source, "--output", output, *options, "--overwrite"])
    assert torch.equal(load_file(output)["cost_embedding"], head[:16].bfloat16())
    settings = {"vocab_start_index": 5, "vocab_end_index": 20, "vocab_size": 16}
    shard = load_cost_embedding_shard(output, **settings)
    expected = unit_rows(head[5:16].bfloat16())
    assert torch.equal(shard, torch.cat([expected, torch.zeros(4, 6)]))


def test_a_reduced_table_says_what_it_was_and_what_that_cost(tmp_path, head, main, capsys):
    output = str(tmp_path / "table.safetensors")
    source = ["--from-safetensors", f"{tmp_path}/head:lm_head.weight", "--output", output]
    main([*source, "--cost-dim", "3"])
    info = CostEmbeddingInfo.from_file(output)
    assert (info.dim, info.source_dim, info.vocab_size, info.num_zero_rows) == (3, 6, 20, 1)
    unit, rows = unit_rows(head), load_file(output)["cost_embedding"]
    difference = rows @ rows.T - unit @ unit.T
    difference = difference[unit.any(dim=1)][:, unit.any(dim=1)]
    assert info.cosine_error_rms == pytest.approx(difference.square().mean().sqrt().item(), 1e-5)
    assert info.cosine_error_max == pytest.approx(difference.abs().max().item(), 1e-5)
    assert 0.01 < info.cosine_error_rms < info.cosine_error_max
    capsys.readouterr()
    main(["--info", output])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["source", "dim", "6"] in lines
    assert ["cosine", "error", "rms", f"{info.cosine_error_rms:.3g}"] in lines
    assert ["cosine", "error", "max", f"{info.cosine_error_max:.3g}"] in lines


def test_as_many_columns_as_there_are_leave_the_table_as_it_is(tmp_path, head, main):
    output = str(tmp_path / "table.safetensors")
    source = ["--from-safetensors", f"{tmp_path}/head:lm_head.weight", "--output", output]
    main(source)
    whole = CostEmbeddingInfo.from_file(output)
    main([*source, "--cost-dim", "6", "--overwrite"])
    assert CostEmbeddingInfo.from_file(output) == whole
    assert (whole.source_dim, whole.cosine_error_rms, whole.cosine_error_max) == (6, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cost-dim", "7"], "--cost-dim 7: expected 1 to 6, the columns of the table"),
        (["--cost-dim", "0"], "--cost-dim 0: expected 1 to 6, the columns of the table"),
        (["--cost-dim", "3", "--no-normalize"], "--cost-dim 3: does not go with --no-normalize"),
    ],
)
def test_reductions_that_cannot_be_end_in_one_line(tmp_path, head, main, options, message):
    argv = ["--from-safetensors", f"{tmp_path}/head:lm_head.weight", "--output", f"{tmp_path}/o"]
    with pytest.raises(SystemExit, match=f"^prepare_cost_embedding: {message}"):
        main([*argv, *options])
    assert not (tmp_path / "o").exists()


def test_a_model_folder_with_its_tokenizer_gives_fingerprint_rows_and_neighbours(
    tmp_path, main, capsys
):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ids = {"<unk>": 0, "<s>": 1, "cat": 2, "dog": 3, "sea": 4, "ice": 5}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>")),
        unk_token="<unk>",
    ).save_pretrained(tmp_path / "model")
    config = transformers.GPT2Config(
        vocab_size=8,
        n_embd=4,
        n_layer=1,
        n_head=1,
        n_positions=4,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.wte.weight.data[3] = 2 * model.transformer.wte.weight.data[2]
    model.save_pretrained(tmp_path / "model")
    output = str(tmp_path / "table.safetensors")
    capsys.readouterr()
    main(["--from-hf", str(tmp_path / "model"), "--output", output])
    lines = capsys.readouterr().out.splitlines()
    info = CostEmbeddingInfo.from_file(output)
    assert info.vocab_size == 6 and len(info.tokenizer_fingerprint) == 64
    assert any(line.split()[:3] == ["cat", "dog", "1.00"] for line in lines)


def test_a_table_is_mapped_between_tokenizers_and_its_coverage_shown(tmp_path, head, main, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def save(name: str, words: list[str], **settings) -> str:
        ids = {word: index for index, word in enumerate(words)}
        model = tokenizers.models.WordLevel(ids, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>"
        ).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    first = save("first", ["<unk>", "sea", "cat", "dog"])
    second = save("second", ["cat", "ice", "<unk>", "sea", "fog"])
    (tmp_path / "text").write_text("cat cat sea fog\ncat ice cat\n")
    output = str(tmp_path / "table.safetensors")
    source = ["--from-safetensors", f"{tmp_path}/head:lm_head.weight", "--output", output]
    mapping = ["--map-from-tokenizer", first, "--tokenizer-model", second]
    main([*source, *mapping, "--text", f"{tmp_path}/text"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.strip() == "tokens covered  3 of 5 (60.0%)" for line in lines)
    assert any(line.strip() == "of the text  5 of 7 (71.4%)" for line in lines)
    rows = unit_rows(head)
    expected = torch.stack([rows[2], torch.zeros(6), rows[0], rows[1], torch.zeros(6)])
    assert torch.equal(load_file(output)["cost_embedding"], expected)


def test_a_numpy_matrix_is_a_source(tmp_path, head, main):
    np.save(tmp_path / "head.npy", head.numpy())
    output = str(tmp_path / "table.safetensors")
    main(["--from-npy", f"{tmp_path}/head.npy", "--output", output])
    assert torch.equal(load_file(output)["cost_embedding"], unit_rows(head))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--info", "{folder}/nowhere"], "nowhere: no such file"),
        (["--verify", "{folder}/head"], "head: format: expected megatron_emo.cost_embedding"),
        (["--from-safetensors", "{folder}/head:bias"], "--output: expected a path"),
        (["--from-hf", "{folder}", "--output", "{folder}/o"], "--from-hf .*config.json"),
        (["--from-checkpoint", "{folder}", "--output", "{folder}/o"], "expected latest_check"),
        (["--from-checkpoint", "{folder}", "--output", "{folder}/head"], "give --overwrite"),
        (["--from-safetensors", "{folder}/head:bias", "--output", "{folder}/o"], "a matrix"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, head, main, argv, message):
    with pytest.raises(SystemExit, match=f"^prepare_cost_embedding: .*{message}") as caught:
        main([word.format(folder=tmp_path) for word in argv])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_help_names_every_source(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for flag in ("hf DIR", "checkpoint DIR", "safetensors FILE[:TENSOR]", "npy FILE"):
        assert f"--from-{flag}" in said
    for word in ("in shards", "tied", "Megatron checkpoint", ".npy", "revision", "sha256"):
        assert word in said


def test_the_header_is_shown_with_revision_and_tying(tmp_path, main, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    commit = "89abcdef" * 5
    folder = tmp_path / "models--a--b" / "snapshots" / commit
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder, max_shard_size="1KB")
    assert (folder / "model.safetensors.index.json").is_file()
    output = str(tmp_path / "table.safetensors")
    main(["--from-hf", str(folder), "--output", output])
    np.save(tmp_path / "head.npy", model.lm_head.weight.detach().numpy())
    main(["--from-npy", f"{tmp_path}/head.npy", "--output", f"{output}.2"])
    assert torch.equal(
        load_file(output)["cost_embedding"], load_file(f"{output}.2")["cost_embedding"]
    )
    shown = []
    for file in (output, f"{output}.2"):
        capsys.readouterr()
        main(["--info", file])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        shown.append([line[1:] for line in lines if line[0] in ("revision", "tied")])
    assert shown == [[[commit], ["True"]], [["unknown"], ["unknown"]]]
