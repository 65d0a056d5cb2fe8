"""Held-out cross-entropy of a finished run: exported, scored by document, and cleared away.

Whatever was trained, the same evaluator scores it: nats per token of the same text under the
model's own distribution, never a training loss.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_emo.evaluation.records import Json, Record, hash_file, read_records, write_records
from megatron_emo.scaling.running.finished_runs import FinishedRun

if TYPE_CHECKING:
    from megatron_emo.evaluation.models import LanguageModel
    from megatron_emo.evaluation.perplexity import Strides, Sums

METRICS = ("cross_entropy", "bits_per_byte", "token_perplexity", "byte_perplexity")
LOSS, BITS = METRICS[:2]
_RECIPE = "scored"
"""Among a record's settings: all that decides its value."""


@dataclass(frozen=True)
class ScoreSettings:
    """How runs are scored; the same for all of a study."""

    held_out: Path
    field: str = "text"
    limit: int | None = None
    """Documents, the first ones."""
    window: int | None = None
    """Tokens; None: the model's context, 1,024 at most."""
    stride: int | None = None
    """Tokens; None: half of the window."""
    prefix: str = "none"
    """auto: BOS or EOS before a document; none: its first token is not scored."""
    dtype: str = "float32"
    device: str = "auto"
    batch_tokens: int = 2048
    draws: int = 1000
    """Resamples of documents for the records' intervals."""
    seed: int = 0
    tokenizer: str | None = None
    """None: the run's own, where its arguments say."""
    keep: bool = False
    """Leave the exported folder."""

    def recipe(self, run: FinishedRun, held_out_sha256: str) -> dict[str, Json]:
        """Return all that a run's score depends on, as JSON.

        Device and batch are not among it: they move the last bits alone.
        """
        names = ("field", "limit", "window", "stride", "prefix", "dtype", "draws", "seed")
        return {
            **{name: getattr(self, name) for name in names},
            "held_out_sha256": held_out_sha256,
            "hash": run.hash,
            "iteration": run.iteration,
            "checkpoint": fingerprint_checkpoint(run),
        }


def fingerprint_checkpoint(run: FinishedRun) -> str | None:
    """Return a hash of names, sizes and times of a run's last checkpoint, None of no files."""
    from megatron_emo.checkpoints.tracker import folder_of

    folder = folder_of(run.checkpoints, run.iteration)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return None
    rows = [
        [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def read_score(run: FinishedRun, recipe: Mapping[str, Json]) -> list[Record] | None:
    """Return a run's records, None where it has none that this recipe made.

    A score outlives its checkpoint: one that is gone is no reason to doubt it.
    """
    if not run.score.is_file() or not run.documents.is_file():
        return None
    try:
        records = read_records([run.score])
    except ValueError:
        return None
    if {record.metric for record in records} != set(METRICS):
        return None
    is_gone = recipe["checkpoint"] is None
    for record in records:
        made_by = dict(record.settings.get(_RECIPE) or {})
        if is_gone:
            made_by["checkpoint"] = None
        if made_by != recipe:
            return None
    return records


def score_run(run: FinishedRun, settings: ScoreSettings) -> list[Record]:
    """Export a run's last checkpoint, score the held-out documents and write score.json.

    Leaves documents.jsonl, a row a document, in the form that `compare` reads. A run that was cut
    off is gone on with; score.json appears last, so that with it everything is there.

    Raises:
        ValueError: no checkpoint, one that cannot be exported, or a loss that is not finite; the
            run is named.
    """
    try:
        return _score(run, settings)
    except (ValueError, OSError) as error:
        raise ValueError(f"{run.name}: {error}") from error


def _score(run: FinishedRun, settings: ScoreSettings) -> list[Record]:
    from megatron_emo.evaluation.models import complete_records, load_model
    from megatron_emo.evaluation.perplexity import Strides, perplexity_records

    begun = time.monotonic()
    recipe = settings.recipe(run, hash_held_out(settings.held_out))
    _export(run, settings)
    model = load_model(run.exported, dtype=settings.dtype, device=settings.device)
    strides = Strides.choose(model.context_length, settings.window, settings.stride)
    sums = _score_documents(run, model, settings, strides, recipe)
    described = {
        "window": strides.window,
        "stride": strides.stride,
        "prefix": settings.prefix,
        "dtype": settings.dtype,
        "device": str(model.device),
        "unscored_first_tokens": sums.unscored,
        "iteration": run.iteration,
        _RECIPE: recipe,
    }
    records = perplexity_records(
        sums, described, metrics=METRICS, draws=settings.draws, seed=settings.seed
    )
    labels = {"run": run.name, "label": run.label, "objective": run.objective}
    labels |= {"seed": str(run.seed), "size": str(run.size)}
    if run.budget is not None:
        labels["budget"] = f"{run.budget:g}"
    records = complete_records(
        records, model, [settings.held_out], labels=labels, seconds=time.monotonic() - begun
    )
    records = [replace(record, model=run.name) for record in records]
    write_records(run.score, records)
    if not settings.keep:
        shutil.rmtree(run.exported)
    return records


def _export(run: FinishedRun, settings: ScoreSettings) -> None:
    from megatron_emo.conversion.export_hf import ExportOptions, export_hf

    # What a scoring that was cut off left is made again: it may be of another checkpoint.
    options = ExportOptions(iteration=run.iteration, tokenizer=settings.tokenizer, overwrite=True)
    export_hf(run.checkpoints, run.exported, options, say=lambda _: None)


def _score_documents(
    run: FinishedRun,
    model: LanguageModel,
    settings: ScoreSettings,
    strides: Strides,
    recipe: Mapping[str, Json],
) -> Sums:
    from megatron_emo.evaluation.perplexity import open_documents, score_documents

    texts = read_held_out(settings)
    recipe = {**recipe, "model": model.sha256}
    try:
        rows = open_documents(run.documents, recipe, len(texts), resume=True)
    except ValueError:  # rows of another checkpoint, text or settings
        rows = open_documents(run.documents, recipe, len(texts), overwrite=True)
    sums = score_documents(
        *(model, texts, strides),
        prefix_id=model.prefix_id if settings.prefix == "auto" else None,
        batch_tokens=settings.batch_tokens,
        rows=rows,
    )
    rows.finish()
    return sums


def read_held_out(settings: ScoreSettings) -> list[str]:
    """Return the held-out documents.

    Raises:
        ValueError, OSError: as `read_texts`.
    """
    return _read_texts(settings.held_out, settings.field, settings.limit)


@lru_cache(maxsize=1)
def _read_texts(path: Path, field: str, limit: int | None) -> list[str]:
    from megatron_emo.evaluation.texts import read_texts

    return read_texts(path, field, limit)


@lru_cache(maxsize=1)
def hash_held_out(path: Path) -> str:
    """Return the sha256 of the held-out file."""
    return hash_file(path)
