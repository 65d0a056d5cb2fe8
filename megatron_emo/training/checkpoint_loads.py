"""What every load of Megatron's goes through: the checkpoint is whole, and of this model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_emo import checkpoints
from megatron_emo.checkpoints import Choice, Findings, RunFolder
from megatron_emo.launch.exit_codes import CheckpointError
from megatron_emo.launch.verdict import exchange_of_run
from megatron_emo.torch_dist import TRACKER, read_arguments
from megatron_emo.training.hooks import stand_around

_HASH_TIMEOUT_S = 3600.0
"""For which ranks wait for the slowest to read its share of a checkpoint."""

_LENIENT = ("log_unexpected", "log_all", "ignore_all")
"""Values of --dist-ckpt-strictness that ask for a load in spite of other keys."""


@dataclass
class _Load:
    """The load in progress of this process."""

    typed_step: int | None = None
    """--ckpt-step as given."""
    ahead: tuple[str, Choice] | None = None
    """A folder and what will be loaded from it, until that begins."""
    root: str | None = None
    choice: Choice | None = None
    """What is loaded from `root`."""
    verified: Path | None = None
    """The checkpoint whose bytes have been compared."""
    folder: Path | None = None
    """The checkpoint that torch_dist reads at this moment."""


_load = _Load()


def look_ahead(args: argparse.Namespace) -> None:
    """Choose what will be loaded, and read all of it once, before a model is built.

    Raises:
        CheckpointError: on every rank.
    """
    global _load
    _load = _Load(typed_step=args.ckpt_step)
    for root in (args.load, args.pretrained_checkpoint):
        if root is None or not is_checked(args):
            continue
        run, choice = _choose(args, root)
        _say(args, choice)
        if root == args.load and isinstance(choice.latest, int) and choice.latest != run.tracker:
            args.ckpt_step = choice.latest
        if choice.latest is not None:
            _load.ahead = (root, choice)
            return


def install() -> None:
    """Stand around Megatron's functions; a second call does nothing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.training import checkpointing

    stand_around(checkpointing, "_load_base_checkpoint", _load_base_checkpoint)
    stand_around(checkpointing, "read_metadata", _read_metadata)
    stand_around(dist_checkpointing, "load", _load_shards)
    stand_around(serialization, "validate_integrity_and_strict_load", _validate)


def is_checked(args: argparse.Namespace | None) -> bool:
    """Whether these are arguments of a run of ours that loads what it could have saved."""
    if not hasattr(args, "fallback") or args.enable_msc:
        return False
    return args.ckpt_format == "torch_dist" and args.ckpt_convert_format is None


def raise_on_all_ranks(message: str) -> None:
    """Raise CheckpointError; for what every rank has found out alike."""
    error = CheckpointError(message)
    error.is_on_all_ranks = True
    raise error


def _choose(args: argparse.Namespace, root: str) -> tuple[RunFolder, Choice]:
    with patience() as exchange:
        seen = asdict(RunFolder.read(root)) if args.rank == 0 else None
        found = exchange(seen)[0]
        run = RunFolder(**{**found, "iterations": tuple(found["iterations"])})

        def inspect(folder: Path, *, reads_all: bool = True) -> Findings:
            reads_all = reads_all and args.verify_integrity and folder != _load.verified
            return checkpoints.inspect(
                folder, exchange=exchange, rank=args.rank, reads_all=reads_all
            )

        step = _load.typed_step if root == args.load else None
        try:
            choice = checkpoints.choose(run, inspect, step=step, falls_back=args.fallback)
        except ValueError as error:
            raise_on_all_ranks(f"--load {root}: {error}")
    if choice.latest is not None and args.verify_integrity:
        _load.verified = checkpoints.folder_of(root, choice.latest)
    return run, choice


@contextmanager
def patience() -> Iterator[Callable]:
    """The run's exchange, waiting as long as hashing can take."""
    exchange = exchange_of_run()
    usual = getattr(exchange, "timeout_s", None)
    if usual is not None:
        exchange.timeout_s = max(usual, _HASH_TIMEOUT_S)
    try:
        yield exchange
    finally:
        if usual is not None:
            exchange.timeout_s = usual


def _say(args: argparse.Namespace, choice: Choice) -> None:
    if args.rank == 0:
        for note in choice.notes:
            print(f"!! {note}", flush=True)


