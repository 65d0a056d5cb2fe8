"""What the steps of a calibration take on a CPU, from what they took for one model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Processor time of one thread, SmolLM2-135M in fp32. More threads take less wall time together,
# and more of processor time.
MEASURED_PARAMETERS = 134.5e6
TRAINING_TOKENS = 70.0
"""A second."""
SCORED_TOKENS = 175.0
"""A second, of perplexity in documents."""
QUESTION_SECONDS = {
    "sst2": 1.3,
    "trec": 0.9,
    "mr": 1.1,
    "tweet_emotion": 1.1,
    "ag_news": 3.1,
    "mmlu": 5.5,
}
"""Few-shot classification, a question with 8 shots, of MMLU with 5."""
OTHER_QUESTION_SECONDS = 2.0
DOCUMENT_TOKENS = {"wikitext": 136.0, "tinystories": 212.0}
OTHER_DOCUMENT_TOKENS = 200.0
START_SECONDS = 15.0
"""Imports, and the weights' hashes."""


@dataclass(frozen=True)
class Cost:
    """Seconds of each kind of task on one thread, in proportion to the parameters."""

    parameters: float

    @property
    def _scale(self) -> float:
        return self.parameters / MEASURED_PARAMETERS

    @property
    def export(self) -> float:
        return 60.0 * self._scale

    def training(self, tokens: int) -> float:
        """Return seconds of a training on so many tokens."""
        return START_SECONDS + tokens * self._scale / TRAINING_TOKENS

    def questions(self, task: str, number: int | None) -> float | None:
        """Return seconds of a task's questions; None where all are asked, however many."""
        if number is None:
            return None
        each = QUESTION_SECONDS.get(task, OTHER_QUESTION_SECONDS)
        return START_SECONDS + number * each * self._scale

    def documents(self, text: str, number: int | None) -> float | None:
        """Return seconds of a text's perplexity; None where all documents are read."""
        if number is None:
            return None
        tokens = number * DOCUMENT_TOKENS.get(text, OTHER_DOCUMENT_TOKENS)
        return START_SECONDS + tokens * self._scale / SCORED_TOKENS


def count_parameters(folder: Path) -> int | None:
    """Return the elements of all tensors in a folder's safetensors files; None if there are none.

    Tied weights, which are stored once, count once.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header: Mapping = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total or None
