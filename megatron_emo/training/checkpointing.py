"""Saves that survive any cut, and loads that refuse what is not whole: flags and what they refuse.

Megatron 0.19.2 hashes on one rank and only where asked, names the latest checkpoint in a file that
is empty for a moment, saves over what a cut save left, and accepts keys and vocabularies that do
not match. `checkpoint_loads.py` and `checkpoint_saves.py` are put around the few functions of
megatron/training/checkpointing.py and megatron/core/dist_checkpointing/serialization.py concerned.
"""

from __future__ import annotations

import argparse

from megatron_emo.launch.exit_codes import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of checkpoints, and turn Megatron's --verify-integrity on by default."""
    group = parser.add_argument_group("whole checkpoints")
    group.add_argument(
        "--fallback",
        action="store_true",
        help="where the checkpoint to load is damaged, cut off or missing, load the newest whole "
        "one of --load, and say which were passed over and why; without it that is an error",
    )
    group.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help="neither hash a checkpoint's files (SHA-256, each once, shared out among ranks) when "
        "it is saved nor compare them when it is loaded: then damage inside a file goes unseen",
    )
    parser.set_defaults(verify_integrity=True)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Refuse what cannot be made safe, look at the checkpoint to load, and install the rest.

    Where --fallback finds another checkpoint than the tracker's, `args.ckpt_step` names it until
    that is loaded. Every rank calls it, and reads its share of the checkpoint; a few exchanges by
    the rendezvous store.

    Raises:
        ConfigError: flags with which damage would go unseen.
        CheckpointError: the checkpoint is not whole; on every rank.
    """
    from megatron_emo.training import checkpoint_loads, checkpoint_saves

    _refuse_flags(args)
    if args.ckpt_format != "torch_dist" or args.enable_msc:
        # Megatron's own manifest is of torch_dist alone, ours of files of this machine.
        if args.verify_integrity and args.rank == 0:
            print("> checkpoints are not verified: --ckpt-format, or --enable-msc", flush=True)
        args.verify_integrity = False
    checkpoint_saves.install()
    checkpoint_loads.install()
    checkpoint_loads.look_ahead(args)


def _refuse_flags(args: argparse.Namespace) -> None:
    if args.ckpt_format == "torch":
        raise ConfigError(
            "--ckpt-format torch: expected torch_dist; files of the former are not verified, are "
            "written in place, and Megatron goes on from random weights where a key does not match"
        )
    if args.ckpt_assume_constant_structure and args.async_save:
        raise ConfigError(
            "--ckpt-assume-constant-structure with --async-save: expected one of them; together "
            "they can save the weights of an earlier iteration again"
        )
    if args.dist_ckpt_strictness.startswith("return_"):
        raise ConfigError(
            f"--dist-ckpt-strictness {args.dist_ckpt_strictness}: expected another; the training "
            "loop cannot use what it returns"
        )
