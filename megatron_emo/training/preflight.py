"""What is looked at before a model is built: whether ranks agree, the table, the data files, the
checkpoint to resume, room for the next one, and the network.

All of it is decided by all ranks together: what one finds, every rank raises.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.training import get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_emo.config import OUTPUT_LAYER
from megatron_emo.cost_embedding import check_cost_embedding, fingerprint_tokenizer
from megatron_emo.data.check import check_indexed_dataset
from megatron_emo.launch import agreement, collectives, disk
from megatron_emo.launch.exit_codes import CheckpointError, ConfigError
from megatron_emo.launch.verdict import Exchange, all_or_none
from megatron_emo.torch_dist import TRACKER, read_arguments, resolve_checkpoint_dir
from megatron_emo.training.arguments import EmoConfig

_TOKENS_CHECKED = 1 << 24
"""Of each data set, in evenly spaced blocks: well below a second from a local disk."""

_LOSS_FLAGS = (
    "objective emo_start_iter emo_ramp_iters emo_weight_max emo_half emo_detach_target "
    "emo_ratio_eps emo_scale emo_eta emo_gamma emo_weight_min emo_mixing_ratio"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the checks at the start."""
    parser.add_argument_group("preflight").add_argument(
        disk.FLAG,
        metavar="N",
        type=float,
        default=2.0,
        help="Checkpoints for which --save must have room at the start, each as large as the "
        "newest one there, else as estimated. 0: do not look. Default: %(default)g.",
    )
    return parser


def check_before_start(args: argparse.Namespace, config: EmoConfig, exchange: Exchange) -> str:
    """Check all of it but the network, leave the run's identity in `args`, and return in words what
    was checked.

    Megatron stores its arguments in every checkpoint, and with them `emo_cost_embedding_id` (the
    table's sha256, with :dim=K where --emo-cost-dim reduces it; output-layer; or "" where no cost
    trains the model), `emo_vocab_size` (without padding) and `emo_tokenizer_id` (fingerprint, ""
    where the tokenizer has no vocabulary to show). Three exchanges; files that all ranks share are
    read by rank 0, those of a host by its first rank.

    Raises:
        VerdictError: on every rank, naming the flag, what was found and what was expected.
    """
    start = time.monotonic()
    all_or_none(lambda: _identify(args, config), "cost embedding", exchange=exchange)
    described = agreement.describe(args)
    agreement.check_agreement(described, rank=args.rank, exchange=exchange)
    all_or_none(lambda: _check_files(args), "preflight", exchange=exchange)
    summary = (
        f"preflight: {args.world_size} rank{'s' * (args.world_size > 1)} agree on "
        f"{len(described)} settings; table, data and disk are sound "
        f"({time.monotonic() - start:.2f} s)"
    )
    print_rank_0(f"> {summary}")
    return summary


def _identify(args: argparse.Namespace, config: EmoConfig) -> None:
    tokenizer = get_tokenizer()
    args.emo_vocab_size = int(tokenizer.vocab_size)
    args.emo_tokenizer_id = fingerprint_tokenizer(tokenizer)
    table_id = _check_table(config, args.emo_vocab_size, args.emo_tokenizer_id)
    trains_on_cost = config.cost_embedding is not None and config.build_objective().uses_cost
    args.emo_cost_embedding_id = (table_id or OUTPUT_LAYER) if trains_on_cost else ""


def _check_files(args: argparse.Namespace) -> None:
    if args.rank == 0:
        _check_data(args, _TOKENS_CHECKED)
        _check_load(args)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if args.rank != 0:
        _check_data(args, 1)  # the host's own copy, if it is one: sizes, and a block at each end
    if args.save is not None and "://" not in args.save:
        disk.check_save_folder(
            args.save,
            num_checkpoints=args.emo_disk_checkpoints,
            estimated_bytes=disk.estimate_checkpoint_bytes(args),
        )


def _check_table(config: EmoConfig, vocab_size: int, tokenizer_id: str) -> str:
    if config.cost_embedding is None or config.cost_embedding.source == OUTPUT_LAYER:
        return ""
    dim = config.cost_embedding.dim
    info = check_cost_embedding(
        config.cost_embedding.source,
        vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer_id,
    )
    if dim is None or dim == info.dim:
        return info.sha256
    if dim > info.dim:
        raise ValueError(
            f"--emo-cost-dim {dim}: --emo-cost-embedding {config.cost_embedding.source} has "
            f"{info.dim} columns, expected at least {dim}"
        )
    return f"{info.sha256}:dim={dim}"


def _check_data(args: argparse.Namespace, num_tokens: int) -> None:
    """Compare every local .bin with its .idx and the vocabulary; object storage is left out."""
    if args.mock_data or args.sft:  # neither reads .bin/.idx
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [blend, *(per_split or [])]
    prefixes = {prefix for one in blends if one is not None for prefix in one[0]}
    for prefix in sorted(prefix for prefix in prefixes if "://" not in prefix):
        check_indexed_dataset(prefix, args.emo_vocab_size, num_tokens)


def _loads_a_local_one(args: argparse.Namespace) -> bool:
    return not (
        args.load is None or "://" in args.load or args.non_persistent_ckpt_type is not None
    )


