"""Whether a checkpoint and a Hugging Face folder hold the same weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.hf import HFFolder
from megatron_emo.conversion.mapping import Item
from megatron_emo.conversion.megatron_weights import MegatronWeights, shorten
from megatron_emo.conversion.settings import ModelSettings


@dataclass(frozen=True)
class WeightComparison:
    """What was compared."""

    num_tensors: int
    num_parameters: int
    differing: tuple[str, ...]
    """Names of the Hugging Face tensors that differ."""
    max_difference: float
    """The largest between two numbers, 0.0 where all are the same."""

    def __str__(self) -> str:
        verdict = "all equal"
        if self.differing:
            verdict = (
                f"{len(self.differing)} differ by up to {self.max_difference:.3g}: "
                f"{shorten(self.differing)}"
            )
        return f"weights: {self.num_tensors} tensors, {self.num_parameters:,} parameters, {verdict}"


def compare_weights(
    weights: MegatronWeights, folder: HFFolder, items: Sequence[Item]
) -> WeightComparison:
    """Compare every tensor; where dtypes differ, one has to be the other rounded."""
    check_coverage(folder, items, weights.settings)
    num_tensors, num_parameters, largest, differing = 0, 0, 0.0, []
    for item in items:
        tensors = item.rule.transform.to_hf(weights.read(item), weights.settings)
        for name, ours in zip(item.hf_names, tensors, strict=True):
            difference = _difference(ours, folder.read(name))
            num_tensors, num_parameters = num_tensors + 1, num_parameters + ours.numel()
            if difference != 0.0:
                differing.append(name)
                largest = max(largest, difference)
    return WeightComparison(num_tensors, num_parameters, tuple(differing), largest)


def check_coverage(folder: HFFolder, items: Sequence[Item], settings: ModelSettings) -> None:
    """Check that a folder has what the items name, in their shapes, and nothing else.

    Raises:
        ConversionError: naming the tensors.
    """
    expected = {
        name: shape
        for item in items
        for name, shape in zip(item.hf_names, item.hf_shapes(settings), strict=True)
    }
    found = folder.tensors
    missing = sorted(set(expected) - set(found))
    unused = sorted(set(found) - set(expected))
    if settings.tied and "lm_head.weight" in unused:
        unused.remove("lm_head.weight")
        _check_tied(folder, items[0])
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {shorten(missing)}")
    if unused:
        problems.append(f"{len(unused)} tensors have no place in the model: {shorten(unused)}")
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(shape)} by config.json"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ][:6]
    if problems:
        raise ConversionError(f"--hf {folder.path}: {'; '.join(problems)}")


def _check_tied(folder: HFFolder, embedding: Item) -> None:
    (name,) = embedding.hf_names
    if not torch.equal(folder.read("lm_head.weight"), folder.read(name)):
        raise ConversionError(
            f"--hf {folder.path}: lm_head.weight differs from {name} though config.json has "
            "tie_word_embeddings true"
        )


def _difference(first: Tensor, second: Tensor) -> float:
    """0.0 where one is the other, rounded to its dtype."""
    if torch.equal(first.to(second.dtype), second) or torch.equal(first, second.to(first.dtype)):
        return 0.0
    difference = (first.double() - second.double()).abs().max().item()
    return difference if difference > 0 else float("inf")
