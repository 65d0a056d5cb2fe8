"""What is looked at before a model is built: the table, the data files, the checkpoint to
resume."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.training import get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_emo.config import OUTPUT_LAYER
from megatron_emo.cost_embedding import check_cost_embedding, fingerprint_tokenizer
from megatron_emo.data.check import check_indexed_dataset
from megatron_emo.torch_dist import TRACKER, read_arguments, resolve_checkpoint_dir
from megatron_emo.training.arguments import EmoConfig

_TOKENS_CHECKED = 1 << 24
"""Of each data set, in evenly spaced blocks: well below a second from a local disk."""

_LOSS_FLAGS = (
    "objective emo_start_iter emo_ramp_iters emo_weight_max emo_half emo_detach_target "
    "emo_ratio_eps emo_scale emo_eta emo_gamma emo_weight_min emo_mixing_ratio"
).split()


def check_before_start(args: argparse.Namespace, config: EmoConfig) -> None:
    """Check all of it, and leave the table's identity in `args.emo_cost_embedding_id`.

    Megatron stores its arguments in every checkpoint, and with them that identity: the table's
    sha256 (with :dim=K where --emo-cost-dim reduces it), output-layer, or "" where no cost trains
    the model. No collective; every rank checks for itself, the data files on rank 0 alone.

    Raises:
        ValueError, FileNotFoundError: naming the flag, what was found and what was expected.
    """
    table_id = _check_table(config)
    trains_on_cost = config.cost_embedding is not None and config.build_objective().uses_cost
    args.emo_cost_embedding_id = (table_id or OUTPUT_LAYER) if trains_on_cost else ""
    if args.rank == 0:
        _check_data(args)
    _check_resume(args)


def _check_table(config: EmoConfig) -> str:
    if config.cost_embedding is None or config.cost_embedding.source == OUTPUT_LAYER:
        return ""
    tokenizer, dim = get_tokenizer(), config.cost_embedding.dim
    info = check_cost_embedding(
        config.cost_embedding.source,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
    )
    if dim is None or dim == info.dim:
        return info.sha256
    if dim > info.dim:
        raise ValueError(
            f"--emo-cost-dim {dim}: --emo-cost-embedding {config.cost_embedding.source} has "
            f"{info.dim} columns, expected at least {dim}"
        )
    return f"{info.sha256}:dim={dim}"


def _check_data(args: argparse.Namespace) -> None:
    """Compare every local .bin with its .idx and the vocabulary; object storage is left out."""
    if args.mock_data or args.sft:  # neither reads .bin/.idx
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [blend, *(per_split or [])]
    prefixes = {prefix for one in blends if one is not None for prefix in one[0]}
    for prefix in sorted(prefix for prefix in prefixes if "://" not in prefix):
        check_indexed_dataset(prefix, get_tokenizer().vocab_size, _TOKENS_CHECKED)


def _check_resume(args: argparse.Namespace) -> None:
    """Compare the loss with the one the checkpoint was trained with.

    --finetune starts a new run from old weights: anything may differ then.
    """
    tracker = Path(args.load or "", TRACKER)
    if args.load is None or args.finetune or not tracker.is_file():
        return
    if tracker.read_text().strip() == "release":
        return
    folder = resolve_checkpoint_dir(args.load, args.ckpt_step)
    saved = read_arguments(folder)
    if not hasattr(saved, "emo_cost_embedding_id"):
        return  # not one of ours, or unreadable without running its code
    then, now = saved.emo_cost_embedding_id, args.emo_cost_embedding_id
    if then and now and then != now:
        raise ValueError(
            f"--emo-cost-embedding {args.emo_cost_embedding or OUTPUT_LAYER} has id {now}, the "
            f"checkpoint {folder} was trained with {saved.emo_cost_embedding or OUTPUT_LAYER}, id "
            f"{then}; resume with that table and its --emo-cost-dim, or add --finetune to start a "
            "new run from its weights"
        )
    changed = [
        f"--{name.replace('_', '-')} {getattr(saved, name)} -> {getattr(args, name)}"
        for name in _LOSS_FLAGS
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name)
    ]
    if changed:
        print_rank_0(f"> resuming {folder} with other loss settings: {', '.join(changed)}")
