"""A run's status as aligned text."""

from __future__ import annotations

from megatron_emo.launch.status import RankStatus, RunStatus

_RANKS_SHOWN = 8


def format_status(status: RunStatus) -> str:
    """Return a few aligned lines: the run, its numbers, its checkpoint, its failure, its ranks."""
    rows = [("run", status.run_dir), ("state", _joined(status.state, status.detail))]
    if status.world_size is not None:
        layout = " ".join(f"{name}={size}" for name, size in (status.layout or {}).items())
        rows.append(("ranks", f"{status.world_size} ({layout})"))
    if status.objective is not None:
        rows.append(("objective", status.objective))
    rows.append(("step", _step(status)))
    rows += [("" if index else "loss", text) for index, text in enumerate(_losses(status))]
    if status.step_ms is not None:
        speed = f"{status.step_ms:,.1f} ms a step"
        if status.tokens_per_s is not None:
            speed = f"{status.tokens_per_s:,.0f} tokens/s, {speed}"
        rows.append(("speed", speed))
    rows += [("" if i else "checkpoint", text) for i, text in enumerate(_checkpoint(status))]
    if status.failure is not None:
        failure = status.failure
        rows.append(("failed first", f"rank {failure.rank}, iteration {failure.iteration}"))
        rows.append(("", f"{failure.time} {failure.error}"))
        rows += [("", line) for line in failure.message.splitlines()[:4]]
    if status.wordless:
        rows.append(("no last word", f"rank {_numbers(status.wordless)}"))
    if status.slowest is not None and len(status.ranks) > 1:
        slow = status.slowest
        work = f"{slow['work_ms']:.1f} ms of own work a step, median {slow['median_ms']:.1f} ms"
        rows.append(("slowest", f"rank {slow['rank']}: {work}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([*lines, *_rank_table(status.ranks)])


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _step(status: RunStatus) -> str:
    if status.iteration is None:
        return "unknown"
    if not status.train_iters:
        return str(status.iteration)
    share = status.iteration / status.train_iters
    eta = "" if status.eta_s is None else f", {format_duration(status.eta_s)} left"
    return f"{status.iteration} of {status.train_iters} ({share:.1%}){eta}"


def _losses(status: RunStatus) -> list[str]:
    width = max(map(len, status.losses), default=0)
    return [
        f"{name:<{width}}  {value if isinstance(value, str) else f'{value:.6g}'}"
        for name, value in status.losses.items()
    ]


def _checkpoint(status: RunStatus) -> list[str]:
    if status.checkpoint is None:
        return ["none that is whole"]
    found = status.checkpoint
    named = "" if found["named"] else ", not the one the tracker names"
    lines = [f"iteration {found['iteration']}: {found['path']}{named}"]
    return lines + [f"newer, not whole: {text}" for text in found["newer"]]


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_RANKS_SHOWN]))
    more = len(ranks) - _RANKS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _rank_table(ranks: list[RankStatus]) -> list[str]:
    """All ranks, or those that are furthest behind."""
    if not ranks:
        return []
    behind = sorted(ranks, key=lambda rank: (rank.iteration, -rank.age_s, rank.rank))
    shown = behind[:_RANKS_SHOWN] if len(ranks) > 2 * _RANKS_SHOWN else ranks
    rows = [("rank", "host", "iteration", "last word", "ago", "work/step")]
    for rank in shown:
        word = rank.kind if rank.exit_code is None else f"end, code {rank.exit_code}"
        work = "-" if rank.work_ms is None else f"{rank.work_ms:.1f} ms"
        age = format_duration(rank.age_s)
        rows.append((str(rank.rank), rank.host or "-", str(rank.iteration), word, age, work))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join(cells).rstrip() for cells in padded]
    if len(shown) < len(ranks):
        lines.append(f"and {len(ranks) - len(shown)} ranks not further behind")
    return ["", *lines]


def format_duration(seconds: float) -> str:
    """Return seconds as 4.2 s, 3 min 20 s, 2 h 05 min or 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"
