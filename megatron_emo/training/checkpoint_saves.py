"""What every save of Megatron's goes through: it is whole before it has a name."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_emo import checkpoints
from megatron_emo.checkpoints.files import write_durably
from megatron_emo.launch.verdict import exchange_of_run
from megatron_emo.torch_dist import TRACKER
from megatron_emo.training.checkpoint_loads import (
    arguments,
    patience,
    raise_on_all_ranks,
)
from megatron_emo.training.hooks import stand_around


def install() -> None:
    """Stand around Megatron's functions; a second call does nothing."""
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    stand_around(dist_checkpointing, "save", _save_shards)
    if not isinstance(checkpointing.maybe_msc, _WholeTrackers):
        checkpointing.maybe_msc = _WholeTrackers(checkpointing.maybe_msc)


class _WholeTrackers:
    """Megatron's module of file functions, with trackers that change from one name to the next.

    It opens the tracker for writing where it is: who is stopped before the name is in it, or out of
    the page cache, leaves an empty file behind.
    """

    def __init__(self, upstream: Any) -> None:
        self._upstream = upstream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._upstream, name)

    def open(self, path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        is_tracker = os.path.basename(str(path)) == TRACKER and "://" not in str(path)
        if mode == "w" and is_tracker:
            return _replacing(str(path))
        return self._upstream.open(path, mode, *rest, **named)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[io.StringIO]:
    text = io.StringIO()
    yield text
    write_durably(path, text.getvalue().encode())


def _save_shards(
    upstream: Callable, sharded_state_dict: Any, checkpoint_dir: str, *rest: Any, **named: Any
) -> Any:
    args = arguments()
    if not hasattr(args, "fallback") or args.enable_msc:  # no run of ours, or no file here
        return upstream(sharded_state_dict, checkpoint_dir, *rest, **named)
    folder = Path(checkpoint_dir)
    _make_room(folder, args.rank)
    is_signed = named.pop("verify_integrity", False)
    request = upstream(sharded_state_dict, checkpoint_dir, *rest, **named)
    if is_signed and request is None:
        _sign(folder, args.rank)
    elif is_signed:
        # Run on every rank once all have written, before the tracker names the checkpoint.
        request.finalize_fns.append(functools.partial(_sign, folder, args.rank))
    return request


def _make_room(folder: Path, rank: int) -> None:
    """Clear the folder, on rank 0, of what an earlier save left there. One exchange.

    Otherwise a save that is cut off again leaves old and new shards under one index. What never
    was a checkpoint is removed; what was one, damaged or not, is kept under another name.
    """
    problem = None
    if rank == 0:
        try:
            _clear(folder)
        except OSError as error:
            problem = f"{error.filename or folder}: {error.strerror or error}"
    problem = exchange_of_run()(problem)[0]
    if problem is not None:
        raise_on_all_ranks(f"--save: cannot clear {folder} of an earlier save: {problem}")


def _clear(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if checkpoints.glance(folder).is_cut_off:
        print(f"!! {folder}: removing what a save that was cut off left there", flush=True)
        shutil.rmtree(folder)
    else:
        kept = folder.with_name(f"{folder.name}.replaced")
        count = 1
        while kept.exists():
            count += 1
            kept = folder.with_name(f"{folder.name}.replaced_{count}")
        print(f"!! {folder}: saved again; the former one is kept as {kept.name}", flush=True)
        folder.rename(kept)
    folder.mkdir()


def _sign(folder: Path, rank: int) -> None:
    with patience() as exchange:
        problems = checkpoints.sign(folder, exchange=exchange, rank=rank)
    if problems:
        raise_on_all_ranks(
            f"--save: checkpoint {folder} cannot be completed: {checkpoints.describe(problems)}"
        )
