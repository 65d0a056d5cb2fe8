"""What is refused is named, and nothing half-written appears under the output's name."""

from __future__ import annotations

import json
import re
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import save_model
from safetensors.torch import load_file, save_file

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import ExportOptions, export_hf
from megatron_emo.conversion.hf import INDEX
from megatron_emo.conversion.import_hf import ImportOptions, import_hf

ROOT = Path(__file__).resolve().parents[2]
SMALL = ImportOptions(max_shard_size="60KB")


def quiet(line: str) -> None:
    pass


@pytest.fixture
def hf(tmp_path):
    save_model("llama", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf, tmp_path):
    import_hf(hf, tmp_path / "mg", say=quiet)
    return tmp_path / "mg"


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refuse_import(folder, message: str) -> None:
    output = folder.parent / "refused"
    with pytest.raises((ConversionError, FileNotFoundError), match=message):
        import_hf(folder, output, say=quiet)
    assert not output.exists()
    assert not output.with_name("refused.partial").exists()


def test_missing_key(hf):
    change_weights(hf, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refuse_import(hf, r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight")


def test_unused_key(hf):
    change_weights(hf, lambda weights: weights.update({"model.adapter": torch.ones(2)}))
    refuse_import(hf, r"1 tensors have no place in the model: model\.adapter")


def test_extra_layer(hf):
    change_config(hf, num_hidden_layers=1)
    refuse_import(hf, r"9 tensors have no place.*model\.layers\.1\.")


def test_wrong_vocabulary(hf):
    change_config(hf, vocab_size=130)
    refuse_import(hf, r"model\.embed_tokens\.weight has shape \[131, 64\], expected \[130, 64\]")


def test_truncated_shard(hf):
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse_import(hf, r"model\.safetensors: expected \d+ bytes by its header, found \d+: truncated")


def test_index_that_names_a_missing_file(hf):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse_import(hf, r"names \['model-00001-of-00002\.safetensors'\]: no such files")


@pytest.fixture
def sharded(tmp_path):
    """A folder of several shards with their index."""
    save_model("llama", tmp_path / "one").save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert (tmp_path / "hf" / INDEX).is_file()
    return tmp_path / "hf"


def shards_of(folder) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_shard_that_the_index_does_not_list(sharded):
    extra = sharded / "model-00099-of-00099.safetensors"
    save_file({"model.adapter": torch.ones(2)}, extra)
    refuse_import(
        sharded, r"found model-00099-of-00099\.safetensors beside .*it does not list them"
    )


def test_shards_beside_a_whole_file_without_index(hf):
    save_file({"model.norm.weight": torch.ones(64)}, hf / "model-00001-of-00002.safetensors")
    refuse_import(hf, r"found model-00001-of-00002\.safetensors beside model\.safetensors.*absent")


def test_copies_in_another_layout_are_passed_over(hf, tmp_path):
    """As consolidated.safetensors in folders of the hub."""
    save_file({"layers.0.weight": torch.ones(2)}, hf / "consolidated.safetensors")
    assert import_hf(hf, tmp_path / "mg", say=quiet).differing == ()


def test_tensor_in_two_shards(sharded):
    first, second = shards_of(sharded)[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second)
    where = f"such as {name} in {first.name} and in {second.name}"
    refuse_import(sharded, "1 tensors lie in two files, " + re.escape(where))


def test_tensor_in_another_shard_than_the_index_says(sharded):
    first, second = shards_of(sharded)[:2]
    moved = load_file(first)
    name = next(iter(moved))
    save_file(load_file(second) | {name: moved.pop(name)}, second)
    save_file(moved, first)
    where = f"such as {name}: expected {first.name}, found {second.name}"
    refuse_import(sharded, "1 tensors are in other files than .*" + re.escape(where))


def test_tied_weights_that_differ(hf):
    change_config(hf, tie_word_embeddings=True)
    refuse_import(hf, r"lm_head\.weight differs from model\.embed_tokens\.weight")


def test_more_layers_in_the_folder_than_in_its_config(hf):
    def add_a_layer(weights):
        for name in [name for name in weights if ".layers.1." in name]:
            weights[name.replace(".1.", ".2.")] = weights[name].clone()

    change_weights(hf, add_a_layer)
    refuse_import(hf, r"9 tensors have no place in the model: model\.layers\.2\.")


@pytest.mark.parametrize("has_script", [True, False], ids=["script", "auto_map-alone"])
@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_refused_and_never_runs(hf, tmp_path, config, has_script):
    script, mark = hf / "own.py", tmp_path / "it_ran"
    script.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    file = hf / config
    known = json.loads(file.read_text()) if file.is_file() else {}
    auto_map = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    file.write_text(json.dumps(known | {"auto_map": auto_map}))
    if not has_script:
        script.rename(tmp_path / "own.py")
    found = f"{'own.py, ' * has_script}auto_map in {config}"
    refuse_import(hf, rf"found {re.escape(found)}; a model with code")
    assert not mark.exists()
    runpy.run_path(str(script if has_script else tmp_path / "own.py"))
    assert mark.exists()


def test_code_of_a_reference_folder_never_runs(hf, megatron, tmp_path):
    mark = tmp_path / "it_ran"
    (hf / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    change_config(hf, auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(ConversionError, match=r"found own\.py, auto_map in config\.json"):
        export_hf(megatron, tmp_path / "out", ExportOptions(reference=str(hf)), say=quiet)
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "attention_bias False with mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'.*supported: silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        ("mistral", {"sliding_window": 16}, "sliding_window 16 below max_position_embeddings 48"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32 .expected 64"),
    ],
)
def test_unsupported_settings(tmp_path, name, changes, message):
    save_model(name, tmp_path / "hf")
    change_config(tmp_path / "hf", **changes)
    refuse_import(tmp_path / "hf", message)


def test_unknown_architecture(tmp_path):
    from transformers import GPTNeoXConfig

    GPTNeoXConfig().save_pretrained(tmp_path / "hf")
    save_file({"a": torch.ones(1)}, tmp_path / "hf" / "model.safetensors")
    refuse_import(tmp_path / "hf", "model_type 'gpt_neox' is not supported; expected one of llama")


def test_output_that_is_not_empty(hf, tmp_path):
    output = tmp_path / "taken"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--output .*--overwrite"):
        import_hf(hf, output, say=quiet)
    assert [entry.name for entry in output.iterdir()] == ["mine.txt"]
    import_hf(hf, output, ImportOptions(overwrite=True), say=quiet)
    assert not (output / "mine.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(vocab_size=300), r"has shape \[256, 64\], expected \[300, 64\] or more"),
        (ExportOptions(model_type="qwen3"), "as qwen3: found qk_layernorm False"),
        (ExportOptions(model_type="gpt2"), "as gpt2: found activation 'swiglu'"),
        (ExportOptions(iteration=7), "no folder iter_0000007"),
    ],
)
def test_export_refuses_by_name(megatron, tmp_path, options, message):
    with pytest.raises((ConversionError, FileNotFoundError), match=message):
        export_hf(megatron, tmp_path / "out", options, say=quiet)
    assert not (tmp_path / "out").exists()


