"""Rules between Megatron's tensors and Hugging Face's: names, shapes, and pure transforms.

One table of rules serves both directions. The shapes of the Hugging Face side are never written
down: they are those of `to_hf` on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_emo.conversion.settings import ModelSettings


@dataclass(frozen=True)
class Transform:
    """A bijection between the tensors of one rule; both functions copy or view, never compute."""

    to_megatron: Callable[[Sequence[Tensor], ModelSettings], Tensor]
    to_hf: Callable[[Tensor, ModelSettings], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that hold the same numbers."""

    megatron: str
    """With decoder.layers. before what each layer has, as in Megatron's stacked keys."""
    hf: tuple[str, ...]
    """With {layer} and {expert} in the names."""
    shape: tuple[str, ...]
    """Names in `ModelSettings.dims`: of one layer, and one expert."""
    transform: Transform
    leading_rows: int = 0
    """That the Hugging Face tensor has before Megatron's, kept under LEADING_ROWS."""

    @property
    def is_layered(self) -> bool:
        return self.megatron.startswith(LAYERS)

    @property
    def is_expert(self) -> bool:
        return ".experts.experts." in self.megatron


@dataclass(frozen=True)
class Item:
    """A rule for one layer and one expert: what is read, transformed and written at a time."""

    rule: Rule
    layer: int | None = None
    expert: int | None = None

    @property
    def hf_names(self) -> list[str]:
        return [name.format(layer=self.layer, expert=self.expert) for name in self.rule.hf]

    @property
    def index(self) -> tuple[int, ...]:
        """Where the tensor lies in Megatron's stacked one: (layer, expert), (layer,) or ()."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)

    def stack(self, settings: ModelSettings) -> tuple[int, ...]:
        """The leading sizes of Megatron's stacked tensor."""
        sizes = (settings.num_layers, settings.num_experts or 0)
        return sizes[: len(self.index)]

    def megatron_shape(self, settings: ModelSettings) -> tuple[int, ...]:
        return tuple(settings.dims[name] for name in self.rule.shape)

    def hf_shapes(self, settings: ModelSettings) -> list[tuple[int, ...]]:
        rows, *columns = self.megatron_shape(settings)
        meta = torch.empty(self.rule.leading_rows + rows, *columns, device="meta")
        return [tuple(tensor.shape) for tensor in self.rule.transform.to_hf(meta, settings)]

    def __str__(self) -> str:
        return self.rule.megatron + "".join(f"[{number}]" for number in self.index)


LAYERS = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
LEADING_ROWS = ".hf_leading_rows._extra_state"
"""After the key of a tensor: rows without use in Megatron, kept so that an export has them. All
readers pass over keys that end in _extra_state."""
PADDED_KEYS = (EMBEDDING, OUTPUT)
"""Megatron pads their rows, and loads them whatever their number of rows is."""


def items_of(rules: Sequence[Rule], settings: ModelSettings) -> Iterator[Item]:
    """Every tensor of the model in the order of the forward pass, layer after layer."""
    first_layered = next(i for i, rule in enumerate(rules) if rule.is_layered)
    last_layered = max(i for i, rule in enumerate(rules) if rule.is_layered)
    yield from (Item(rule) for rule in rules[:first_layered])
    for layer in range(settings.num_layers):
        for rule in rules[first_layered : last_layered + 1]:
            experts = range(settings.num_experts or 0) if rule.is_expert else (None,)
            yield from (Item(rule, layer, expert) for expert in experts)
    yield from (Item(rule) for rule in rules[last_layered + 1 :])


def with_norm_keys(rules: Sequence[Rule], transformer_impl: str) -> list[Rule]:
    """Return the rules under the keys that a checkpoint of `transformer_impl` has.

    The two differ for mixtures of experts alone: there Transformer Engine has no fused layer norm
    before the experts and keeps its module's name, while the local layers are renamed to the fused
    one as everywhere else.
    """
    fused, plain = LAYERS + "mlp.linear_fc1.layer_norm_", LAYERS + "pre_mlp_layernorm."
    if transformer_impl == "local" or not any(rule.is_expert for rule in rules):
        return list(rules)
    return [replace(rule, megatron=rule.megatron.replace(fused, plain)) for rule in rules]


def pad_vocabulary(table: Tensor, rows: int) -> Tensor:
    """Return a table [rows, hidden] that ends in copies of the mean row of [vocab_size, hidden].

    Megatron's softmax counts the padding in. A zero row has logit 0, and in GPT-2, whose logits all
    lie far below, it would take all probability. The logit of the mean row is the mean logit, so
    that by Jensen's inequality the loss grows by at most ln(rows / vocab_size).
    """
    missing = rows - len(table)
    if not missing:
        return table
    mean = table.mean(dim=0, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(missing, -1)])


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _qkv_to_megatron(tensors: Sequence[Tensor], settings: ModelSettings) -> Tensor:
    """[heads d, ...], [groups d, ...], [groups d, ...] -> per group its queries, key and value."""
    groups, rest = settings.num_query_groups, tensors[0].shape[1:]
    parts = [tensor.reshape(groups, -1, *rest) for tensor in tensors]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def _qkv_to_hf(tensor: Tensor, settings: ModelSettings) -> list[Tensor]:
    groups, size, rest = settings.num_query_groups, settings.kv_channels, tensor.shape[1:]
    queries = settings.num_attention_heads // groups * size
    parts = tensor.reshape(groups, -1, *rest).split([queries, size, size], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def _conv_qkv_to_megatron(tensors: Sequence[Tensor], settings: ModelSettings) -> Tensor:
    """GPT-2's [in, q k v] or [q k v]."""
    tensor = _only(tensors)
    return _qkv_to_megatron(tensor.movedim(-1, 0).chunk(3), settings)


def _conv_qkv_to_hf(tensor: Tensor, settings: ModelSettings) -> list[Tensor]:
    return [torch.cat(_qkv_to_hf(tensor, settings)).movedim(0, -1)]


SAME = Transform(lambda tensors, _: _only(tensors), lambda tensor, _: [tensor])
CONV1D = Transform(lambda tensors, _: _only(tensors).t(), lambda tensor, _: [tensor.t()])
QKV = Transform(_qkv_to_megatron, _qkv_to_hf)
CONV1D_QKV = Transform(_conv_qkv_to_megatron, _conv_qkv_to_hf)
GATE_UP = Transform(
    lambda tensors, _: torch.cat(list(tensors)), lambda tensor, _: list(tensor.chunk(2))
)
