"""The same arguments, versions, environment and files on every rank, or a table of what differs.

Today's Megatron notices nothing (another --lr trains on), or hangs until a timeout (another batch
size).
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_emo.launch import environment
from megatron_emo.launch.exit_codes import VerdictError
from megatron_emo.launch.verdict import Exchange, format_ranks

_MAY_DIFFER = {
    *("rank", "local_rank", "global_rank"),
    # Written by one rank or by each for itself, and local folders of a host.
    *("tensorboard_dir", "wandb_save_dir", "non_persistent_local_ckpt_dir"),
    *("memory_snapshot_path", "emo_event_dir"),
}
_SHOWN_WIDTH = 80
_MOST_GROUPS = 8


def describe(args: argparse.Namespace | None = None, **files: str) -> dict[str, str]:
    """Return key -> value, in words, of all that has to be alike on every rank.

    Args:
        args: the parsed flags; those that name the rank, or a place that one rank writes, are left
            out.
        files: more, such as cost_embedding_sha256.
    """
    found = {f"version of {name}": value for name, value in environment.versions().items()}
    found |= {f"variable {name}": value for name, value in environment.variables().items()}
    for name, value in sorted(vars(args).items() if args is not None else ()):
        if name not in _MAY_DIFFER and not name.startswith("_"):
            flag = "--" + name.replace("_", "-")
            found[flag] = _hidden(value) if environment.is_secret_name(name) else _in_words(value)
    return found | {name.replace("_", " "): value for name, value in files.items()}


def check_agreement(own: Mapping[str, str], *, rank: int, exchange: Exchange) -> None:
    """Raise on every rank if any key of `own` differs between ranks.

    One exchange of a hash; where hashes differ another, of what the first rank of each has.

    Args:
        rank: this one's.

    Raises:
        VerdictError: with a table of the keys that differ, which ranks have what.
    """
    hashes = exchange(hashlib.sha256(json.dumps(sorted(own.items())).encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(hashes):
        groups.setdefault(text, []).append(number)
    shown = list(groups.values())[:_MOST_GROUPS]
    speakers = {ranks[0] for ranks in shown}
    described = exchange(dict(own) if rank in speakers else None)
    error = VerdictError(_message([(ranks, described[ranks[0]]) for ranks in shown], len(groups)))
    error.is_on_all_ranks = True
    raise error


def differing_keys(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that not all of `found` have, or have otherwise."""
    keys = sorted(set().union(*found))
    return [key for key in keys if len({one.get(key) for one in found}) > 1]


def _message(groups: Sequence[tuple[list[int], Mapping[str, str]]], num_groups: int) -> str:
    rows = [("what", "ranks", "value")]
    for key in differing_keys([found for _, found in groups]):
        having: dict[str | None, list[int]] = {}
        for ranks, found in groups:
            having.setdefault(found.get(key), []).extend(ranks)
        for number, (value, ranks) in enumerate(having.items()):
            shown = "(absent)" if value is None else _shortened(value)
            rows.append((key if number == 0 else "", format_ranks(ranks).split(" ", 1)[1], shown))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    if num_groups > len(groups):
        lines.append(f"  and {num_groups - len(groups)} more sets of ranks, each with other values")
    return "ranks do not agree; start all of them with the same:\n" + "\n".join(lines)


def _shortened(value: str) -> str:
    """At most a line's width, with a hash of the whole where it is cut."""
    value = value.replace("\n", " ")
    if len(value) <= _SHOWN_WIDTH:
        return value or '""'
    mark = hashlib.sha256(value.encode()).hexdigest()[:8]
    return f"{value[: _SHOWN_WIDTH - 15]}... (sha256 {mark})"


def _hidden(value: Any) -> str:
    return f"(not shown; sha256 {hashlib.sha256(_in_words(value).encode()).hexdigest()[:8]})"


def _in_words(value: Any) -> str:
    """The same text for equal values in any process: no addresses, no order of sets."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{k}: {_in_words(v)}" for k, v in sorted(value.items(), key=_key))
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_in_words, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(_in_words, value))) + "}"
    if isinstance(value, type) or isinstance(value, Callable):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}"
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _key(item: tuple[Any, Any]) -> str:
    return str(item[0])
