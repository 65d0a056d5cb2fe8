"""Hugging Face folders bring no code: what is written has none, what is read is refused with it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import save_model

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import ExportOptions, export_hf
from megatron_emo.conversion.hf import HFFolder
from megatron_emo.conversion.import_hf import import_hf
from megatron_emo.cost_embedding.sources import table_from_hf
from megatron_emo.foreign_files import code_keys

CODE = [
    {"auto_map": {"AutoConfig": "own.Own"}},
    {"auto_map": None},
    {"text_config": {"auto_map": {}}},
    {"more": [{"deep": {"custom_pipelines": {"x": {"impl": "own.Own"}}}}]},
    {"_attn_implementation_internal": "someone/kernel"},
    {"_attn_implementation": "someone/kernel"},
    {"attn_implementation": {"text_config": "someone/kernel@main:name"}},
    {"_experts_implementation": "someone/kernel"},
]
HARMLESS = [
    {"_attn_implementation": "eager"},
    {"attn_implementation": "flash_attention_2"},
    {"_name_or_path": "someone/model"},
    {"architectures": ["LlamaForCausalLM"]},
]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder and its Megatron checkpoint."""
    root = tmp_path_factory.mktemp("model")
    save_model("llama", root / "hf")
    import_hf(root / "hf", root / "mg", say=quiet)
    return root / "hf", root / "mg"


def changed(folder: Path, target: Path, values: dict) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        os.link(file, target / file.name)
    (target / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


@pytest.mark.parametrize("values", CODE, ids=json.dumps)
def test_configs_with_code_are_refused_wherever_a_folder_is_read(folders, tmp_path, values):
    from megatron_emo.evaluation.models import load_model

    folder = changed(folders[0], tmp_path / "hf", values)
    for read in (HFFolder, table_from_hf, lambda path: load_model(path)):
        with pytest.raises(ValueError, match=r"found \w+ in config\.json"):
            read(folder)


@pytest.mark.parametrize("values", HARMLESS, ids=json.dumps)
def test_other_settings_are_no_code(values):
    assert code_keys(values) == []


def test_arguments_of_a_checkpoint_bring_no_code_into_an_export(folders, tmp_path, monkeypatch):
    """Its hf_config, which an import stored, goes into the config.json that is written."""
    from megatron_emo.conversion import export_hf as module

    def hostile(folder: Path) -> argparse.Namespace:
        args = read_arguments(folder)
        args.hf_config = {**args.hf_config, "_attn_implementation_internal": "someone/kernel"}
        return args

    read_arguments = module.read_arguments
    monkeypatch.setattr(module, "read_arguments", hostile)
    with pytest.raises(ConversionError, match="hf_config names _attn_implementation_internal"):
        export_hf(folders[1], tmp_path / "out", ExportOptions(verify=False), say=quiet)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_read(folders, tmp_path):
    folder = changed(folders[0], tmp_path / "hf", {})
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for read in (lambda: HFFolder(folder).tensors, lambda: table_from_hf(folder)):
        with pytest.raises(FileNotFoundError, match="pickles"):
            read()


def test_an_export_has_data_alone_and_loads_without_network(folders, tmp_path):
    out = tmp_path / "out"
    export_hf(folders[1], out, say=quiet)
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".model", ".txt", ".jinja"}
    assert not list(out.rglob("*.py")) and HFFolder(out).config.model_type == "llama"
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise OSError('no network here')\n"
        "socket.socket.connect = refuse\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False, "
        "use_safetensors=True, local_files_only=True)\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-W", "ignore", "-c", code, str(out)]
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and int(result.stdout) == 78528, result.stderr