def _load_base_checkpoint(
    upstream: Callable,
    load_dir: str | None,
    args: argparse.Namespace,
    rank0: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    """Megatron calls it twice for a load: for arguments (rank0=True), then for the state."""
    if load_dir is None or not is_checked(args):
        return upstream(load_dir, args, rank0, *rest, **named)
    if rank0 or _load.root != load_dir:
        if _load.ahead is not None and _load.ahead[0] == load_dir:
            _load.choice, _load.ahead = _load.ahead[1], None
        else:
            _, _load.choice = _choose(args, load_dir)
            _say(args, _load.choice)
        _load.root = load_dir
    latest = _load.choice.latest
    before, args.ckpt_step = args.ckpt_step, latest if isinstance(latest, int) else None
    try:
        return upstream(load_dir, args, rank0, *rest, **named)
    finally:
        args.ckpt_step = before
        if not rank0:
            args.ckpt_step, _load.root = _load.typed_step, None


def _read_metadata(upstream: Callable, tracker_filename: str) -> tuple[int, bool]:
    """Upstream ends the process, with exit code 0, where it cannot read the tracker."""
    if _load.root is not None and tracker_filename == os.path.join(_load.root, TRACKER):
        latest = _load.choice.latest
        return (0, True) if latest == checkpoints.RELEASE else (latest, False)
    try:
        checkpoints.read_tracker(os.path.dirname(tracker_filename))
    except ValueError as error:
        raise_on_all_ranks(str(error))
    return upstream(tracker_filename)


def _load_shards(
    upstream: Callable, sharded_state_dict: Any, checkpoint_dir: str, *rest: Any, **named: Any
) -> Any:
    args = arguments()
    if not is_checked(args):
        return upstream(sharded_state_dict, checkpoint_dir, *rest, **named)
    _load.folder = Path(checkpoint_dir)
    if named.pop("verify_integrity", False) and _load.folder != _load.verified:
        _verify(args, _load.folder)
    if named.get("strict", "").startswith("raise_"):
        # Ours are stricter, and upstream's takes its own rerun state for a missing key.
        named["strict"] = "assume_ok_unexpected"
    try:
        return upstream(sharded_state_dict, checkpoint_dir, *rest, **named)
    finally:
        _load.folder = None


def _verify(args: argparse.Namespace, folder: Path) -> None:
    with patience() as exchange:
        found = checkpoints.inspect(folder, exchange=exchange, rank=args.rank)
    if found.problems:
        raise_on_all_ranks(f"checkpoint {folder}: {checkpoints.describe(found.problems)}")


def _validate(
    upstream: Callable, sharded_state_dict: Any, strict: Any, *rest: Any, **named: Any
) -> Any:
    if _load.folder is not None:
        by_rank = rest[2] if len(rest) > 2 else None
        _check_keys(_load.folder, by_rank or _gather(sharded_state_dict), strict)
    return upstream(sharded_state_dict, strict, *rest, **named)


def _gather(sharded_state_dict: Any) -> list[list[Any]]:
    """What each rank asks for, without data; upstream has it already unless told otherwise."""
    from megatron.core.dist_checkpointing.validation import determine_global_metadata

    return determine_global_metadata(sharded_state_dict)[1]


def _check_keys(folder: Path, by_rank: list[list[Any]], strict: Any) -> None:
    """Compare what all ranks together ask for with what is stored."""
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    asked = {part.key: part for parts in by_rank for part in parts}
    stored = {part.key: part for part in load_sharded_metadata(str(folder)).values()}
    problems = checkpoints.compare_keys(
        {key: None if _may_differ(part) else _shape(part) for key, part in asked.items()},
        {key: _shape(part) for key, part in stored.items()},
    )
    if problems and strict.value in _LENIENT:
        if arguments().rank == 0:
            print(f"!! checkpoint {folder}: {'; '.join(problems)}", flush=True)
        problems = []
    problems += _vocabulary_problems(folder, asked, stored)
    if problems:
        raise_on_all_ranks(f"checkpoint {folder} is of another model: " + "\n  ".join(problems))


def _vocabulary_problems(folder: Path, asked: dict, stored: dict) -> list[str]:
    """Of embeddings and heads, whose rows are padded to a multiple that the layout decides."""
    from megatron.training import get_tokenizer

    different = [
        key
        for key, part in asked.items()
        if key in stored and _may_differ(part) and _shape(part) != _shape(stored[key])
    ]
    if not different:
        return []
    saved = read_arguments(folder)
    multiple = None
    if hasattr(saved, "make_vocab_size_divisible_by"):
        multiple = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    problems = []
    for key in different:
        (rows, *rest), (_, *expected) = _shape(stored[key]), _shape(asked[key])
        problem = checkpoints.check_vocabulary(key, rows, get_tokenizer().vocab_size, multiple)
        if rest != expected:
            problem = f"{key}: rows of {rest} in the checkpoint, {expected} in the model"
        problems += [problem] if problem else []
    return problems


def _may_differ(part: Any) -> bool:
    return getattr(part, "allow_shape_mismatch", False)


def _shape(part: Any) -> tuple[int, ...] | None:
    """Global shape of a tensor; None of an object, whose shape is that of its layout."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return tuple(part.global_shape) if isinstance(part, ShardedTensor) else None


def arguments() -> argparse.Namespace | None:
    from megatron.training import global_vars

    return global_vars._GLOBAL_ARGS
