"""A Hugging Face model folder: its config, and its tensors one at a time. No code of it runs."""

from __future__ import annotations

import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.safetensors_io import DTYPES, StoredTensor, read_header, read_tensor
from megatron_emo.foreign_files import (
    code_in_folder,
    file_inside,
    read_weight_map,
    refuse_links_out,
)

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of buffers that older transformers stored; .attn.bias is GPT-2's mask."""
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
"""What transformers would load, unlike the copies in other layouts that folders of the hub have."""


class HFFolder:
    """Reads a folder with config.json and safetensors files.

    Raises:
        FileNotFoundError: no such folder, config.json or weights.
        ConversionError: code in the folder, which is not run; a damaged or truncated file; shards
            that the index does not list, or that hold other tensors than it says.
        ValueError: JSON that is none, names and links that lead out of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"--hf {self.path}: expected a folder with config.json")
        self._refuse_code()

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # each config class has its own way to fail
            raise ConversionError(
                f"--hf {self.path}: config.json: transformers cannot read it: {error}"
            ) from error

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What is stored, under the names of a model with its head: a folder saved from the body
        alone leaves out the body's prefix."""
        found: dict[str, StoredTensor] = {}
        for file in self._files():
            header = read_header(file)
            twice = sorted(set(found) & set(header))
            if twice:
                raise ConversionError(
                    f"--hf {self.path}: {len(twice)} tensors lie in two files, such as {twice[0]} "
                    f"in {found[twice[0]].file.name} and in {file.name}; expected each in one"
                )
            found |= header
        self._compare_with_index(found)
        found = {name: entry for name, entry in found.items() if not name.endswith(_IGNORED)}
        prefix = {"gpt2": "transformer."}.get(self.config.model_type, "model.")
        if any(name.startswith(prefix) for name in found):
            return found
        return {
            name if name.startswith("lm_head.") else prefix + name: entry
            for name, entry in found.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype.

        Raises:
            ConversionError: a dtype that is not a plain float.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ConversionError(
                f"{stored.file}: {name} has dtype {stored.dtype}, expected one of "
                f"{', '.join(DTYPES)}: quantised weights are not converted"
            )
        return read_tensor(stored)

    def _files(self) -> list[Path]:
        index, single = self.path / INDEX, self.path / "model.safetensors"
        if index.is_file():
            names = sorted(set(self._weight_map().values()))
            files = [file_inside(self.path, name, index) for name in names]
        elif single.is_file():
            files = [file_inside(self.path, single.name, self.path)]
        else:
            pickles = sorted(entry.name for entry in self.path.glob("pytorch_model*.bin"))
            hint = f"found {pickles}, which are pickles and not read" if pickles else "found none"
            raise FileNotFoundError(
                f"--hf {self.path}: expected model.safetensors or {INDEX}, {hint}"
            )
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"--hf {self.path}: {INDEX} names {absent}: no such files")
        self._refuse_unlisted(files)
        return files

    def _refuse_unlisted(self, files: list[Path]) -> None:
        listed = {file.name for file in files}
        shards = {entry.name for entry in self.path.iterdir() if _SHARD.fullmatch(entry.name)}
        unlisted = sorted(shards - listed)
        if unlisted:
            state = "does not list them" if (self.path / INDEX).is_file() else "is absent"
            raise ConversionError(
                f"--hf {self.path}: found {', '.join(unlisted)} beside "
                f"{', '.join(sorted(listed))}; expected {INDEX} to list every shard, it {state}"
            )

    def _weight_map(self) -> dict[str, str]:
        return read_weight_map(self.path / INDEX)

    def _compare_with_index(self, found: dict[str, StoredTensor]) -> None:
        if not (self.path / INDEX).is_file():
            return
        listed = self._weight_map()
        absent = sorted(set(listed) - set(found))
        if absent:
            raise ConversionError(
                f"--hf {self.path}: {INDEX} names {len(absent)} tensors that no file holds, "
                f"such as {absent[:3]}"
            )
        places = {name: entry.file.name for name, entry in found.items()}
        elsewhere = sorted(name for name, file in places.items() if listed.get(name) != file)
        if elsewhere:
            name = elsewhere[0]
            raise ConversionError(
                f"--hf {self.path}: {len(elsewhere)} tensors are in other files than {INDEX} "
                f"says, such as {name}: expected {listed.get(name, 'none')}, found {places[name]}"
            )

    def _refuse_code(self) -> None:
        scripts = code_in_folder(self.path)
        if scripts:
            raise ConversionError(
                f"--hf {self.path}: found {', '.join(scripts)}; a model with code of its own is "
                "not converted, and its code is not run"
            )


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files from folder to folder and return their names.

    Raises:
        ValueError: one that is a link to a file elsewhere, which would be published.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    refuse_links_out(source, tuple(names))
    if names:
        target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
