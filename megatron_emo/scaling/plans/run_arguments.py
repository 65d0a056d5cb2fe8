"""A planned run as Megatron's flags."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.plans.plan import Run


def megatron_arguments(run: Run) -> list[str]:
    """Return the flags of model, objective, batch, schedule and seed.

    Left to the launcher: data, tokenizer, parallelism, precision, checkpoints and logs.
    """
    return [
        "--objective",
        run.objective.objective,
        *model_arguments(run),
        *training_arguments(run),
        *run.arguments,
    ]


def model_arguments(run: Run) -> list[str]:
    """Return the flags of the model's shape; without dropout."""
    shape = run.shape
    flags: dict[str, object] = {
        "--num-layers": shape.num_layers,
        "--hidden-size": shape.hidden_size,
        "--num-attention-heads": shape.num_attention_heads,
        "--ffn-hidden-size": shape.ffn_hidden_size,
        "--seq-length": shape.seq_length,
        "--max-position-embeddings": shape.learned_positions or shape.seq_length,
        "--position-embedding-type": "learned_absolute" if shape.learned_positions else "rope",
        "--normalization": shape.normalization,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        **vocabulary_flags(run),
    }
    if shape.num_query_groups is not None:
        flags["--num-query-groups"] = shape.num_query_groups
    if shape.num_experts is not None:
        flags["--num-experts"] = shape.num_experts
        flags["--moe-router-topk"] = shape.moe_router_topk
        flags["--moe-ffn-hidden-size"] = shape.expert_ffn
    switches = {
        "--group-query-attention": shape.num_query_groups is not None,
        "--swiglu": shape.swiglu,
        "--disable-bias-linear": not shape.add_bias_linear,
        "--add-qkv-bias": shape.add_qkv_bias,
        "--qk-layernorm": shape.qk_layernorm,
        "--untie-embeddings-and-output-weights": shape.untie_embeddings_and_output_weights,
    }
    return _words(flags) + [flag for flag, on in switches.items() if on]


def vocabulary_flags(run: Run) -> dict[str, object]:
    """Return the flags that decide how large the output layer is."""
    return {
        "--vocab-size": run.vocab_size,
        "--make-vocab-size-divisible-by": run.make_vocab_size_divisible_by,
    }


def training_arguments(run: Run) -> list[str]:
    """Return the flags of batch, length, learning rate, optimizer and seed."""
    optimizer = run.optimizer
    flags: dict[str, object] = {
        "--micro-batch-size": run.micro_batch,
        "--global-batch-size": run.batch,
        "--train-iters": run.steps,
        "--lr": optimizer.learning_rate,
        "--min-lr": optimizer.min_learning_rate,
        "--lr-decay-style": optimizer.decay_style,
        "--lr-decay-iters": run.steps,
        "--lr-warmup-iters": optimizer.warmup_steps,
        "--adam-beta1": optimizer.beta1,
        "--adam-beta2": optimizer.beta2,
        "--weight-decay": optimizer.weight_decay,
        "--clip-grad": optimizer.clip_grad,
        "--seed": run.seed,
    }
    if optimizer.decay_style == "WSD":
        flags["--lr-wsd-decay-style"] = "linear"
        flags["--lr-wsd-decay-iters"] = optimizer.decay_steps
    return _words(flags)


def parallel_arguments(layout: Layout) -> list[str]:
    """Return the flags of how a run lies on its ranks."""
    flags: dict[str, object] = {
        "--tensor-model-parallel-size": layout.tensor_parallel,
        "--pipeline-model-parallel-size": layout.pipeline_parallel,
        "--context-parallel-size": layout.context_parallel,
        "--expert-model-parallel-size": layout.expert_parallel,
    }
    if layout.virtual_pipeline > 1:
        flags["--num-virtual-stages-per-pipeline-rank"] = layout.virtual_pipeline
    is_sequence_parallel = layout.tensor_parallel > 1 and layout.sequence_parallel
    return _words(flags) + (["--sequence-parallel"] if is_sequence_parallel else [])


def _words(flags: Mapping[str, object]) -> list[str]:
    return [word for flag, value in flags.items() for word in (flag, str(value))]
