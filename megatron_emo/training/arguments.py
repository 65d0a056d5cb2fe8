"""The --objective and --emo-* flags, their configs, and the checks that name them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace

from megatron_emo.config import (
    DETERMINISTIC_BLOCKS,
    LOSS_PATHS,
    OUTPUT_LAYER,
    CostEmbeddingConfig,
    LossPathConfig,
    ObjectiveConfig,
    ScheduleConfig,
)
from megatron_emo.cost_embedding.narrow import DTYPES
from megatron_emo.objectives import OBJECTIVES, Objective, build_objective

_OBJECTIVE_FLAGS = (
    "weight_max",
    "half",
    "detach_target",
    "ratio_eps",
    "scale",
    "eta",
    "gamma",
    "weight_min",
    "mixing_ratio",
)


@dataclass(frozen=True)
class EmoConfig:
    """All that the flags say about the loss."""

    objective: ObjectiveConfig
    cost_embedding: CostEmbeddingConfig | None
    """None where neither the objective nor the command line asks for a cost."""
    schedule: ScheduleConfig
    loss_path: LossPathConfig

    def build_objective(self) -> Objective:
        """Return the objective these settings name."""
        return build_objective(self.objective)


def add_emo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser; all defaults of None mean the objective's own value."""
    group = parser.add_argument_group("EMO loss")
    group.add_argument(
        "--objective",
        choices=list(OBJECTIVES),
        default="emo1",
        help="Training objective of the language model head. Default: emo1, the paper's form.",
    )
    group.add_argument(
        "--emo-cost-embedding",
        metavar="FILE|output-layer",
        default=None,
        help="Cost embedding: a safetensors file from tools/prepare_cost_embedding.py, or "
        "output-layer, the live head, detached and normalised anew each step. Default: "
        "output-layer for objectives with a cost; none for the others, which then do not log it.",
    )
    group.add_argument(
        "--emo-cost-dtype",
        choices=list(DTYPES),
        default=CostEmbeddingConfig.dtype,
        help="What a rank holds its rows of the table in. fp8 is e4m3 with a constant scale, "
        "measured when the table is read and refused where costs would be off by over 1%%. "
        "Default: fp32.",
    )
    group.add_argument(
        "--emo-cost-dim",
        metavar="K",
        type=int,
        default=None,
        help="Reduce the rows of a cost embedding file to their K principal components when it is "
        "read; what that does to cosines is printed. Default: all columns.",
    )
    group.add_argument(
        "--emo-start-iter",
        type=int,
        default=0,
        help="Iterations of plain MLE before the objective takes over. Default: 0.",
    )
    group.add_argument(
        "--emo-ramp-iters",
        type=int,
        default=0,
        help="Iterations over which the objective's share grows linearly from 0 to 1 after "
        "--emo-start-iter. Default: 0, at once.",
    )
    group.add_argument(
        "--emo-loss-path",
        choices=LOSS_PATHS,
        default=LossPathConfig.path,
        help="How logits are held. logits: by the output layer, kept for the backward. recompute: "
        "a chunk at a time, formed again in the backward. forward: a chunk at a time, with the "
        "gradients. Default: auto, logits where they fit --emo-workspace-mb, else recompute.",
    )
    group.add_argument(
        "--emo-workspace-mb",
        type=int,
        default=LossPathConfig.workspace_mb,
        help="MiB that logits or their chunks may take on a rank. Default: %(default)s.",
    )
    _add_deterministic_settings(group)
    _add_objective_settings(group)
    return parser


def _add_deterministic_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--emo-deterministic-tp",
        action="store_true",
        help="Give the loss and its gradients by hidden states and output weight the same bits at "
        "any tensor-parallel size that divides --emo-deterministic-blocks, for the same padded "
        "vocabulary, device, build and threads. The transformer's own all-reduces are Megatron's "
        "and keep the order of their ranks. Default: off.",
    )
    group.add_argument(
        "--emo-deterministic-blocks",
        metavar="K",
        type=int,
        default=DETERMINISTIC_BLOCKS,
        help="With --emo-deterministic-tp: blocks of the padded vocabulary, a power of two, summed "
        "in a fixed order; runs to be compared need the same K. Default: %(default)s.",
    )


def _add_objective_settings(group: argparse._ArgumentGroup) -> None:
    number = {"type": float, "default": None}
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    group.add_argument(
        "--emo-weight-max",
        **number,
        help="emo1, emo2: cap on the detached ratio. Default: none; EMOLoss >= 0.0.2 uses 3.",
    )
    group.add_argument(
        "--emo-half", **switch, help="Factor 1/2 in front. Default: on for emo1, off for emo2."
    )
    group.add_argument(
        "--emo-detach-target",
        **switch,
        help="Count the target's probability as a constant in the cost (the released code's gt_q). "
        "Default: off. With emo2 and no --emo-weight-max it keeps training on learnt tokens.",
    )
    group.add_argument(
        "--emo-ratio-eps", **number, help="Added below the detached ratio. Default: 1e-10."
    )
    group.add_argument(
        "--emo-scale", **number, help="emo2: factor on the cost. Default: 1; first release: 5."
    )
    group.add_argument(
        "--emo-eta", **number, help="mixce: weight of forward cross-entropy, 0 to 1. Default: 0.5."
    )
    group.add_argument(
        "--emo-gamma", **number, help="tailr: 0 to 1, default 1e-7. focal: exponent, default 2."
    )
    group.add_argument(
        "--emo-weight-min", **number, help="tailr, tvd: floor of the weight. Default: 0.2."
    )
    group.add_argument(
        "--emo-mixing-ratio", **number, help="tvd: share of MLE, 0 to 1. Default: 0.5."
    )


