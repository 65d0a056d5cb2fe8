"""model.safetensors.index.json of a folder of shards."""

import json
from pathlib import Path

import torch
from guard import Parser
from safetensors.torch import save

from megatron_emo.conversion.hf import INDEX, HFFolder
from megatron_emo.cost_embedding.sources import _tensor_files

CONFIG = json.dumps({"model_type": "llama", "vocab_size": 4})
SHARD = "model-00001-of-00001.safetensors"


def parse(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / SHARD).write_bytes(save({"lm_head.weight": torch.ones(4, 2)}))
    (folder / INDEX).write_bytes(data)
    for file in _tensor_files(folder).values():
        assert file.parent == folder
    found = HFFolder(folder)
    for name in found.tensors:
        found.read(name)


def seeds() -> list[bytes]:
    content = {"metadata": {"total_size": 32}, "weight_map": {"lm_head.weight": SHARD}}
    return [json.dumps(content).encode()]


PARSER = Parser(
    parse,
    seeds,
    (
        b'"../x"',
        b'"/etc/passwd"',
        b'"\\u0000"',
        b"null",
        b"[]",
        b"{}",
        b'".."',
        b'"weight_map":',
        b"[" * 2000,
    ),
)
