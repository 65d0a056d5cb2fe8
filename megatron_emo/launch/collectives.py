"""The network, before it is needed: timed all-reduces in every group of ranks.

A rank that comes late to an all-reduce waits least in it, so that its own time says how long the
others waited for it; a slow link makes the whole group slow. Nothing here is refused for being
slow: what is normal differs by orders of magnitude between networks, so times are printed, and what
stands out is said. A group that does not finish, or loses a member, ends all ranks.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.launch.environment import format_bytes
from megatron_emo.launch.verdict import Exchange, agree, format_ranks

_CPU_BYTES = 1 << 20
_CUDA_BYTES = 64 << 20
_REPEATS = 5
STANDS_OUT = 3.0
"""A group is called slow at so many times the median of its kind; a rank, where the others waited
so many times what an all-reduce takes."""


@dataclass(frozen=True)
class GroupTime:
    """One rank's all-reduces in one group."""

    kind: str
    """world, tp, pp, dp, cp or ep."""
    ranks: list[int]
    milliseconds: float
    """From this rank's call to its end, the median of several, waiting for others included."""


@dataclass(frozen=True)
class NetworkReport:
    """What `time_groups` found, the same on every rank."""

    lines: list[str]
    """Times in words: a line for each kind of group, and one for the slowest rank."""
    slow_ranks: list[int]
    """Ranks or members of groups that stand out."""


def time_groups(
    groups: Mapping[str, dist.ProcessGroup],
    *,
    exchange: Exchange,
    timeout_s: float,
    num_bytes: int | None = None,
    before_each: Callable[[], object] = lambda: None,
) -> NetworkReport:
    """Time an all-reduce of fp32 in each group, and say which group and which rank is slowest.

    Collective: every rank names the same kinds, in the same order. Per group 1 + 5 all-reduces of
    1 MiB (gloo) or 64 MiB (NCCL), which connects what the run would connect at its first step, and
    an exchange before and after.

    Args:
        timeout_s: for the all-reduces of one group.
        num_bytes: other than the sizes above.
        before_each: called before every timed all-reduce, as the work of a rank between two.

    Raises:
        VerdictError: ranks that did not get here, and groups that did not finish, by their ranks.
    """
    exchange(None)  # names ranks that are dead before any group waits for them
    times: list[GroupTime] = []
    problem = None
    for kind, group in groups.items():
        ranks = dist.get_process_group_ranks(group)
        try:
            times.append(_time_group(kind, group, ranks, timeout_s, num_bytes, before_each))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            problem = (
                f"the first all-reduces of the {kind} group, {format_ranks(ranks)}, did not end "
                f"within {timeout_s:g} s: {reason}"
            )
            break
    agree(problem, "network", exchange=exchange)
    own = [[one.kind, one.ranks, one.milliseconds] for one in times]
    return summarise([[GroupTime(*one) for one in rank] for rank in exchange(own)])


def _time_group(
    kind: str,
    group: dist.ProcessGroup,
    ranks: list[int],
    timeout_s: float,
    num_bytes: int | None,
    before_each: Callable[[], object],
) -> GroupTime:
    is_cuda = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
    size = num_bytes or (_CUDA_BYTES if is_cuda else _CPU_BYTES)
    tensor = torch.zeros(size // 4, device=device)
    deadline = time.monotonic() + timeout_s
    _all_reduce(tensor, group, deadline)  # connects
    seconds = []
    for _ in range(_REPEATS):
        before_each()
        start = time.perf_counter()
        _all_reduce(tensor, group, deadline)
        seconds.append(time.perf_counter() - start)
    return GroupTime(kind, ranks, 1e3 * statistics.median(seconds))


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup, deadline: float) -> None:
    """Reduce and wait on the host until it has happened, to the deadline at most."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    if not tensor.is_cuda:
        left = max(deadline - time.monotonic(), 0.001)
        if work is not None:  # None on ranks outside the group
            work.wait(datetime.timedelta(seconds=left))
        return
    work.wait()  # the stream, not the host
    event = torch.cuda.Event()
    event.record()
    while not event.query():
        if time.monotonic() > deadline:
            raise RuntimeError("timed out")


def summarise(times: Sequence[Sequence[GroupTime]]) -> NetworkReport:
    """Return the report on all ranks' times, by rank."""
    lines: list[str] = []
    slow: set[int] = set()
    lateness: dict[int, tuple[float, str]] = {}
    for position, first in enumerate(times[0] if times else []):
        groups: dict[tuple[int, ...], dict[int, float]] = {}
        for rank, of_rank in enumerate(times):
            own = of_rank[position]
            groups.setdefault(tuple(own.ranks), {})[rank] = own.milliseconds
        # The last to come waits for nobody: its time is the network's.
        cost = {ranks: min(members.values()) for ranks, members in groups.items()}
        for members in groups.values():
            longest, shortest = max(members.values()), min(members.values())
            for rank, duration in members.items():
                late = longest - duration
                lateness[rank] = max(lateness.get(rank, (0.0, "")), (late, first.kind))
                if late > STANDS_OUT * shortest and late > 1.0:
                    slow.add(rank)
        lines.append(_line_of_kind(first.kind, cost, slow))
    if lateness:
        rank = max(lateness, key=lambda r: lateness[r][0])
        late, kind = lateness[rank]
        mark = ", which stands out" if rank in slow else ""
        lines.append(f"slowest rank {rank}: others in its {kind} group waited {late:.1f} ms{mark}")
    return NetworkReport(lines, sorted(slow))


def _line_of_kind(kind: str, cost: Mapping[tuple[int, ...], float], slow: set[int]) -> str:
    """A kind's median, and its slowest group, whose ranks are added to `slow` if it stands out."""
    median = statistics.median(cost.values())
    if len(cost) == 1:
        return f"{kind} ({len(next(iter(cost)))} ranks): {median:.2f} ms"
    ranks = max(cost, key=lambda group: cost[group])
    mark = ""
    if cost[ranks] > STANDS_OUT * median:
        slow.update(ranks)
        mark = ", which stands out"
    return (
        f"{kind} ({len(cost)} groups of {len(ranks)}): median {median:.2f} ms, slowest "
        f"{format_ranks(ranks)}: {cost[ranks]:.2f} ms{mark}"
    )


def size_in_words(is_cuda: bool) -> str:
    """Return what one all-reduce carries."""
    return format_bytes(_CUDA_BYTES if is_cuda else _CPU_BYTES)
