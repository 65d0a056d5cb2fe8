"""llama2.c's model and tokenizer files (https://github.com/karpathy/llama2.c) as a Hugging Face
folder: a LlamaForCausalLM in fp32, and the tokenizer of `llama2c_tokenizer`.

The model file, its version 0, is little-endian: seven int32, then fp32 matrices [out, in], those of
all layers together, kind by kind. A negative vocab_size says that an output layer of its own ends
the file. Rotary positions turn neighbouring rows of a head, with base 10000; the tables of sines in
the file are read by nobody.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.llama2c_tokenizer import BOS_ID, EOS_ID, read_vocabulary
from megatron_emo.conversion.plan import Progress
from megatron_emo.conversion.safetensors_io import (
    StoredTensor,
    read_tensor,
    write_header,
    write_tensors,
)
from megatron_emo.conversion.staging import Staging

NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0
_HEADER_BYTES = 28
_MAGIC = 0x616B3432
"""Begins files of version 1 and later."""


@dataclass(frozen=True)
class Header:
    """What a model file says of itself, in its order and under llama2.c's names."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    """Without its sign."""
    seq_len: int
    tied: bool
    """Whether the output layer is the embedding; the sign of vocab_size."""

    def __str__(self) -> str:
        named = [f"{name} {value}" for name, value in vars(self).items() if name != "tied"]
        return ", ".join([*named, "tied" if self.tied else "untied (vocab_size < 0)"])


@dataclass(frozen=True)
class Block:
    """What stands together in a model file: a tensor, or one for each layer."""

    name: str
    """Of the module in LlamaForCausalLM, or in its layer; "" for what is not read."""
    count: int
    """Layers; 0 for a tensor outside of them."""
    shape: tuple[int, ...]
    rotary_heads: int = 0
    """Heads whose rows are rotary pairs."""

    @property
    def num_bytes(self) -> int:
        return 4 * math.prod(self.shape) * max(self.count, 1)


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of LlamaForCausalLM in a model file."""

    name: str
    layer: int | None
    stored: StoredTensor
    rotary_heads: int


class Llama2cModel:
    """Reads a model file, a tensor at a time.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: another format, impossible sizes, or other bytes than the header calls for;
            says where a truncated file ends.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"--checkpoint {path}: no such file")
        self.header = _read_header(self.path)
        _check_size(self.path, self.header)

    @cached_property
    def weights(self) -> list[StoredWeight]:
        """What is stored, layer by layer, under the names of LlamaForCausalLM."""
        found, start = [], _HEADER_BYTES
        for block in _blocks(self.header):
            for layer in range(max(block.count, 1)) if block.name else ():
                place = start + 4 * math.prod(block.shape) * layer
                prefix = f"model.layers.{layer}." if block.count else ""
                found.append(
                    StoredWeight(
                        f"{prefix}{block.name}.weight",
                        layer if block.count else None,
                        StoredTensor(self.path, place, block.shape, "F32"),
                        block.rotary_heads,
                    )
                )
            start += block.num_bytes
        first, *others = found
        layers = [weight for weight in others if weight.layer is not None]
        last = [weight for weight in others if weight.layer is None]
        return [first, *sorted(layers, key=lambda weight: weight.layer), *last]

    def read(self, weight: StoredWeight) -> Tensor:
        """Return one tensor in fp32, its rows in the order of transformers."""
        tensor = read_tensor(weight.stored)
        return split_pairs(tensor, weight.rotary_heads) if weight.rotary_heads else tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of LlamaForCausalLM; without lm_head.weight where it is tied."""
        return {weight.name: self.read(weight) for weight in self.weights}

    def config(self) -> Any:
        """Return the LlamaConfig."""
        from transformers import LlamaConfig

        header = self.header
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=header.vocab_size,
            hidden_size=header.dim,
            intermediate_size=header.hidden_dim,
            num_hidden_layers=header.n_layers,
            num_attention_heads=header.n_heads,
            num_key_value_heads=header.n_kv_heads,
            max_position_embeddings=header.seq_len,
            rms_norm_eps=NORM_EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
            tie_word_embeddings=header.tied,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            dtype=torch.float32,
        )


def convert_llama2c(
    checkpoint: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write `output`, a folder that transformers and `import_hf` read; it appears whole or not.

    generation_config.json ends a text at <s>, with which the next story begins, as `run` does.

    Raises:
        FileNotFoundError, FileExistsError, ConversionError: what was found, and where; nothing has
            been written then.
    """
    from transformers import GenerationConfig

    model = Llama2cModel(checkpoint)
    vocabulary = read_vocabulary(tokenizer, model.header.vocab_size)
    fast = vocabulary.tokenizer(model.header.seq_len)
    staging = Staging(Path(output), {"task": "llama2c"}, resume=False, overwrite=overwrite)
    say(f"{checkpoint} -> {output}: {model.header}")

    def write(stream: BinaryIO) -> None:
        entries = {weight.name: (torch.float32, weight.stored.shape) for weight in model.weights}
        write_header(stream, entries, {"format": "pt"})
        progress = Progress([weight.layer for weight in model.weights], say)
        for weight in model.weights:
            tensor = model.read(weight)
            write_tensors(stream, [tensor])
            progress.add(weight.layer, tensor.nbytes)
        progress.end()

    staging.write("model.safetensors", write)
    model.config().save_pretrained(staging.folder)
    # As the padding too, or transformers would say at every text that it takes the end for it.
    generation = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=BOS_ID, pad_token_id=BOS_ID)
    generation.save_pretrained(staging.folder)
    fast.save_pretrained(staging.folder)
    staging.publish()


