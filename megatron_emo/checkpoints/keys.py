"""Whether a checkpoint holds the tensors that a model asks for: those, and no others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...] | None]
"""Global shape by name; None for what is no tensor."""

_SHOWN = 10
_NOT_OF_THE_MODEL = ("common_state", "rng_state", "rerun_state_machine_state")
_OPTIMIZER = ("optimizer.", "chained_")


def compare_keys(asked: Shapes, stored: Shapes) -> list[str]:
    """Return what differs between what a run asks for and a checkpoint stores; [] if nothing.

    What is the run's and not the model's, random states among them, is left to who restores it:
    whether it is asked for depends on flags and layout. So is the optimizer's where none is asked
    for, and what FP8 kernels keep of past scales (_extra_state), where only the checkpoint has it.
    """
    asked, stored = _of_the_model(asked), _of_the_model(stored)
    if not any(name.startswith(_OPTIMIZER) for name in asked):
        stored = {name: x for name, x in stored.items() if not name.startswith(_OPTIMIZER)}
    absent = sorted(asked.keys() - stored.keys())
    left = sorted(x for x in stored.keys() - asked.keys() if not x.endswith("_extra_state"))
    problems = []
    if absent:
        problems.append(f"not in the checkpoint: {_listed(absent, asked, left)}")
    if left:
        problems.append(f"in the checkpoint, and of no part of this model: {_listed(left, stored)}")
    shapes = [
        f"{name} is {list(stored[name])} in the checkpoint, {list(asked[name])} in the model"
        for name in sorted(asked.keys() & stored.keys())
        if asked[name] is not None and stored[name] is not None and asked[name] != stored[name]
    ]
    return problems + _shortened(shapes)


def check_vocabulary(
    name: str, stored_rows: int, vocab_size: int, multiple: int | None
) -> str | None:
    """Return why rows of an embedding or a head are not of this vocabulary, None if they may be.

    Their number includes padding, which depends on the layout that saved them, so that Megatron
    accepts any other and fills up with zeros.

    Args:
        vocab_size: the tokenizer's, before padding.
        multiple: of what the checkpoint's layout padded to; None if that is not known.
    """
    upper = vocab_size + multiple if multiple is not None else None
    if vocab_size <= stored_rows and (upper is None or stored_rows < upper):
        return None
    padded = f" to {upper - 1} with padding" if upper is not None else " or more"
    return (
        f"{name} has {stored_rows} rows in the checkpoint, expected {vocab_size}{padded} for a "
        f"vocabulary of {vocab_size}"
    )


def _of_the_model(shapes: Shapes) -> dict[str, tuple[int, ...] | None]:
    return {name: x for name, x in shapes.items() if not name.endswith(_NOT_OF_THE_MODEL)}


def _listed(names: list[str], shapes: Shapes, candidates: list[str] | None = None) -> str:
    words = []
    for name in names:
        shape = shapes[name]
        like = [x for x in candidates or () if x not in shapes]
        near = difflib.get_close_matches(name, like, n=1, cutoff=0.8)
        words.append(
            name
            + (f" {list(shape)}" if shape is not None else "")
            + (f" (renamed from {near[0]}?)" if near else "")
        )
    return ", ".join(_shortened(words))


def _shortened(items: list[str]) -> list[str]:
    more = len(items) - _SHOWN
    return items if more <= 0 else [*items[:_SHOWN], f"and {more} more"]
