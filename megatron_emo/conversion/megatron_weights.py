"""The tensors of a torch_dist checkpoint by the items of a table of rules, and what covers what.

Megatron's keys come stacked over layers or a layer at a time, with or without a wrapper's prefix,
and with layer norms named by the linear layer they are fused into or by their own module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.mapping import (
    EMBEDDING,
    LAYERS,
    LEADING_ROWS,
    OUTPUT,
    PADDED_KEYS,
    Item,
)
from megatron_emo.conversion.settings import ModelSettings
from megatron_emo.torch_dist import TensorReader

PREFIXES = ("", "model.", "module.", "model.module.")
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|.*_extra_state|rng_state|rerun_state")
_OTHER_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class MegatronWeights:
    """Reads a checkpoint's tensors without vocabulary padding.

    Raises:
        ConversionError: a tensor that is missing, left over, or of another shape or dtype than the
            settings say; all of it looked up in the index, before any tensor is read.
    """

    def __init__(self, folder: Path, items: Sequence[Item], settings: ModelSettings) -> None:
        self.folder, self.settings = folder, settings
        self._reader = TensorReader(folder)
        self._weights = {
            key: shape for key, shape in self._reader.shapes.items() if not _NOT_WEIGHTS.match(key)
        }
        self._prefix = next((p for p in PREFIXES if p + EMBEDDING in self._weights), "")
        self._places = self._find_all(items)
        self._check_tied()

    def dtype(self, item: Item) -> torch.dtype:
        """Return the stored dtype."""
        return self._reader.dtypes[self._places[item][0]]

    def read(self, item: Item) -> Tensor:
        """Return the tensor of an item as its rule's `to_hf` takes it, in its stored dtype."""
        tensor = self._reader.read(*self._places[item])
        if item.rule.megatron in PADDED_KEYS:
            tensor = tensor[: self.settings.vocab_size]
        if not item.rule.leading_rows:
            return tensor
        kept = self._places[item][0] + LEADING_ROWS
        if kept in self._reader.shapes:
            return torch.cat([self._reader.read(kept), tensor])
        return torch.cat([tensor.new_zeros(item.rule.leading_rows, *tensor.shape[1:]), tensor])

    def _find_all(self, items: Sequence[Item]) -> dict[Item, tuple[str, tuple[int, ...]]]:
        places, missing = {}, []
        for item in items:
            place = self._find(item)
            if place is None:
                missing.append(str(item))
            else:
                places[item] = place
        if missing:
            raise ConversionError(
                f"checkpoint {self.folder}: {len(missing)} tensors are missing: "
                f"{shorten(missing)}; it holds {shorten(sorted(self._weights))}"
            )
        used = {key for key, _ in places.values()}
        used |= {self._prefix + OUTPUT} if self.settings.tied else set()
        unused = sorted(set(self._weights) - used)
        if unused:
            raise ConversionError(
                f"checkpoint {self.folder}: {len(unused)} tensors have no place in "
                f"{self.settings.model_type} with these settings: {shorten(unused)}"
            )
        for item, (key, index) in places.items():
            self._check_shape(item, key, index)
        return places

    def _find(self, item: Item) -> tuple[str, tuple[int, ...]] | None:
        stems = [item.rule.megatron]
        for fused, plain in _OTHER_NAMES.items():
            stems += [stem.replace(fused, plain) for stem in stems if fused in stem]
            stems += [stem.replace(plain, fused) for stem in stems if plain in stem]
        for stem in dict.fromkeys(stems):
            key = self._prefix + stem
            if key in self._weights:
                return key, item.index
            if item.layer is None:
                continue
            single = key.replace(LAYERS, f"{LAYERS}{item.layer}.", 1)
            if single in self._weights:
                return single, item.index[1:]
        return None

    def _check_shape(self, item: Item, key: str, index: tuple[int, ...]) -> None:
        stack = item.stack(self.settings)
        stack = stack[len(stack) - len(index) :]
        expected = (*stack, *item.megatron_shape(self.settings))
        found = self._weights[key]
        padded = item.rule.megatron in PADDED_KEYS and found[1:] == expected[1:]
        if found != expected and not (padded and found[0] >= expected[0]):
            rows = " or more rows" if item.rule.megatron in PADDED_KEYS else ""
            layers = (
                f": it has {found[0]} layers, the arguments say {stack[0]}"
                if item.layer is not None and index and found[1:] == expected[1:]
                else ""
            )
            raise ConversionError(
                f"checkpoint {self.folder}: {key} has shape {list(found)}, expected "
                f"{list(expected)}{rows}{layers}"
            )
        if self._reader.dtypes[key] not in _FLOATS:
            raise ConversionError(
                f"checkpoint {self.folder}: {key} has dtype {self._reader.dtypes[key]}, expected "
                "fp64, fp32, fp16 or bf16: quantised weights are not converted"
            )

    def _check_tied(self) -> None:
        output = self._prefix + OUTPUT
        if not (self.settings.tied and output in self._weights):
            return
        if not torch.equal(self._reader.read(output), self._reader.read(self._prefix + EMBEDDING)):
            raise ConversionError(
                f"checkpoint {self.folder}: {output} differs from the embedding though "
                "untie_embeddings_and_output_weights is off"
            )


def shorten(names: Sequence[str], limit: int = 6) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
