"""Losses by document of paired runs, and intervals over documents and seeds together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_emo.evaluation.records import Interval
from megatron_emo.evaluation.rows import read_rows
from megatron_emo.scaling.comparison.pairs import Pairs, Runs
from megatron_emo.scaling.comparison.resampling import PairSampler
from megatron_emo.scaling.laws.bootstrap import percentile_interval

TOLERANCE = 1e-3
"""Of a run's loss from that of its documents, relative: tables are rounded."""


@dataclass(frozen=True)
class DocumentPairs:
    """Nats of the other minus nats of the baseline."""

    nats: np.ndarray
    """float64 [pairs, documents]."""
    tokens: np.ndarray
    """float64 [documents], the same for all runs."""

    @property
    def difference(self) -> float:
        """Mean over pairs, nats/token."""
        return float(self.nats.mean(axis=0).sum() / self.tokens.sum())

    def interval(self, sampler: PairSampler, draws: int, level: float, seed: int) -> Interval:
        """Return the percentile interval of resampled pairs and, apart from them, documents.

        Every run saw the same documents: a draw of documents is one for all pairs.
        """
        rng = np.random.default_rng([seed, 2])
        num_pairs, num_documents = self.nats.shape
        found = np.empty(draws)
        for draw in range(draws):
            rows = sampler.draw() if num_pairs > 1 else np.ones(1)
            picked = rng.integers(0, num_documents, num_documents)
            columns = np.bincount(picked, minlength=num_documents)
            found[draw] = rows @ self.nats @ columns / (num_pairs * (self.tokens @ columns))
        return percentile_interval(found, level)


def read_document_pairs(pairs: Pairs) -> DocumentPairs | None:
    """Return the documents of all pairs, None where the table names none.

    Raises:
        ValueError: other documents or tokens in some run, or a run whose documents do not give its
            loss.
        FileNotFoundError: a file that is not there.
    """
    if pairs.base.documents is None:
        return None
    first: tuple[Path, list, np.ndarray] | None = None
    sides = []
    for runs in (pairs.base, pairs.other):
        nats = []
        for index, path in enumerate(runs.documents):
            keys, tokens, values = _read_documents(path)
            first = first or (path, keys, tokens)
            if keys != first[1] or not np.array_equal(tokens, first[2]):
                raise ValueError(f"{path}: expected the documents and tokens of {first[0]}")
            nats.append(values)
            _check_loss(runs, index, float(values.sum() / tokens.sum()), path)
        sides.append(np.array(nats))
    return DocumentPairs(sides[1] - sides[0], first[2])


def _read_documents(path: Path) -> tuple[list[tuple], np.ndarray, np.ndarray]:
    """Return (id and hash, tokens, nats) of each document."""
    rows = read_rows(path)
    try:
        keys = [(row["id"], row["sha256"]) for row in rows]
        tokens, nats = (np.array([row[k] for row in rows], float) for k in ("tokens", "nats"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected id, sha256, tokens and nats: {error!r}") from error
    if not tokens.sum() > 0:
        raise ValueError(f"{path}: expected documents with tokens, got {len(rows)} without")
    return keys, tokens, nats


def _check_loss(runs: Runs, index: int, loss: float, path: Path) -> None:
    if abs(loss - runs.loss[index]) > TOLERANCE * runs.loss[index]:
        raise ValueError(
            f"{path}: its documents have {loss:.5f} nats/token, expected the "
            f"{runs.loss[index]:.5f} of line {runs.lines[index]}"
        )