def split_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Return rows [heads * size, in], of which in each head i and i + size / 2 turn together.

    In `weight` 2i and 2i + 1 do.
    """
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _read_header(path: Path) -> Header:
    with open(path, "rb") as stream:
        data = stream.read(_HEADER_BYTES)
    if len(data) < _HEADER_BYTES:
        raise ConversionError(
            f"--checkpoint {path}: found {len(data)} bytes, expected a header of {_HEADER_BYTES}"
        )
    *sizes, vocab_size, seq_len = struct.unpack("<7i", data)
    if sizes[0] == _MAGIC:
        raise ConversionError(
            f"--checkpoint {path}: found a header of version {sizes[1]}, expected version 0 "
            "(llama2.c's export.py --version 0)"
        )
    header = Header(*sizes, abs(vocab_size), seq_len, tied=vocab_size > 0)
    if min(*sizes, header.vocab_size, seq_len) < 1:
        raise ConversionError(f"--checkpoint {path}: found {header}, expected sizes from 1 on")
    if header.dim % (2 * header.n_heads) or header.n_heads % header.n_kv_heads:
        raise ConversionError(
            f"--checkpoint {path}: found {header}, expected dim to be a multiple of 2 n_heads and "
            "n_heads of n_kv_heads"
        )
    return header


def _check_size(path: Path, header: Header) -> None:
    found, end = path.stat().st_size, _HEADER_BYTES
    where = None
    for block in _blocks(header):
        end += block.num_bytes
        if where is None and found < end:
            where = f"it ends in {block.name or 'the rotary tables'}"
    if found == end:
        return
    other = replace(header, tied=not header.tied)
    if found == _HEADER_BYTES + sum(block.num_bytes for block in _blocks(other)):
        where = f"right for {'tied' if other.tied else 'untied'}: vocab_size has the wrong sign"
    raise ConversionError(
        f"--checkpoint {path}: found {found} bytes, expected {end} for {header}: "
        f"{where or f'{found - end} too many'}"
    )


def _blocks(header: Header) -> list[Block]:
    """Return what a model file holds behind its header, in its order."""
    dim, ffn, layers = header.dim, header.hidden_dim, header.n_layers
    head = dim // header.n_heads
    kv_dim = header.n_kv_heads * head
    embedding, table = (header.vocab_size, dim), (header.seq_len, head // 2)
    blocks = [
        Block("model.embed_tokens", 0, embedding),
        Block("input_layernorm", layers, (dim,)),
        Block("self_attn.q_proj", layers, (dim, dim), header.n_heads),
        Block("self_attn.k_proj", layers, (kv_dim, dim), header.n_kv_heads),
        Block("self_attn.v_proj", layers, (kv_dim, dim)),
        Block("self_attn.o_proj", layers, (dim, dim)),
        Block("post_attention_layernorm", layers, (dim,)),
        Block("mlp.gate_proj", layers, (ffn, dim)),
        Block("mlp.down_proj", layers, (dim, ffn)),
        Block("mlp.up_proj", layers, (ffn, dim)),
        Block("model.norm", 0, (dim,)),
        Block("", 0, table),
        Block("", 0, table),
    ]
    return blocks if header.tied else [*blocks, Block("lm_head", 0, embedding)]
