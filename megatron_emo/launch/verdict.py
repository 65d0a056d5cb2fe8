"""All ranks decide alike: what one finds, every rank raises.

An exchange takes one rank's object and returns those of all ranks, by rank. Objects are what JSON
can hold. Every rank has to call it the same number of times, in the same order.

It goes by the rendezvous store, before and after the process group exists: a store of torchrun's
agent or of rank 0 is there first, works under every backend, and can say which ranks are missing.
A gloo group over all ranks, beside NCCL, would need a connection for each pair of them. An exchange
takes each rank two round trips, and rank 0 one for all the rest.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_emo.launch.exit_codes import ExitCode, RunError, VerdictError, exit_code_of

Exchange = Callable[[Any], list[Any]]

TIMEOUT_S = 600.0
"""For which a rank waits for all others: imports from a cold file system take minutes."""

_GRACE_S = 5.0
"""More, for the others to hear from rank 0 which ranks it misses."""


def agree(
    problem: str | None, what: str, *, exchange: Exchange, error: type[RunError] = VerdictError
) -> None:
    """Raise `error` on every rank if any rank has a problem, with all ranks' problems.

    One exchange.

    Args:
        problem: what this rank found; None if nothing.
        what: what was looked at, such as "checkpoint": it opens the message where ranks differ.
    """
    problems = exchange(problem)
    if any(found is not None for found in problems):
        raise _on_all_ranks(error(format_problems(what, problems)))


def all_or_none[T](check: Callable[[], T], what: str, *, exchange: Exchange) -> T:
    """Return check()'s result if it raised on no rank; else raise on every rank.

    ValueError, OSError and RunError are findings: raised as VerdictError, with the largest exit
    code among ranks (78 for ValueError and for paths that do not exist; what exit_code_of says for
    the others). Anything else is a fault of ours: it goes up as it is on its rank, and ends the
    others with 70. One exchange.
    """
    result, caught, own = None, None, None
    try:
        result = check()
    except (ValueError, OSError, RunError) as error:
        caught, own = error, [_code_of_finding(error), str(error)]
    except Exception as error:
        caught, own = error, [int(ExitCode.INTERNAL), f"{type(error).__name__}: {error}"]
    answers = exchange(own)
    if all(answer is None for answer in answers):
        return result
    if own is not None and own[0] == ExitCode.INTERNAL and not isinstance(caught, RunError):
        raise caught
    error = VerdictError(format_problems(what, [answer and answer[1] for answer in answers]))
    error.exit_code = ExitCode(max(answer[0] for answer in answers if answer is not None))
    raise _on_all_ranks(error) from caught


def _code_of_finding(error: Exception) -> int:
    is_named_path = isinstance(error, FileNotFoundError | NotADirectoryError)
    if isinstance(error, RunError) or (isinstance(error, OSError) and not is_named_path):
        return exit_code_of(error)
    return int(ExitCode.CONFIG)


def format_problems(what: str, problems: Sequence[str | None]) -> str:
    """Return one text for the problems of ranks 0, 1, ..; that of one rank, or of all, as it is."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(rank)
    if len(ranks) == 1 and len(problems) in (1, *(len(found) for found in ranks.values())):
        return next(iter(ranks))
    parts = [f"{format_ranks(where)} of {len(problems)}: {text}" for text, where in ranks.items()]
    return f"{what}: " + ("\n  ".join(["", *parts]) if len(parts) > 1 else parts[0])


