"""From a model's size to its layers, batch, learning rate and schedule: formulas, or a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_emo.scaling.counts.shape import ModelShape

DECAY_STYLES = ("WSD", "cosine", "linear", "constant")
"""Of Megatron's --lr-decay-style; a WSD decay is linear."""


_ANY = 1e12
_RECIPE_RANGES = {
    **dict.fromkeys(("head_size", "heads_per_group", "ffn_multiple"), (1, 10**6)),
    **dict.fromkeys(("steps", "batch", "min_batch", "max_batch"), (1, 10**9)),
    **dict.fromkeys(("warmup", "decay", "min_lr_ratio", "weight_decay"), (0, 1)),
    **dict.fromkeys(("beta1", "beta2"), (0, 1 - 1e-9)),
    **dict.fromkeys(("lr_batch_power", "lr_hidden_power", "lr_horizon"), (-8, 8)),
    **dict.fromkeys(("layer_ratio", "layer_log", "layer_offset"), (-_ANY, _ANY)),
    **dict.fromkeys(("lr_constant", "lr_max", "lr_horizon_tokens"), (1e-12, 1e18)),
    "ffn_ratio": (1e-3, 1e3),
    "beta2_batch": (1e-3, _ANY),
    "clip_grad": (0, _ANY),
}


def check_ranges(where: str, settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError of a field outside its range, None being within."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{where}.{name}: expected {low:g} to {high:g}, got {value}")


@dataclass(frozen=True)
class SizeEntry:
    """One size of a table; what is None follows from the recipe's formulas."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    query_groups: int | None = None
    batch: int | None = None
    """Sequences."""
    steps: int | None = None
    """To choose the batch by, where `batch` is None."""
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("batch", "steps"), (1, 10**9)) | {"learning_rate": (1e-12, 1e6)}
        check_ranges("recipe.table", self, ranges)


@dataclass(frozen=True)
class Recipe:
    """Formulas of a family of runs; h is the hidden size, B sequences a step, T tokens of a run."""

    bundle: str = "marin"
    head_size: int = 128
    """heads = h / head_size, at least 1."""
    heads_per_group: int = 1
    """Of grouped-query attention."""
    ffn_ratio: float = 4.0
    ffn_multiple: int = 1
    """ffn = ffn_ratio h, rounded to a multiple of this."""
    layer_ratio: float = 64.0
    layer_log: float = 4.0
    layer_offset: float = 9.0
    """layers = h / (layer_ratio + layer_log log2 h - layer_offset), rounded."""
    steps: int = 65536
    """The batch is the power of two that comes to about as many steps."""
    batch: int | None = None
    """Sequences, instead of that."""
    min_batch: int = 8
    max_batch: int = 8192
    lr_constant: float = 0.33
    lr_batch_power: float = 0.5
    lr_hidden_power: float = -1.0
    lr_horizon: float = 0.0
    """Exponent of (lr_horizon_tokens / T); 0: the learning rate does not know the horizon."""
    lr_horizon_tokens: float = 1e9
    lr_max: float = 0.01
    """A batch that would need more is halved."""
    beta1: float = 0.95
    beta2: float = 0.98
    beta2_batch: float | None = 128.0
    """beta2 ** (B / beta2_batch), or None: beta2 itself."""
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    warmup: float = 0.1
    """Share of the steps."""
    decay_style: str = "WSD"
    decay: float = 0.2
    """Share of the steps in which WSD falls."""
    min_lr_ratio: float = 0.0
    table: Mapping[str, SizeEntry] = field(default_factory=dict)
    """Sizes by name, instead of the formulas."""

    def __post_init__(self) -> None:
        if self.decay_style not in DECAY_STYLES:
            raise ValueError(
                f"recipe.decay_style: expected one of {DECAY_STYLES}, got {self.decay_style!r}"
            )
        check_ranges("recipe", self, _RECIPE_RANGES)

    def entry(self, size: int | str) -> SizeEntry:
        """Return layers, heads and the rest of a size: a name of the table, or a hidden size.

        Raises:
            ValueError: a name that the table does not have, or a hidden size below 1.
        """
        if isinstance(size, str):
            if size not in self.table:
                known = ", ".join(self.table) or "none"
                raise ValueError(f"sizes: expected names of recipe.table ({known}), got {size!r}")
            return self.table[size]
        if not 2 <= size <= 10**6:
            raise ValueError(f"sizes: expected hidden sizes from 2 to 1,000,000, got {size}")
        ratio = self.layer_ratio + self.layer_log * math.log2(size) - self.layer_offset
        if not ratio > 0:
            raise ValueError(
                f"recipe.layer_ratio: expected layer_ratio + layer_log log2 h - layer_offset above "
                f"0, got {ratio:g} of hidden size {size}"
            )
        depth = size / ratio
        heads = max(1, size // self.head_size)
        ffn = self.ffn_multiple * max(1, round(self.ffn_ratio * size / self.ffn_multiple))
        groups = None if self.heads_per_group == 1 else max(1, heads // self.heads_per_group)
        return SizeEntry(max(1, round(depth)), size, heads, ffn, groups)

    def learning_rate(self, hidden: int, batch: int, tokens: float) -> float:
        """Return the formula's peak."""
        rate = self.lr_constant * batch**self.lr_batch_power * hidden**self.lr_hidden_power
        return rate * (self.lr_horizon_tokens / tokens) ** self.lr_horizon

    def optimizer(self, entry: SizeEntry, batch: int, steps: int, tokens: int) -> Optimizer:
        """Return all of a run's optimizer and schedule.

        What a formula gives is rounded to 6 digits: another machine's last bit changes no name.
        """
        rate = entry.learning_rate or self.learning_rate(entry.hidden, batch, tokens)
        power = 1.0 if self.beta2_batch is None else batch / self.beta2_batch
        return Optimizer(
            learning_rate=_round(rate),
            min_learning_rate=_round(rate * self.min_lr_ratio),
            beta1=self.beta1,
            beta2=_round(self.beta2**power),
            weight_decay=self.weight_decay,
            clip_grad=self.clip_grad,
            warmup_steps=round(self.warmup * steps),
            decay_style=self.decay_style,
            decay_steps=round(self.decay * steps) if self.decay_style == "WSD" else steps,
        )


