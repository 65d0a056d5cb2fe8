"""Log-probabilities of a question's prompts, which differ in the answer alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_CHUNK = 512
"""Tokens of a prompt that are run at a time: [512, vocabulary] logits in memory."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens."""

    ids: list[int]
    answer_start: int
    """Where the tokens begin that are not those of the question alone."""


@dataclass(frozen=True)
class Score:
    """What the model says of one prompt, in nats."""

    nll: float
    """Sum over all tokens but the first, which nothing stands before."""
    num_tokens: int
    """All, the first too."""
    answer_nll: float
    """Sum over the tokens from answer_start on."""
    num_answer_tokens: int

    @property
    def ppl(self) -> float:
        """Nats per token as OpenICL's PPLInferencer: over all tokens, the first with 0."""
        return self.nll / self.num_tokens


def tokenize(tokenizer: Any, question: str, answered: str) -> Prompt:
    """Return `answered` in tokens, and where they part from those of `question`.

    A word of the answer may merge with the end of the question: the answer then begins with the
    merged token. What the tokenizer adds to a text stands at its beginning, as <s>, not its end.

    Raises:
        ValueError: an answer without a token of its own.
    """
    ids = list(tokenizer(answered)["input_ids"])
    answer_start = common_length([ids, tokenizer(question)["input_ids"]])
    if answer_start == len(ids):
        raise ValueError(f"labels: the tokenizer has no token for the end of {answered[-60:]!r}")
    return Prompt(ids, answer_start)


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many leading elements all sequences share."""
    length = 0
    for elements in zip(*sequences, strict=False):
        if any(element != elements[0] for element in elements):
            break
        length += 1
    return length


def common_start(prompts: Sequence[Prompt]) -> int:
    """Return how many leading tokens prompts share, such that each has one more."""
    shortest = min(len(prompt.ids) for prompt in prompts)
    return min(common_length([prompt.ids for prompt in prompts]), shortest - 1)


class PromptScorer:
    """Scores prompts, and runs what they share once: of a question's answers, and of its shots.

    Keys and values of the last question's shared part are kept; where the next one begins alike, as
    with the same shots before all questions, it goes on from there. Models whose cache cannot be
    cut back (sliding windows, recurrent states) run each prompt whole.
    """

    def __init__(self, model: Any, reuse: bool = True) -> None:
        self.model = model
        self.can_reuse = reuse
        self._cache: Any = None
        self._ids: list[int] = []
        self._nll: list[float] = []

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt]) -> list[Score]:
        """Return a score for each prompt.

        Logits are taken in float32, those of a float64 model in float64.

        Raises:
            ValueError: an answer with nothing before it, or a prompt whose score is not finite.
        """
        if any(prompt.answer_start < 1 for prompt in prompts):
            raise ValueError(
                "template: an answer needs a token before it; put words before {label}"
            )
        shared = common_start(prompts)
        if self.can_reuse and shared > 0 and (logits := self._run_shared(prompts[0].ids[:shared])):
            parts = self._run_answers([prompt.ids[shared:] for prompt in prompts], logits[0])
            losses = [self._nll + part for part in parts]
        else:
            losses = [self._run_whole(prompt.ids) for prompt in prompts]
        scores = []
        for prompt, nll in zip(prompts, losses, strict=True):
            answer = nll[prompt.answer_start :]
            scores.append(Score(sum(nll), len(nll), sum(answer), len(answer)))
        if not all(score.nll < float("inf") for score in scores):
            raise ValueError("model: expected finite log-probabilities, got NaN or infinity")
        return scores

    def _run_shared(self, ids: list[int]) -> list[torch.Tensor]:
        """Bring the cache to exactly `ids`; return [the logits after them], or [] if it cannot be.

        The last token both have in common runs again: it foretells the first new one.
        """
        kept = max(common_length([self._ids, ids]) - 1, 0)
        if self._cache is None:
            kept = 0
        elif kept and kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))
        if kept == 0:
            self._cache = None
        nll, last = (self._nll[: kept + 1] if kept else [0.0]), None
        self._ids = self._ids[:kept]
        for start in range(kept, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            out = self._forward([chunk], self._cache)
            self._cache = out.past_key_values
            if not _is_croppable(self._cache):
                self.can_reuse, self._cache, self._ids = False, None, []
                return []
            following = ids[start + 1 : start + 1 + len(chunk)]
            nll += _nll(out.logits[0, : len(following)], following)
            last = out.logits[0, -1]
        self._ids, self._nll = list(ids), nll
        return [last]

    def _run_answers(self, answers: list[list[int]], first: torch.Tensor) -> list[list[float]]:
        """Return the nats of each answer's tokens after the shared part.

        The last token of an answer foretells nothing that is asked, and is not run.
        """
        nll = [_nll(first[None], answer[:1]) for answer in answers]
        width = max(len(answer) for answer in answers) - 1
        if width == 0:
            return nll
        rows = [answer[:-1] + [0] * (width - len(answer) + 1) for answer in answers]
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        logits = self._forward(rows, cache).logits
        return [
            head + _nll(logits[row, : len(answer) - 1], answer[1:])
            for row, (head, answer) in enumerate(zip(nll, answers, strict=True))
        ]

    def _run_whole(self, ids: list[int]) -> list[float]:
        logits = self.model(self._tensor([ids]), use_cache=False).logits[0]
        return [0.0] + _nll(logits[:-1], ids[1:])

    def _forward(self, rows: list[list[int]], cache: Any) -> Any:
        """Rows are padded at their end, where causal attention keeps padding out of sight."""
        return self.model(self._tensor(rows), past_key_values=cache, use_cache=True)

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)


def _nll(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """Return -log p of ids [n] under logits [n, vocabulary]."""
    if not ids:
        return []
    target = torch.tensor(ids, device=logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, target, reduction="none").tolist()


def _is_croppable(cache: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return isinstance(cache, DynamicCache) and all(type(x) is DynamicLayer for x in cache.layers)