def emo_config_from_args(args: argparse.Namespace) -> EmoConfig:
    """Return the checked settings.

    Raises:
        ValueError: a value out of range or a flag the objective does not have, by its flag's name.
    """
    given = {name: getattr(args, f"emo_{name}") for name in _OBJECTIVE_FLAGS}
    given["emo_scale"] = given.pop("scale")
    try:
        objective = ObjectiveConfig(name=args.objective, **given)
        uses_cost = build_objective(objective).uses_cost
        schedule = ScheduleConfig(args.emo_start_iter, args.emo_ramp_iters)
        loss_path = LossPathConfig(args.emo_loss_path, args.emo_workspace_mb)
        if args.emo_deterministic_tp:
            blocks = args.emo_deterministic_blocks
            loss_path = replace(loss_path, deterministic_blocks=blocks)
    except ValueError as error:
        flags = [f"--emo-{name.replace('_', '-')}" for name in _OBJECTIVE_FLAGS]
        raise ValueError(
            f"{error} (flags: --objective, {', '.join(flags)}, --emo-*-iter*)"
        ) from None
    source = args.emo_cost_embedding or (OUTPUT_LAYER if uses_cost else None)
    if source not in (None, OUTPUT_LAYER) and not os.path.isfile(source):
        raise ValueError(
            f"--emo-cost-embedding: expected {OUTPUT_LAYER} or a safetensors file, got {source}, "
            "which is no file; tools/prepare_cost_embedding.py makes one"
        )
    cost_embedding = None
    if source is not None:
        cost_embedding = _cost_embedding_config(args, source)
    _check_loss_path(args)
    if args.emo_deterministic_tp:
        _check_deterministic(args)
    return EmoConfig(objective, cost_embedding, schedule, loss_path)


def _cost_embedding_config(args: argparse.Namespace, source: str) -> CostEmbeddingConfig:
    try:
        return CostEmbeddingConfig(source, args.emo_cost_dtype, args.emo_cost_dim)
    except ValueError as error:
        raise ValueError(f"--emo-cost-dim {args.emo_cost_dim}: {error}") from None


def output_layer_obstacle(args: argparse.Namespace) -> str:
    """Return the flag that needs the output layer's own product, "" if there is none."""
    if args.defer_embedding_wgrad_compute:
        return "--defer-embedding-wgrad-compute"  # the layer keeps its inputs for later
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        return "--tensor-parallel-num-weight-shards"  # the layer gathers its weight
    if getattr(args, "fp8_output_proj", False):
        return "--fp8-output-proj"  # the layer multiplies in FP8
    return ""


def _check_loss_path(args: argparse.Namespace) -> None:
    obstacle = output_layer_obstacle(args)
    if obstacle and args.emo_loss_path in ("recompute", "forward"):
        raise ValueError(
            f"--emo-loss-path {args.emo_loss_path}: does not go with {obstacle}, which needs the "
            "output layer's own product; use --emo-loss-path logits"
        )


def _check_deterministic(args: argparse.Namespace) -> None:
    """Refuse what would make bits of the loss follow the ranks again."""
    blocks, num_ranks = args.emo_deterministic_blocks, args.tensor_model_parallel_size
    if blocks % num_ranks:
        raise ValueError(
            f"--emo-deterministic-blocks: expected a multiple of --tensor-model-parallel-size "
            f"{num_ranks}, got {blocks}"
        )
    obstacle = output_layer_obstacle(args)
    if obstacle:
        raise ValueError(
            f"--emo-deterministic-tp: does not go with {obstacle}: the output layer's own products "
            "have shapes that follow the ranks"
        )
    if args.emo_cost_dim is not None:
        raise ValueError(
            f"--emo-deterministic-tp: does not go with --emo-cost-dim {args.emo_cost_dim}, whose "
            "components are summed over ranks; reduce the file once, with "
            "tools/prepare_cost_embedding.py --cost-dim"
        )


def check_supported(args: argparse.Namespace) -> None:
    """Refuse what Megatron offers and the EMO loss cannot follow, before a model is built.

    Raises:
        ValueError: the flag, and what to do instead.
    """
    refused = {
        "--yaml-cfg": (args.yaml_cfg is not None, "give the arguments on the command line"),
        "--logits-load-dir": (
            args.logits_load_dir is not None,
            "distillation replaces the loss; train without it",
        ),
        "--perform-rl-step": (
            args.perform_rl_step,
            "RL losses are not built from these objectives",
        ),
        "--spec": (args.spec is not None, "only GPT layer specs chosen by --transformer-impl"),
        "--cuda-graph-impl full_iteration": (
            args.cuda_graph_impl == "full_iteration",
            "the number of distinct targets changes between steps; capture layers instead",
        ),
        "--use-megatron-fsdp": (
            args.use_megatron_fsdp,
            "the head's weight must be whole on a rank",
        ),
        "--use-torch-fsdp2": (args.use_torch_fsdp2, "the head's weight must be whole on a rank"),
        "--hybrid-context-parallel": (args.hybrid_context_parallel, "use --context-parallel-size"),
    }
    for flag, (is_set, advice) in refused.items():
        if is_set:
            raise ValueError(f"{flag}: not supported with --objective {args.objective}: {advice}")