def _check_load(args: argparse.Namespace) -> None:
    if not _loads_a_local_one(args) or Path(args.load, TRACKER).is_file():
        return
    if not (args.fallback and any(Path(args.load).glob("iter_*"))):
        _check_may_be_absent(args)


def check_resume(args: argparse.Namespace, exchange: Exchange) -> None:
    """Compare vocabulary, tokenizer and loss with those the checkpoint was trained with.

    --finetune starts a new run from old weights: of these only the vocabulary has to fit then.
    After `checkpointing.prepare`, which with --fallback may have chosen another checkpoint. One
    exchange; rank 0 reads.

    Raises:
        VerdictError: on every rank, naming the flag, what was found and what was expected.
    """
    all_or_none(
        lambda: _check_resume(args) if args.rank == 0 else None, "checkpoint", exchange=exchange
    )


def _check_resume(args: argparse.Namespace) -> None:
    if not _loads_a_local_one(args):
        return
    if args.ckpt_step is None and not Path(args.load, TRACKER).is_file():
        return
    try:
        folder = resolve_checkpoint_dir(args.load, args.ckpt_step)
        saved = read_arguments(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"--load {args.load}: {error}") from error
    if saved is None:
        return  # unreadable without running its code
    _check_vocabulary(args, saved, folder)
    if args.finetune or folder.name == "release" or not hasattr(saved, "emo_cost_embedding_id"):
        return
    _check_loss(args, saved, folder)


def _check_may_be_absent(args: argparse.Namespace) -> None:
    """A run that resumes itself has nothing to load at its first start; any other --load must be
    there, where Megatron would go on from random weights."""
    starts_itself = args.save is not None and os.path.realpath(args.load) == os.path.realpath(
        args.save
    )
    if args.pretrained_checkpoint is None and (
        not starts_itself or args.exit_on_missing_checkpoint
    ):
        raise ConfigError(
            f"--load {args.load}: found no {TRACKER} there, expected a checkpoint; without one "
            "leave the flag out, or give the run's own --save folder, from which a first start "
            "has nothing to load (not with --exit-on-missing-checkpoint)"
        )


def _check_vocabulary(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    now, then = args.emo_vocab_size, getattr(saved, "emo_vocab_size", None)
    flag = "--vocab-size" if args.tokenizer_type == "NullTokenizer" else "--tokenizer-model"
    if then is not None and now != then:
        raise ValueError(
            f"{flag}: the tokenizer has {now} tokens, the checkpoint {folder} was trained with "
            f"{then} (without padding); expected the same: rows of the embedding that are not in "
            "the checkpoint would stay random"
        )
    rows = getattr(saved, "padded_vocab_size", None)
    if isinstance(rows, int) and now > rows:
        raise ValueError(
            f"{flag}: the tokenizer has {now} tokens, the embedding in the checkpoint {folder} "
            f"{rows} rows; expected at least as many"
        )
    now, then = args.emo_tokenizer_id, getattr(saved, "emo_tokenizer_id", "")
    if now and then and now != then:
        difference = (
            f"--tokenizer-model: this tokenizer has fingerprint {now}, the checkpoint {folder} was "
            f"trained with {then}"
        )
        if not args.finetune:
            raise ValueError(
                f"{difference}; resume with that tokenizer, or add --finetune to start a new run "
                "from its weights"
            )
        print_rank_0(f"> WARNING: {difference}; its weights mean other tokens")


def _check_loss(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
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


def check_network(exchange: Exchange, timeout_s: float) -> collectives.NetworkReport | None:
    """Time an all-reduce in each of Megatron's groups and print the times; None for one rank.

    Collective, after `initialize_megatron`.

    Raises:
        VerdictError: as `collectives.time_groups`.
    """
    if dist.get_world_size() == 1:
        return None
    start = time.monotonic()
    report = collectives.time_groups(_groups(), exchange=exchange, timeout_s=timeout_s)
    size = collectives.size_in_words(dist.get_backend() == "nccl")
    took = time.monotonic() - start
    print_rank_0(
        "\n".join([f"> network, all-reduces of {size} ({took:.2f} s):", *_indented(report)])
    )
    return report


def _indented(report: collectives.NetworkReport) -> list[str]:
    return [f">   {line}" for line in report.lines]


def _groups() -> dict[str, dist.ProcessGroup]:
    from megatron.core import parallel_state

    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
    }
    world_size = dist.get_world_size()
    # A group of all ranks is not timed twice. Sizes are the same on every rank.
    parts = {kind: group for kind, group in groups.items() if 1 < group.size() < world_size}
    return {"world": dist.group.WORLD, **parts}


@contextlib.contextmanager
def after_groups(hook: Callable[[], object]) -> Iterator[None]:
    """Within the block, call `hook` when Megatron has made its groups, before it builds a model.

    `pretrain` offers no place there. Wraps initialize_megatron as megatron/training/training.py
    names it, 0.19.2, and puts it back.
    """
    from megatron.training import training

    upstream = training.initialize_megatron

    def initialize_megatron(*args, **kwargs):
        result = upstream(*args, **kwargs)
        hook()
        return result

    training.initialize_megatron = initialize_megatron
    try:
        yield
    finally:
        training.initialize_megatron = upstream