def format_ranks(ranks: Iterable[int]) -> str:
    """Return "rank 3" or "ranks 0-2, 5"."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ordered) > 1 else ''} {words}"


def exchange_alone(value: Any) -> list[Any]:
    """The exchange of a run of one process."""
    return [value]


class StoreExchange:
    """Exchanges through a key-value store of torch.distributed.

    Args:
        store: any; FileStore, HashStore and TCPStore all serve.
        prefix: separates the keys from others', and from those of earlier starts.
        timeout_s: for which all ranks are waited for.
        is_at_rank_0: whether the store's server lives in rank 0's process, which then has to
            outlast the others' last look at it.

    Raises:
        VerdictError: on a call, naming the ranks that did not answer in time.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        prefix: str = "",
        timeout_s: float = TIMEOUT_S,
        is_at_rank_0: bool = False,
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._store = dist.PrefixStore(f"megatron_emo/{prefix}", store)
        self._is_at_rank_0 = is_at_rank_0
        self._count = 0

    def __call__(self, value: Any) -> list[Any]:
        self._count += 1
        name = str(self._count)
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            values, missing = self._collect(name)
            self._store.set(f"{name}/all", json.dumps([values, missing]))
            if self._is_at_rank_0:
                self._await_readers(name, missing)
        else:
            values, missing = self._fetch(name)
        if missing:
            raise VerdictError(
                f"{format_ranks(missing)} of {self.world_size} did not answer within "
                f"{self.timeout_s:g} s: dead, stuck or not yet started; the log of that rank, or "
                "its host, says why"
            )
        self._clean_up(name)
        return values

    def roll_call(self, wait_s: float) -> str:
        """Return in words which ranks do not report within `wait_s`, for one that lost its peers.

        Ranks call it each for itself, where a collective failed; it never raises.
        """
        try:
            self._store.set(f"roll_call/{self.rank}", "1")
            keys = {rank: f"roll_call/{rank}" for rank in range(self.world_size)}
            if self._wait(list(keys.values()), wait_s):
                return "every rank reports the same: the network between them, or the collective"
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
        except (RuntimeError, RunError) as error:
            return f"the rendezvous store does not answer either: {error}"
        return (
            f"{format_ranks(missing)} of {self.world_size} did not report within {wait_s:g} s: "
            "dead or stuck, look there first"
        )

    def _clean_up(self, name: str) -> None:
        """Delete what nobody will read again: a run of months exchanges often."""
        self._store.delete_key(f"{name}/{self.rank}")
        if self.rank == 0 and self._count > 1:
            # All have begun this exchange, so they have read the result of the one before.
            self._store.delete_key(f"{self._count - 1}/all")

    def _keys(self, name: str, ranks: Iterable[int]) -> list[str]:
        return [f"{name}/{rank}" for rank in ranks]

    def _collect(self, name: str) -> tuple[list[Any], list[int]]:
        ranks = range(self.world_size)
        if not self._wait(self._keys(name, ranks), self.timeout_s):
            missing = [r for r in ranks if not self._store.check([f"{name}/{r}"])]
            if missing:
                return [], missing
        return [json.loads(text) for text in self._store.multi_get(self._keys(name, ranks))], []

    def _fetch(self, name: str) -> tuple[list[Any], list[int]]:
        answered = self._wait([f"{name}/all"], self.timeout_s + _GRACE_S)
        if not answered and self._store.check([f"{name}/0"]):
            # Rank 0 came late, and waits for somebody else.
            answered = self._wait([f"{name}/all"], self.timeout_s)
        if not answered:
            return [], [0]
        answer = json.loads(self._store.get(f"{name}/all"))
        if self._is_at_rank_0:
            self._store.set(f"{name}/read/{self.rank}", "1")
        return answer

    def _await_readers(self, name: str, missing: list[int]) -> None:
        others = sorted(set(range(1, self.world_size)) - set(missing))
        keys = [f"{name}/read/{rank}" for rank in others]
        if keys:
            self._wait(keys, _GRACE_S)
        for key in keys:
            self._store.delete_key(key)

    def _wait(self, keys: list[str], timeout_s: float) -> bool:
        try:
            self._store.wait(keys, datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:  # DistStoreError among them
            if "timeout" not in str(error).lower():
                # The host of the store has gone, and all that it held.
                raise VerdictError(f"lost the rendezvous store: {error}") from error
            return False
        return True


_exchange: tuple[Any, Exchange] | None = None


def exchange_of_run(timeout_s: float | None = None) -> Exchange:
    """Return this run's exchange, the same at every call; all ranks have to call it.

    Where a process group exists that nobody started through here, its store serves; else the one
    at MASTER_ADDR:MASTER_PORT, of torchrun's agent or, under srun, of rank 0, which
    init_process_group("env://") then shares. One process needs none.

    Args:
        timeout_s: how long a rank waits for the others, from here on; unchanged if None.

    Raises:
        VerdictError: no store at that address in time.
    """
    global _exchange
    world_size = _world_size()
    if world_size == 1:
        return exchange_alone
    if _exchange is None or _exchange[0] != (os.environ.get("MASTER_PORT"), world_size):
        made = _make_exchange(world_size, timeout_s or TIMEOUT_S)
        _exchange = ((os.environ.get("MASTER_PORT"), world_size), made)
    exchange = _exchange[1]
    if timeout_s is not None:
        exchange.timeout_s = timeout_s
    return exchange


def roll_call(wait_s: float = _GRACE_S) -> str:
    """Return in words which ranks do not report, as `StoreExchange.roll_call`; "" for one process
    and before there is an exchange.

    A store behind a cut cable keeps a caller for minutes: then it is left with it.
    """
    exchange = _exchange[1] if _exchange is not None else None
    if not isinstance(exchange, StoreExchange):
        return ""
    answers: list[str] = []
    caller = threading.Thread(
        target=lambda: answers.append(exchange.roll_call(wait_s)), name="roll call", daemon=True
    )
    caller.start()
    caller.join(2 * wait_s)
    return answers[0] if answers else f"nor does the rendezvous store answer in {2 * wait_s:g} s"


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _make_exchange(world_size: int, timeout_s: float) -> StoreExchange:
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        return StoreExchange(store, dist.get_rank(), world_size, timeout_s=timeout_s)
    uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and not uses_agent
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=is_host,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        role = "rank 0" if not uses_agent else "torchrun's agent"
        raise VerdictError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: no store of {role} there within "
            f"{timeout_s:g} s: {error}"
        ) from error
    # A start that torchrun repeats can meet the keys of the one before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    job = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("SLURM_RESTART_COUNT", "")
    return StoreExchange(
        store,
        rank,
        world_size,
        prefix=f"{job}/{attempt}",
        timeout_s=timeout_s,
        is_at_rank_0=not uses_agent,
    )


def _on_all_ranks[E: RunError](error: E) -> E:
    error.is_on_all_ranks = True
    return error
