"""config.json of a model's folder, and what a conversion makes of it."""

import json
from pathlib import Path

import torch
from guard import Parser
from safetensors.torch import save

from megatron_emo.conversion.architectures import settings_of_config
from megatron_emo.conversion.hf import HFFolder


def parse(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes(save({"lm_head.weight": torch.ones(4, 2)}))
    settings_of_config(HFFolder(folder).config, str(folder))


def seeds() -> list[bytes]:
    llama = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 131}
    return [json.dumps(content).encode() for content in (llama, gpt2)]


PARSER = Parser(
    parse,
    seeds,
    (
        b"null",
        b"-1",
        b"0",
        b"1e999",
        b'"x"',
        b"{}",
        b"[]",
        b'"auto_map":{}',
        b"true",
        b"99999999999",
    ),
)
