"""Functions of Megatron's loop that something of ours stands around."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_standing: set[tuple[str, str]] = set()


def stand_around(module: ModuleType, name: str, around: Callable[..., Any]) -> None:
    """Have `module.name(..)` call around(upstream, ..) from now on; a second call changes nothing.

    It stays for the life of the process, so `around` has to pass straight through to upstream in
    runs that it has nothing to do with. What is stood around later is the outer one.
    """
    key = (f"{module.__name__}.{name}", f"{around.__module__}.{around.__qualname__}")
    if key in _standing:
        return
    upstream = getattr(module, name)

    @functools.wraps(upstream)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(upstream, *args, **kwargs)

    setattr(module, name, call)
    _standing.add(key)
