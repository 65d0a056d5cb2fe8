"""The tensors of a torch_dist checkpoint by the items of a table of rules, and what covers what.

Megatron's keys come stacked over layers (and experts) or one at a time, with or without a wrapper's
prefix, with layer norms named by the linear layer they are fused into or by their own module, and
with gated layers whole or in their two halves. Objects under keys that end in _extra_state, where
Transformer Engine keeps FP8 scales, belong to the run's kernels; they are not read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
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
from megatron_emo.conversion.master_weights import MasterWeights
from megatron_emo.conversion.settings import ModelSettings
from megatron_emo.torch_dist import TensorReader, read_arguments

PREFIXES = ("", "model.", "module.", "model.module.")
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|.*_extra_state|rng_state|rerun_state")
_OTHER_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_EXPERTS = ".experts.experts."
_HALVES = ("_w", "_v")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


Parts = tuple[tuple[str, tuple[int, ...]], ...]
"""Keys, and indices into them, of what makes a tensor when it is joined along its rows."""


class MegatronWeights:
    """Reads a checkpoint's tensors without vocabulary padding.

    The optimizer's fp32 master copy (see `master_weights`) stands in for a tensor that is stored
    - narrower than `dtype`,
    - by a run that keeps its weights in FP8 or FP4 (--fp8-param-gather, --fp4-param-gather), whose
      checkpoints hold in bf16 what these are worth,
    - in FP8 itself, as other tools write it; then the copy has to have the tensor's name.
    Without a copy the tensor is as it is stored, but FP8 is refused.

    Args:
        dtype: what the tensors are wanted in, if it matters: fp32 asks for the master copies.
        masters: False reads every tensor as it is stored.

    Raises:
        ConversionError: a tensor that is missing, left over, or of another shape or dtype than the
            settings say; all of it looked up in the index, before any tensor is read.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[Item],
        settings: ModelSettings,
        dtype: torch.dtype | None = None,
        *,
        masters: bool = True,
    ) -> None:
        self.folder, self.settings = folder, settings
        self._wanted = dtype
        self._reader = TensorReader(folder)
        self._masters = MasterWeights(folder) if masters else None
        values = vars(read_arguments(folder) or argparse.Namespace())
        self.is_quantised_run = any(values.get(f"fp{bits}_param_gather") for bits in (8, 4))
        """Whether what the run keeps and computes with are FP8 or FP4 copies of the masters."""
        self._weights = {
            key: shape for key, shape in self._reader.shapes.items() if not _NOT_WEIGHTS.match(key)
        }
        self._prefix = next((p for p in PREFIXES if p + EMBEDDING in self._weights), "")
        self._places = self._find_all(items)
        self._check_tied()

    def dtype(self, item: Item) -> torch.dtype:
        """Return the dtype in which the run held the tensor; of FP8, what stands around it."""
        stored = self._reader.dtypes[self._places[item][0][0]]
        return stored if stored in _FLOATS else self._reader.dtypes[self._prefix + EMBEDDING]

    def read(self, item: Item) -> Tensor:
        """Return the tensor of an item as its rule's `to_hf` takes it, stored or fp32 from master.

        Raises:
            ValueError: pieces that are damaged, absent or do not cover it.
        """
        parts = [self._read_part(*part) for part in self._places[item]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if item.rule.megatron in PADDED_KEYS:
            tensor = tensor[: self.settings.vocab_size]
        if not item.rule.leading_rows:
            return tensor
        kept = self._places[item][0][0] + LEADING_ROWS
        if kept in self._reader.shapes:
            return torch.cat([self._reader.read(kept), tensor])
        return torch.cat([tensor.new_zeros(item.rule.leading_rows, *tensor.shape[1:]), tensor])

    def origin(self) -> str:
        """Return a line on where the tensors come from, "" where stored ones were all that counts.

        Asks for every tensor whether it has a master, which reads them all where they lie in
        buckets; after all have been read it costs nothing.
        """
        parts = [part for parts in self._places.values() for part in parts]
        if not any(self._asks_for_master(key) for key, _ in parts):
            return ""
        if self._masters is None:
            return "all tensors as stored: this engine does not read the optimizer's masters"
        count = sum(
            all(self._is_from_master(*part) for part in parts) for parts in self._places.values()
        )
        line = f"{count} of {len(self._places)} tensors from the optimizer's fp32 master weights"
        if count == len(self._places):
            return line
        if count == 0 and not self._masters.are_in_buckets:
            return f"{line}, which the checkpoint does not have; all as stored"
        hint = "; saved with --dist-ckpt-optim-fully-reshardable all have names"
        return f"{line}, the others as stored{hint if self._masters.are_in_buckets else ''}"

    def _read_part(self, key: str, index: tuple[int, ...]) -> Tensor:
        if self._masters is not None and self._is_from_master(key, index):
            return self._masters.read(key, index)
        return self._reader.read(key, index)

    def _is_from_master(self, key: str, index: tuple[int, ...]) -> bool:
        return (
            self._masters is not None
            and self._asks_for_master(key)
            and self._masters.has(key, index, is_quantised=self.is_quantised_run)
        )

    def _asks_for_master(self, key: str) -> bool:
        stored = self._reader.dtypes[key]
        is_narrow = self._wanted is not None and self._wanted.itemsize > stored.itemsize
        return is_narrow or self.is_quantised_run or stored not in _FLOATS

    def _find_all(self, items: Sequence[Item]) -> dict[Item, Parts]:
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
        used = {key for parts in places.values() for key, _ in parts}
        used |= {self._prefix + OUTPUT} if self.settings.tied else set()
        unused = sorted(set(self._weights) - used)
        if unused:
            raise ConversionError(
                f"checkpoint {self.folder}: {len(unused)} tensors have no place in "
                f"{self.settings.model_type} with these settings: {shorten(unused)}"
            )
        for item, parts in places.items():
            for key, index in parts:
                self._check_shape(item, key, index, len(parts))
        return places

    def _find(self, item: Item) -> Parts | None:
        stems = [item.rule.megatron]
        for fused, plain in _OTHER_NAMES.items():
            stems += [stem.replace(fused, plain) for stem in stems if fused in stem]
            stems += [stem.replace(plain, fused) for stem in stems if plain in stem]
        for stem in dict.fromkeys(stems):
            for key, index in self._candidates(self._prefix + stem, item):
                if key in self._weights:
                    return ((key, index),)
                if all(key + half in self._weights for half in _HALVES):
                    return tuple((key + half, index) for half in _HALVES)
        return None

    def _candidates(self, key: str, item: Item) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Stacked over layers and experts, a layer at a time, and an expert at a time."""
        yield key, item.index
        if item.layer is None:
            return
        single = key.replace(LAYERS, f"{LAYERS}{item.layer}.", 1)
        yield single, item.index[1:]
        if item.expert is not None:
            yield single.replace(_EXPERTS, f"{_EXPERTS}{item.expert}.", 1), ()

    def _check_shape(self, item: Item, key: str, index: tuple[int, ...], num_parts: int) -> None:
        stack = item.stack(self.settings)
        stack = stack[len(stack) - len(index) :]
        rows, *columns = item.megatron_shape(self.settings)
        expected = (*stack, rows // num_parts, *columns)
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
        has_master = self._masters is not None and self._masters.has_named(key)
        if self._reader.dtypes[key] not in _FLOATS and not has_master:
            raise ConversionError(
                f"checkpoint {self.folder}: {key} has dtype {self._reader.dtypes[key]}, expected "
                "fp64, fp32, fp16 or bf16, or its fp32 master weight beside it: quantised weights "
                "are not converted"
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
