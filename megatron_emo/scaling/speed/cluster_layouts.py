"""Layouts of a model over ranks: their names, why one cannot be, and all that can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.counts.shape import ModelShape

MOST_MICRO_BATCH = 16
MOST_VIRTUAL = 8


def name_layout(layout: Layout) -> str:
    """Return what tells layouts apart, as tp2_pp1_cp1_dp4_mb1_sp."""
    parts = [
        f"tp{layout.tensor_parallel}",
        f"pp{layout.pipeline_parallel}",
        f"cp{layout.context_parallel}",
        f"dp{layout.data_parallel}",
    ]
    if layout.expert_parallel > 1:
        parts.append(f"ep{layout.expert_parallel}")
    if layout.virtual_pipeline > 1:
        parts.append(f"vp{layout.virtual_pipeline}")
    parts.append(f"mb{layout.micro_batch_size}")
    if layout.tensor_parallel > 1 and layout.sequence_parallel:
        parts.append("sp")
    return "_".join(parts)


@dataclass(frozen=True)
class LayoutRules:
    """What a machine and a step allow."""

    batch: int
    """Sequences of a step."""
    ranks_per_node: int
    is_cpu: bool = False


def count_nodes(gpus: int, ranks_per_node: int) -> int:
    """Return the fewest nodes that have room for so many ranks."""
    return -(-gpus // ranks_per_node)


def find_obstacle(shape: ModelShape, layout: Layout, rules: LayoutRules) -> str:
    """Return why a layout cannot be, naming the setting, or "" where it can."""
    for name, what, whole in (
        ("tensor_parallel", "attention heads", shape.num_attention_heads),
        ("tensor_parallel", "query groups", shape.groups),
        ("tensor_parallel", "ffn", shape.ffn_hidden_size),
        ("tensor_parallel", "padded vocabulary", shape.padded_vocab_size),
        ("pipeline_parallel", "layers", shape.num_layers),
        ("virtual_pipeline", "layers of a rank", shape.num_layers // layout.pipeline_parallel),
        ("expert_parallel", "experts", shape.num_experts or 1),
    ):
        cut = getattr(layout, name)
        if cut > 1 and whole % cut:
            return f"{name} {cut}: expected a divisor of {what} {whole}"
    cp = layout.context_parallel
    if cp > 1 and rules.is_cpu:
        return f"context_parallel {cp}: expected 1 on a CPU"
    if cp > 1 and shape.seq_length % (2 * cp):
        # Each rank has one chunk from the front and one from the back, for causal attention.
        return f"context_parallel {cp}: expected {2 * cp} to divide seq_length {shape.seq_length}"
    return _find_batch_obstacle(shape, layout, rules) or _find_node_obstacle(layout, rules)


def _find_batch_obstacle(shape: ModelShape, layout: Layout, rules: LayoutRules) -> str:
    step = layout.data_parallel * layout.micro_batch_size
    if rules.batch % step:
        return (
            f"batch {rules.batch}: expected a multiple of data_parallel x micro_batch_size = {step}"
        )
    if layout.virtual_pipeline > 1:
        if layout.pipeline_parallel == 1:
            return f"virtual_pipeline {layout.virtual_pipeline}: expected 1 without a pipeline"
        if (rules.batch // step) % layout.pipeline_parallel:
            return (
                f"virtual_pipeline {layout.virtual_pipeline}: expected {rules.batch // step} "
                f"microbatches to be a multiple of pipeline_parallel {layout.pipeline_parallel}"
            )
    has_parts = layout.tensor_parallel > 1 and layout.sequence_parallel
    length = shape.seq_length // layout.context_parallel
    if has_parts and length % layout.tensor_parallel:
        return f"sequence_parallel: expected tensor_parallel to divide {length} tokens"
    if (layout.data_parallel * layout.context_parallel) % layout.expert_parallel:
        return (
            f"expert_parallel {layout.expert_parallel}: expected a divisor of data_parallel x "
            f"context_parallel = {layout.data_parallel * layout.context_parallel}"
        )
    return ""


def _find_node_obstacle(layout: Layout, rules: LayoutRules) -> str:
    nodes = count_nodes(layout.gpus, rules.ranks_per_node)
    here, left = divmod(layout.gpus, nodes)
    if left:
        return (
            f"{layout.gpus} ranks: expected the same number on each of {nodes} nodes of up to "
            f"{rules.ranks_per_node}"
        )
    if here % layout.tensor_parallel:
        return (
            f"tensor_parallel {layout.tensor_parallel}: expected a divisor of {here}, the ranks of "
            f"each of {nodes} nodes"
        )
    return ""


def enumerate_layouts(shape: ModelShape, gpus: int, rules: LayoutRules) -> Iterator[Layout]:
    """Yield all layouts of a model on so many ranks that can be.

    Tensor parallelism stays within a node; micro-batches and context parallelism are powers of two,
    the first to 16; at most 8 virtual stages; sequence parallelism always on GPUs and tried both
    ways on a CPU, where no optimizer is distributed.
    """
    for tp in _divisors(gpus // count_nodes(gpus, rules.ranks_per_node)):
        for pp in _divisors(shape.num_layers):
            for cp in _powers(1 if rules.is_cpu else shape.seq_length // 2):
                if gpus % (tp * pp * cp) == 0:
                    yield from _of_cut(shape, (gpus, tp, pp, cp), rules)


def _of_cut(
    shape: ModelShape, cut: tuple[int, int, int, int], rules: LayoutRules
) -> Iterator[Layout]:
    """Layouts of (gpus, tp, pp, cp)."""
    gpus, tp, pp, cp = cut
    dp = gpus // (tp * pp * cp)
    experts = [e for e in _divisors(shape.num_experts or 1) if (dp * cp) % e == 0]
    virtual = [1]
    if pp > 1:
        virtual = [v for v in _divisors(shape.num_layers // pp) if v <= MOST_VIRTUAL]
    for micro_batch in _powers(min(MOST_MICRO_BATCH, max(1, rules.batch // dp))):
        for ep in experts:
            for vp in virtual:
                for sp in (True, False) if rules.is_cpu and tp > 1 else (True,):
                    layout = Layout(
                        gpus,
                        tp,
                        pp,
                        cp,
                        ep,
                        micro_batch,
                        distributed_optimizer=not rules.is_cpu,
                        sequence_parallel=sp,
                        virtual_pipeline=vp,
                    )
                    if not find_obstacle(shape, layout, rules):
                        yield layout


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(max(1, most).bit_length())]
