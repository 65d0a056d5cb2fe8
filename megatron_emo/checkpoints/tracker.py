"""latest_checkpointed_iteration.txt: which checkpoint of a run's folder is the latest."""

from __future__ import annotations

from pathlib import Path

from megatron_emo.checkpoints.files import write_durably
from megatron_emo.torch_dist import TRACKER

RELEASE = "release"
"""The tracker's word for weights that no run of this folder made; they lie in release/."""

_MAX_BYTES = 64


def read_tracker(root: str | Path) -> int | str | None:
    """Return the iteration that the tracker in `root` names, RELEASE, or None without a tracker.

    Raises:
        ValueError: another content, an empty one among them.
    """
    path = Path(root, TRACKER)
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    text = data.decode("ascii", errors="backslashreplace").strip()
    if text == RELEASE:
        return RELEASE
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{path}: expected an iteration or '{RELEASE}', found {text!r}")
    return int(text)


def write_tracker(root: str | Path, latest: int | str) -> None:
    """Name `latest` in the tracker; whoever reads meanwhile finds the former name or this one.

    Raises:
        OSError: the former name is then still there.
    """
    write_durably(Path(root, TRACKER), str(latest).encode())


def folder_of(root: str | Path, latest: int | str) -> Path:
    """Return the folder of one iteration, or of RELEASE."""
    return Path(root, RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
