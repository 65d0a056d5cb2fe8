"""What a job would run on, in words, and whether it would start: `tools/doctor.py`."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_emo.launch import agreement, collectives, environment
from megatron_emo.launch.exit_codes import ExitCode, RunError
from megatron_emo.launch.verdict import Exchange, exchange_of_run, format_ranks

Check = Callable[[], list[str]]


def diagnose(timeout_s: float, check: Check | None = None) -> int:
    """Print environment, versions, devices, network and a verdict on rank 0; return 0 or 78.

    Collective: every rank of the job calls it.

    Args:
        timeout_s: for which ranks wait for each other, and for the all-reduces of a group.
        check: what looks at a run's flags, and returns lines to print; it raises RunError, on every
            rank alike, for what would keep the run from starting. Without it versions and
            environment are compared, and the network of all ranks is timed.
    """
    try:
        exchange = exchange_of_run(timeout_s)
        _print_tables(exchange)
        if check is None:
            lines = _check_ranks(exchange, timeout_s)
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # Megatron lists all its arguments
                lines = check()
    except RunError as error:
        if _is_rank_0() or not error.is_on_all_ranks:
            print(f"\nverdict: would not start\nerror: {error}", flush=True)
        return int(ExitCode.CONFIG)
    if _is_rank_0():
        print("\n".join(["", "checks", *(f"  {line}" for line in lines), "", "verdict: sound"]))
    return int(ExitCode.DONE)


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _check_ranks(exchange: Exchange, timeout_s: float) -> list[str]:
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    described = agreement.describe()
    agreement.check_agreement(described, rank=rank, exchange=exchange)
    if world_size == 1:
        return ["one process: no network"]
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timeout)
    report = collectives.time_groups(
        {"world": dist.group.WORLD}, exchange=exchange, timeout_s=timeout_s
    )
    return [
        f"{world_size} ranks agree on {len(described)} versions and variables",
        f"all-reduces of {collectives.size_in_words(is_cuda)}:",
        *report.lines,
    ]


def _print_tables(exchange: Exchange) -> None:
    """Gather every rank's tables; rank 0 prints them."""
    own = {
        "versions": environment.versions(),
        "environment": environment.variables(),
        "machine": environment.machine(),
    }
    found = exchange(own)
    if _is_rank_0():
        for title in own:
            print("\n".join(_table(title, [of_rank[title] for of_rank in found])), flush=True)


def _table(title: str, found: Sequence[Mapping[str, str]]) -> list[str]:
    """A title and a line per key; where ranks differ, a line per value."""
    keys = list(dict.fromkeys(key for of_rank in found for key in of_rank))
    width = max([len(key) for key in keys], default=0)
    lines = ["", title]
    for key in keys:
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(found):
            ranks.setdefault(of_rank.get(key, "(absent)"), []).append(rank)
        for number, (value, where) in enumerate(ranks.items()):
            suffix = f"  ({format_ranks(where)})" if len(ranks) > 1 else ""
            lines.append(f"  {key if number == 0 else '':<{width}}  {value}{suffix}")
    return lines if keys else [*lines, "  (none set)"]
