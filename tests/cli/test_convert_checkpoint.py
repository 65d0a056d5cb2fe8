"""tools/convert_checkpoint.py on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def hf(tmp_path) -> Path:
    """A model with a tokenizer of 100 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "hf"
    save_model("llama-tied", folder)
    words = {f"w{index}": index for index in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def convert(tool, *argv: str | Path) -> None:
    tool([str(word) for word in argv])


def test_import_export_verify(tool, hf, tmp_path, capsys):
    megatron, out = tmp_path / "mg", tmp_path / "out"
    weights = ("--verify", "weights")
    convert(tool, "import", "--hf", hf, "--output", megatron, *weights)
    convert(tool, "export", "--megatron", megatron, "--output", out, *weights)
    convert(tool, "verify", "--megatron", megatron, "--hf", out, *weights)
    said = capsys.readouterr().out
    assert "layer 2/2: " in said and "MB/s" in said
    assert f"--pretrained-checkpoint {megatron} --use-checkpoint-args" in said
    assert said.count("weights: 20 tensors, 70,144 parameters, all equal") == 3

    before, after = (load_file(folder / "model.safetensors") for folder in (hf, out))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoTokenizer.from_pretrained(out)("w3 w5")["input_ids"] == [3, 5]
    assert (out / "generation_config.json").is_file()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| verified against the Megatron checkpoint | weights: 20 tensors" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_other_engine_converts_to_the_same(name, tmp_path):
    from megatron_emo.conversion import bridge

    if not bridge.is_available():
        pytest.skip(f"megatron-bridge is absent: {bridge.INSTALL_COMMAND}")
    folders = {part: str(tmp_path / part) for part in ("hf", "megatron", "out")}
    save_model(name, Path(folders["hf"]))
    for argv in (
        ["import", "--hf", folders["hf"], "--output", folders["megatron"]],
        ["export", "--megatron", folders["megatron"], "--output", folders["out"]],
    ):
        # A process of its own: building Megatron's model leaves CPU stand-ins behind.
        command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *argv]
        result = subprocess.run([*command, "--engine", "bridge"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    before, after = (load_file(Path(folders[x], "model.safetensors")) for x in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_card_tells_of_the_training(tool, hf, tmp_path):
    """Arguments as a run of this project leaves them, in the imported checkpoint's place."""
    from megatron_emo.conversion.torch_dist_writer import PieceWriter, common_state
    from megatron_emo.torch_dist import COMMON_STATE, _SafeReader, read_arguments

    megatron, out = tmp_path / "mg", tmp_path / "out"
    convert(tool, "import", "--hf", hf, "--output", megatron, "--no-verify")
    folder = megatron / "release"
    args = read_arguments(folder)
    args.objective, args.emo_weight_max = "emo1", 3.0
    args.emo_cost_embedding, args.emo_cost_embedding_id = "table.safetensors", "ab" * 32
    args.consumed_train_samples, args.data_path = 1000, ["corpus_text_document"]
    with open(folder / "__9_0.distcp", "wb") as stream:
        writer = PieceWriter(stream, "__9_0.distcp")
        writer.write_object(*common_state(args))
    metadata = _SafeReader(folder).read_metadata()
    (piece,) = writer.pieces
    for index, where in metadata.storage_data.items():
        if index.fqn == COMMON_STATE:
            where.relative_path, where.offset, where.length = piece.file, 0, piece.length
    import pickle

    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    convert(tool, "export", "--megatron", megatron, "--output", out, "--verify", "weights")
    card = (out / "README.md").read_text()
    assert "| tokens seen | 48,000 (1,000 samples of 48) |" in card
    assert "| objective | emo1 |\n| its settings | emo_weight_max=3.0 |" in card
    assert "| cost embedding | table.safetensors |" in card and "ab" * 32 in card


def test_verify_fails_where_a_weight_differs(tool, hf, tmp_path):
    megatron = tmp_path / "mg"
    convert(tool, "import", "--hf", hf, "--output", megatron, "--no-verify")
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, hf / "model.safetensors")
    with pytest.raises(SystemExit, match=r"1 differ by up to 0\.5: model\.norm\.weight"):
        convert(tool, "verify", "--megatron", megatron, "--hf", hf, "--verify", "weights")


def test_errors_end_with_a_message(tool, hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SystemExit, match="convert_checkpoint: --hf .*9 tensors are missing"):
        convert(tool, "import", "--hf", hf, "--output", tmp_path / "mg")
    with pytest.raises(SystemExit, match="no such folder"):
        convert(tool, "export", "--megatron", tmp_path / "none", "--output", tmp_path / "out")


def test_sentencepiece_model_becomes_a_tokenizer(tool, tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {a} sees the {b}" for a in "abcdef" for b in "ghijkl"))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    save_model("llama", tmp_path / "hf")
    megatron, out = tmp_path / "mg", tmp_path / "out"
    convert(tool, "import", "--hf", tmp_path / "hf", "--output", megatron, "--no-verify")
    tokenizer = ("--tokenizer-model", tmp_path / "sp.model")
    convert(tool, "export", "--megatron", megatron, "--output", out, *tokenizer, "--no-verify")
    ours = AutoTokenizer.from_pretrained(out)
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    for sentence in ("the a sees the g", "the f", "b sees"):
        assert ours(sentence, add_special_tokens=False)["input_ids"] == theirs.encode(sentence)
    assert (out / "tokenizer.model").read_bytes() == (tmp_path / "sp.model").read_bytes()


def test_a_tokenizer_that_is_too_large_is_refused(tool, hf, tmp_path):
    megatron = tmp_path / "mg"
    convert(tool, "import", "--hf", hf, "--output", megatron, "--no-verify")
    argv = ("--megatron", megatron, "--output", tmp_path / "out", "--vocab-size", "90")
    with pytest.raises(SystemExit, match="it has 100 tokens, expected at most 90"):
        convert(tool, "export", *argv)
