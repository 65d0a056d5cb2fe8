"""The state of a source that a cost embedding has: a commit or an iteration, and whose rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.cost_embedding.sources import head_names, megatron_head, resolve_hf_dir
from megatron_emo.foreign_files import read_json_object
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DOWNLOAD_NOTE = Path(".cache", "huggingface", "download", "config.json.metadata")
"""What the hub's client leaves in a folder that it downloads into; the commit comes first."""


@dataclass(frozen=True)
class Provenance:
    """What a source says about the table that is taken from it."""

    revision: str = ""
    """See `CostEmbeddingInfo.revision`."""
    tied: bool | None = None
    """See `CostEmbeddingInfo.tied`."""


def provenance_of_hf(model_dir: str | Path) -> Provenance:
    """Return the commit of a folder of the hub, and whether its model's head is its embedding.

    The commit is in the path of a snapshot of the hub's cache (.../snapshots/COMMIT), in what a
    download into a folder of its own leaves there, or in config.json under _commit_hash.

    Raises:
        FileNotFoundError, ValueError: as `table_from_hf`.
    """
    folder = resolve_hf_dir(model_dir)
    *_, tied = head_names(folder)
    return Provenance(_hub_commit(folder), tied)


def provenance_of_torch_dist(
    checkpoint_dir: str | Path, iteration: int | None = None
) -> Provenance:
    """Return the iteration of a checkpoint, or "release", and whether its head is its embedding.

    Raises:
        FileNotFoundError, ValueError: as `table_from_torch_dist`.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir, iteration)
    tied = not megatron_head(folder).endswith("output_layer.weight")
    if folder.name == "release":
        return Provenance("release", tied)
    found = re.fullmatch(r"iter_(\d+)", folder.name)
    number = int(found[1]) if found else getattr(read_arguments(folder), "iteration", None)
    return Provenance("" if number is None else f"iteration {number}", tied)


def _hub_commit(folder: Path) -> str:
    """The commit of a folder, "" where nothing says it."""
    place, note = folder.absolute(), folder / _DOWNLOAD_NOTE
    candidates = [place.name] if place.parent.name == "snapshots" else []
    candidates += note.read_text().splitlines()[:1] if note.is_file() else []
    config = read_json_object(folder / "config.json")
    candidates.append(str(config.get("_commit_hash", "")))
    return next((word for word in candidates if _COMMIT.fullmatch(word)), "")