def _round(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Optimizer:
    """Adam's settings and schedule, in Megatron's terms."""

    learning_rate: float
    min_learning_rate: float
    beta1: float
    beta2: float
    weight_decay: float
    clip_grad: float
    warmup_steps: int
    decay_style: str
    decay_steps: int
    """WSD: of its fall; others: all."""


BUNDLES = {
    # Marin's IsoFLOP sweeps: lr = .33 sqrt(B) / h, beta2 = .98^(B/128), linear fall over 20%.
    "marin": Recipe(),
    # Chinchilla's schedule: cosine to a tenth over the run's own length, fixed betas.
    "cosine": Recipe(
        bundle="cosine",
        decay_style="cosine",
        min_lr_ratio=0.1,
        warmup=0.01,
        beta1=0.9,
        beta2=0.95,
        beta2_batch=None,
    ),
}
"""Named constants of the formulas; a plan may change each."""


@dataclass(frozen=True)
class ModelSettings:
    """What models of all sizes share; names are Megatron's, defaults a Llama's."""

    vocab_size: int
    """Of the tokenizer, without padding."""
    seq_length: int
    make_vocab_size_divisible_by: int = 128
    swiglu: bool = True
    normalization: str = "RMSNorm"
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = True
    learned_positions: bool = False
    """seq_length of them, instead of rotary ones."""
    num_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_ratio: float | None = None
    """An expert's feed-forward size over the dense one's; None: the same."""

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(
            ("vocab_size", "seq_length", "make_vocab_size_divisible_by", "moe_router_topk"),
            (1, 10**8),
        )
        check_ranges("model", self, ranges | {"moe_ffn_ratio": (1e-3, 1e3)})

    def pad_vocab(self, tensor_parallel: int) -> int:
        """Return Megatron's padded_vocab_size."""
        multiple = self.make_vocab_size_divisible_by * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


def make_shape(entry: SizeEntry, model: ModelSettings, tensor_parallel: int) -> ModelShape:
    """Return the model of a size.

    Raises:
        ValueError: heads that do not divide the hidden size, and the like.
    """
    ffn = None
    if model.moe_ffn_ratio is not None:
        ffn = max(1, round(model.moe_ffn_ratio * entry.ffn))
    return ModelShape(
        num_layers=entry.layers,
        hidden_size=entry.hidden,
        num_attention_heads=entry.heads,
        ffn_hidden_size=entry.ffn,
        padded_vocab_size=model.pad_vocab(tensor_parallel),
        seq_length=model.seq_length,
        num_query_groups=entry.query_groups,
        swiglu=model.swiglu,
        normalization=model.normalization,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        learned_positions=model.seq_length if model.learned_positions else 0,
        num_experts=model.num_experts,
        moe_router_topk=model.moe_router_topk,
        moe_ffn_hidden_size=ffn,
    )
