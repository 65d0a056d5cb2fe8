"""Checkpoints in the layouts that other runs of Megatron's write, and tensors too many or few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from hf_models import save_model
from safetensors.torch import load_file

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import ExportOptions, export_hf
from megatron_emo.conversion.import_hf import import_hf
from megatron_emo.conversion.torch_dist_writer import Piece, PieceWriter, common_state, write_index
from megatron_emo.torch_dist import TensorReader, read_arguments

Tensors = dict[str, torch.Tensor]


def quiet(line: str) -> None:
    pass


@pytest.fixture
def rewrite(tmp_path) -> Callable:
    """Return rewrite(model name, change of the tensors) -> folder of a checkpoint so changed."""

    def run(name: str, change: Callable[[Tensors], Tensors], **args_changes):
        save_model(name, tmp_path / "hf")
        import_hf(tmp_path / "hf", tmp_path / "mg", say=quiet)
        reader = TensorReader(tmp_path / "mg" / "release")
        tensors = change({key: reader.read(key) for key in reader.shapes})
        args = read_arguments(tmp_path / "mg" / "release")
        vars(args).update(args_changes)
        folder = tmp_path / "iter_0000010"
        folder.mkdir()
        with open(folder / "__0_0.distcp", "wb") as stream:
            writer = PieceWriter(stream, "__0_0.distcp")
            writer.write_object(*common_state(args))
            for key, tensor in tensors.items():
                writer.write(key, tensor, (), ())
        write_index(folder, writer.pieces)
        return folder

    return run


def is_same(tmp_path) -> bool:
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def one_layer_at_a_time(tensors: Tensors) -> Tensors:
    result = {}
    for key, tensor in tensors.items():
        if not key.startswith("decoder.layers."):
            result[key] = tensor
            continue
        for layer, part in enumerate(tensor):
            result[key.replace("layers.", f"layers.{layer}.", 1)] = part.clone()
    return result


def norms_by_their_modules(tensors: Tensors) -> Tensors:
    names = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    for fused, plain in names.items():
        tensors = {key.replace(fused, plain): value for key, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(
    "change",
    [
        one_layer_at_a_time,
        norms_by_their_modules,
        lambda tensors: norms_by_their_modules(one_layer_at_a_time(tensors)),
        lambda tensors: {f"model.{key}": value for key, value in tensors.items()},
        lambda tensors: (
            tensors
            | {
                "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.ones(2),
                "chained_0.optimizer.state.fp32_param.output_layer.weight": torch.ones(2),
            }
        ),
    ],
    ids=["per-layer", "unfused-norms", "per-layer-unfused", "prefix", "optimizer"],
)
def test_other_layouts(rewrite, tmp_path, name, change):
    export_hf(rewrite(name, change), tmp_path / "out", say=quiet)
    assert is_same(tmp_path)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(FC2), r"2 tensors are missing: .*linear_fc2\.weight\[0\]"),
        (
            lambda t: t | {"decoder.layers.adapter.weight": torch.ones(2, 3)},
            r"1 tensors have no place in llama.*adapter\.weight",
        ),
        (
            lambda t: one_layer_at_a_time(t) | {FC2.replace("layers.", "layers.2."): t[FC2][0]},
            r"1 tensors have no place.*layers\.2\.mlp\.linear_fc2\.weight",
        ),
        (
            lambda t: t | {FC2: torch.cat([t[FC2], t[FC2][:1]])},
            r"linear_fc2\.weight has shape \[3, 64, 96\].*it has 3 layers, the arguments say 2",
        ),
        (lambda t: t | {FC2: t[FC2].to(torch.float8_e4m3fn)}, "dtype torch.float8_e4m3fn"),
    ],
    ids=["missing", "unused", "extra-layer", "extra-stacked-layer", "fp8"],
)
def test_tensors_that_do_not_fit(rewrite, tmp_path, change, message):
    with pytest.raises(ConversionError, match=message):
        export_hf(rewrite("llama", change), tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp_num_layers": 1}, "found mtp_num_layers 1"),
        ({"normalization": "LayerNorm"}, "as llama: found normalization 'LayerNorm'"),
        ({"position_embedding_type": "yarn"}, "found position_embedding_type 'yarn'"),
        ({"num_layers": None}, "its arguments lack num_layers"),
        ({"vocab_size": None}, "give --vocab-size, --tokenizer-model or --hf-config"),
    ],
)
def test_arguments_that_do_not_fit(rewrite, tmp_path, changes, message):
    with pytest.raises(ConversionError, match=message):
        export_hf(rewrite("llama", dict, **changes), tmp_path / "out", say=quiet)


def test_arguments_of_an_older_megatron(rewrite, tmp_path):
    """Names that are not in 0.19, and none of ours."""
    changes = {"disable_bias_linear": True, "norm_epsilon": 1e-6}
    folder = rewrite("llama", dict, **changes)
    args = read_arguments(folder)
    for name in ("add_bias_linear", "layernorm_epsilon", "relu", "hf_config", "hf_model_type"):
        delattr(args, name)
    with open(folder / "__1_0.distcp", "wb") as stream:
        writer = PieceWriter(stream, "__1_0.distcp")
        writer.write_object(*common_state(args))
    reader = TensorReader(folder)
    pieces = [*writer.pieces]
    with open(folder / "__2_0.distcp", "wb") as stream:
        others = PieceWriter(stream, "__2_0.distcp")
        for key in reader.shapes:
            others.write(key, reader.read(key), (), ())
    write_index(folder, [*pieces, *others.pieces])
    export_hf(folder, tmp_path / "out", say=quiet)
    assert is_same(tmp_path)


def test_reference_decides_the_class_and_the_vocabulary(rewrite, tmp_path):
    from transformers import AutoConfig

    folder = rewrite("mistral", dict, vocab_size=None, hf_model_type=None, hf_config={})
    export_hf(folder, tmp_path / "out", ExportOptions(reference=str(tmp_path / "hf")), say=quiet)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "mistral"
    assert is_same(tmp_path)


def test_pieces_that_do_not_cover_a_tensor_are_refused(tmp_path):
    with open(tmp_path / "__0_0.distcp", "wb") as stream:
        writer = PieceWriter(stream, "__0_0.distcp")
        writer.write("a", torch.arange(3.0), (1,), (2,))
    write_index(tmp_path, [Piece(**asdict(piece)) for piece in writer.pieces])
    reader = TensorReader(tmp_path)
    assert reader.read("a", (1,)).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"a\[0\]: expected 3 numbers in its pieces, found 0"):
        reader.read("a", (0,))
    with pytest.raises(ValueError, match="expected 6 numbers in its pieces, found 3"):
        reader.read("a")


def test_a_view_is_written_without_what_it_views(tmp_path):
    with open(tmp_path / "__0_0.distcp", "wb") as stream:
        writer = PieceWriter(stream, "__0_0.distcp")
        writer.write("a", torch.zeros(100_000)[:4], (), ())
    assert writer.pieces[0].length < 2000


def test_gpt2_tokenizer_of_the_run_is_exported(rewrite, tmp_path):
    import json

    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:96]
    vocab = {token: index for index, token in enumerate([*letters, "th", "the", "<|endoftext|>"])}
    (tmp_path / "v.json").write_text(json.dumps(vocab))
    (tmp_path / "m.txt").write_text("#version: 0.2\nt h\nth e\n")
    files = {"vocab_file": str(tmp_path / "v.json"), "merge_file": str(tmp_path / "m.txt")}
    folder = rewrite("gpt2", dict, tokenizer_type="GPT2BPETokenizer", **files)
    export_hf(folder, tmp_path / "out", say=quiet)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the")["input_ids"] == [vocab["the"]]