def test_checkpoint_with_other_layers_than_its_arguments(hf, tmp_path):
    """Arguments of a shallower model over the tensors of a deeper one."""
    import_hf(hf, tmp_path / "deep", say=quiet)
    save_model("llama", tmp_path / "hf1", num_hidden_layers=1)
    import_hf(tmp_path / "hf1", tmp_path / "shallow", say=quiet)
    mixed = tmp_path / "deep" / "release"
    common = tmp_path / "shallow" / "release" / "__0_1.distcp"
    # Its common state comes first in the file, and the index finds it at the same place.
    shallow, deep = common.read_bytes(), (mixed / "__0_1.distcp").read_bytes()
    (mixed / "__0_1.distcp").write_bytes(shallow.ljust(len(deep), b"\0"))
    with pytest.raises(ConversionError, match="it has 2 layers, the arguments say 1"):
        export_hf(tmp_path / "deep", tmp_path / "out", say=quiet)


def test_damaged_checkpoint_file(megatron, tmp_path):
    file = megatron / "release" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: reading "):
        export_hf(megatron, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_disk_that_is_full(hf, megatron, tmp_path, direction):
    output = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            if direction == "import":
                import_hf(hf, output, say=quiet)
            else:
                export_hf(megatron, output, say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not output.exists()


def test_killed_import_is_resumed(hf, tmp_path):
    """kill -9 between two layers; what was finished is kept, the rest written anew."""
    output = tmp_path / "mg"
    code = f"""
import os, signal
from megatron_emo.conversion.import_hf import ImportOptions, import_hf
def die(line):
    if line.startswith("layer 1/"):
        os.kill(os.getpid(), signal.SIGKILL)
import_hf({str(hf)!r}, {str(output)!r}, ImportOptions(max_shard_size="60KB"), say=die)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    said: list[str] = []
    resumed = ImportOptions(max_shard_size="60KB", resume=True)
    import_hf(hf, output, resumed, say=said.append)
    assert sum("kept from before" in line for line in said) >= 2
    import_hf(hf, tmp_path / "whole", SMALL, say=quiet)
    names = sorted(path.name for path in (tmp_path / "whole" / "release").glob("__*_0.distcp"))
    assert len(names) > 3
    for name in names:
        whole, found = tmp_path / "whole" / "release" / name, output / "release" / name
        assert found.read_bytes() == whole.read_bytes(), name
    assert not output.with_name("mg.partial").exists()


def stop_after_layer_1(line: str) -> None:
    if line.startswith("layer 1/"):
        raise KeyboardInterrupt


def test_export_is_resumed_and_damage_is_noticed(megatron, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export_hf(megatron, output, ExportOptions(max_shard_size="60KB"), say=stop_after_layer_1)
    first = min(output.with_name("out.partial").glob("model-*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    said: list[str] = []
    resumed = ExportOptions(max_shard_size="60KB", resume=True)
    result = export_hf(megatron, output, resumed, say=said.append)
    assert result.differing == ()
    kept = [line for line in said if "kept" in line]
    assert kept and not any(first.name in line for line in kept)


def test_resume_of_another_conversion_is_refused(hf, megatron, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        import_hf(hf, output, SMALL, say=stop_after_layer_1)
    other = ImportOptions(max_shard_size="70KB", resume=True)
    with pytest.raises(ConversionError, match="begun with another max_shard_size"):
        import_hf(hf, output, other, say=quiet)
    import_hf(hf, output, SMALL, say=quiet)  # without --resume it starts again
    assert output.exists()
