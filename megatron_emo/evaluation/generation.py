"""Continuations of prompts by transformers' `generate`: each prompt has its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megatron_emo.evaluation.models import LanguageModel, Progress
from megatron_emo.evaluation.records import Json
from megatron_emo.evaluation.rows import Rows

MODES: dict[str, dict[str, float | int | None]] = {
    "unbiased": {},
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.95},
    "typical": {"temperature": 1.0, "typical_p": 0.2},
    "sample": {"temperature": 1.0, "top_k": None, "top_p": None, "typical_p": None},
    "greedy": {},
    "beam": {"num_beams": 4},
}
"""Ways to decode and the settings that each has, with defaults as in the EMO authors' released
script, which has no beams. Of the settings of sample those that are None are not applied."""

DEFAULT_NEW_TOKENS = 128
"""Where nobody says how many, and the context leaves as many."""

_SETTINGS = ("temperature", "top_k", "top_p", "typical_p", "num_beams")


@dataclass(frozen=True)
class Decoding:
    """How continuations are chosen. A setting that the mode does not have is None."""

    mode: str = "unbiased"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    num_beams: int | None = None
    max_new_tokens: int = 80
    min_new_tokens: int = 0
    """EOS cannot come before: not unbiased where it would have."""
    num_samples: int = 1
    """Of each prompt."""
    seed: int = 0

    @classmethod
    def choose(cls, mode: str, **settings: Any) -> Decoding:
        """Return the decoding with defaults filled in where `settings` are None.

        Raises:
            ValueError: a setting out of range, or that the mode does not have.
        """
        if mode not in MODES:
            raise ValueError(f"--mode: expected one of {', '.join(MODES)}, got {mode!r}")
        for name in _SETTINGS:
            value = settings.get(name)
            if value is None:
                settings[name] = MODES[mode].get(name)
            elif name not in MODES[mode]:
                raise ValueError(f"{_flag(name)}: --mode {mode} does not have it, got {value}")
        decoding = cls(mode, **settings)
        decoding._check()
        return decoding

    def _check(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature: expected above 0 and finite, got {self.temperature}")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{_flag(name)}: expected above 0 and up to 1, got {value}")
        for name in ("top_k", "num_beams", "max_new_tokens", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)}: expected at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected at least 0, got {self.seed}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"--min-new-tokens: expected 0 to {self.max_new_tokens} (--max-new-tokens), "
                f"got {self.min_new_tokens}"
            )
        if self.num_samples > 1 and self.mode in ("greedy", "beam"):
            raise ValueError(
                f"--num-samples: expected 1 with --mode {self.mode}, got {self.num_samples}"
            )

    def to_json(self) -> dict[str, Json]:
        """Return the settings that the mode has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _StepCounter:
    """A logits processor that changes nothing: `generate` calls it once a step."""

    def __init__(self, progress: Progress, num_rows: int) -> None:
        self._progress, self._num_rows, self._steps = progress, num_rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._progress.add(self._num_rows)
        self._steps += 1
        return scores

    def finish(self, steps: int) -> None:
        """Count those that were not needed, since all rows had ended."""
        self._progress.add(self._num_rows * (steps - self._steps))


class _SeededChoice:
    """A logits processor that leaves one token: drawn by inverse CDF, a number per row and step.

    `generate` itself draws all rows from one generator, so that what a prompt gets would depend on
    its neighbours.
    """

    def __init__(self, uniforms: np.ndarray, width: int) -> None:
        """uniforms: [rows, steps] in [0, 1); width: tokens before the first step."""
        self._uniforms, self._width = torch.from_numpy(uniforms), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        uniform = self._uniforms[:, input_ids.shape[1] - self._width].to(scores.device)
        # The sum may round to less than 1: never point beyond the last token that has any mass.
        point = uniform.clamp(max=1 - 1e-12)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, point, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def generate(
    model: LanguageModel,
    prompts: Sequence[str],
    decoding: Decoding,
    rows: Rows,
    *,
    batch_size: int = 16,
    seconds: float = 5.0,
) -> list[dict]:
    """Return a row for each prompt and sample, in their order; `rows` gets and keeps them.

    The random numbers of a row follow from the seed, the prompt's index and the sample alone.
    Batches differ in padding, which changes logits in their last digits only.

    Args:
        rows: a RowFile made with group=batch_size.
        seconds: between lines of progress.

    Raises:
        ValueError: a prompt without tokens where the tokenizer has neither EOS nor BOS, ids that
            the model does not have, or a context too short for --max-new-tokens.
    """
    jobs = [
        (index, sample) for index in range(len(prompts)) for sample in range(decoding.num_samples)
    ]
    found = list(rows.found)
    steps = decoding.max_new_tokens
    progress = Progress("generate", (len(jobs) - len(found)) * steps, "tokens at most", seconds)
    for begin in range(len(found), len(jobs), batch_size):
        batch = jobs[begin : begin + batch_size]
        ids = [prompt_ids(model, prompts[index], steps)[0] for index, _ in batch]
        draws = [np.random.default_rng([decoding.seed, *job]).random(steps) for job in batch]
        counter = _StepCounter(progress, len(batch))
        continuations = _continue_batch(model, ids, decoding, np.stack(draws), counter)
        counter.finish(steps)
        new = [
            {"id": index, "sample": sample, **_describe(model, prompts[index], before, after)}
            for (index, sample), before, after in zip(batch, ids, continuations, strict=True)
        ]
        rows.append(new)
        found += new
    return found


def prompt_ids(model: LanguageModel, prompt: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """Return the ids that a prompt is read as, and whether its begin was cut off to fit.

    Raises:
        ValueError: as `whole_prompt_ids`, or no room for any.
    """
    ids = whole_prompt_ids(model, prompt)
    if model.context_length is None:
        return ids, False
    room = model.context_length - max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max-new-tokens: expected below {model.context_length}, the context of "
            f"{model.name}, got {max_new_tokens}"
        )
    return ids[-room:], len(ids) > room


def whole_prompt_ids(model: LanguageModel, prompt: str) -> list[int]:
    """Return the ids of a prompt, never none.

    What the tokenizer puts before any text is kept, what it puts behind is not. Where there is
    neither that nor a token, it is EOS, behind which Megatron's datasets begin a text, else BOS.

    Raises:
        ValueError: no ids at all, or one that the model has no row for.
    """
    plain = model.encode(prompt)
    # Of an empty text nobody can tell what stands before it from what stands behind.
    ids = _put_before(model, prompt if plain else "a") + plain
    if not ids:
        ends = (model.tokenizer.eos_token_id, model.tokenizer.bos_token_id)
        ids = [end for end in ends if end is not None][:1]
    if not ids:
        raise ValueError(f"prompt {prompt!r}: has no tokens, and the tokenizer no EOS or BOS")
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"prompt {prompt[:40]!r}: the tokenizer gives id {max(ids)}, expected ids below the "
            f"vocab_size {model.vocab_size} of {model.name}"
        )
    return ids


def _put_before(model: LanguageModel, text: str) -> list[int]:
    plain = model.encode(text)
    whole = model.tokenizer(text, verbose=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1) if plain else ()
    return whole[: next((k for k in starts if whole[k : k + len(plain)] == plain), 0)]


def fit_new_tokens(model: LanguageModel, prompts: Sequence[str], asked: int | None = None) -> int:
    """Return how many tokens to make so that no prompt has to be cut.

    Args:
        asked: None for DEFAULT_NEW_TOKENS, or fewer where the longest prompt leaves fewer.

    Raises:
        ValueError: no room, or less than asked; as `whole_prompt_ids`.
    """
    longest = max(len(whole_prompt_ids(model, prompt)) for prompt in prompts)
    if model.context_length is None:
        return DEFAULT_NEW_TOKENS if asked is None else asked
    room = model.context_length - longest
    if room < 1:
        raise ValueError(
            f"prompt: found one of {longest} tokens, expected fewer than the "
            f"{model.context_length} positions of {model.name}"
        )
    if asked is not None and asked > room:
        raise ValueError(
            f"--max-new-tokens: expected at most {room}, what the longest prompt leaves of the "
            f"{model.context_length} positions of {model.name}, got {asked}"
        )
    return min(DEFAULT_NEW_TOKENS, room) if asked is None else asked


def _continue_batch(
    model: LanguageModel,
    ids: Sequence[list[int]],
    decoding: Decoding,
    uniforms: np.ndarray,
    counter: _StepCounter,
) -> list[list[int]]:
    """New ids of each row, up to and with EOS. Padded on the left."""
    from transformers import GenerationConfig

    ends = _end_ids(model)
    pad = model.tokenizer.pad_token_id
    special = {"eos_token_id": ends or None, "pad_token_id": 0 if pad is None else pad}
    # A folder's own settings, as a repetition penalty, would fill in what is not set here.
    model.model.generation_config = GenerationConfig(**special)
    config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams or 1,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        **special,
    )
    tokens, mask = _pad_left(ids, special["pad_token_id"])
    width = tokens.shape[1]
    with torch.inference_mode():
        out = model.model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=[counter, *_processors(decoding, uniforms, width)],
        )
    return [_cut_after_end(row, ends) for row in out[:, width:].tolist()]


def _pad_left(ids: Sequence[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [rows, longest row]."""
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), padding)
    mask = torch.zeros_like(tokens)
    for row, known in enumerate(ids):
        tokens[row, width - len(known) :] = torch.tensor(known)
        mask[row, width - len(known) :] = 1
    return tokens, mask


def _end_ids(model: LanguageModel) -> list[int]:
    """EOS of the generation settings, which may be several, else the tokenizer's."""
    end = model.model.generation_config.eos_token_id
    end = model.tokenizer.eos_token_id if end is None else end
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _processors(decoding: Decoding, uniforms: np.ndarray, width: int) -> list[Any]:
    """transformers' own warpers in its own order, then the draw; none for greedy and beams."""
    from transformers import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    if decoding.mode in ("greedy", "beam"):
        return []
    warpers = []
    if decoding.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k is not None:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p is not None and decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(float(decoding.top_p)))
    if decoding.typical_p is not None and decoding.typical_p < 1:
        warpers.append(TypicalLogitsWarper(float(decoding.typical_p)))
    return [*warpers, _SeededChoice(uniforms, width)]


def _cut_after_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    first = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]


def _describe(
    model: LanguageModel, prompt: str, before: list[int], after: list[int]
) -> dict[str, Json]:
    """The text of new ids, decoded after the prompt's: alone they may lose a leading blank."""
    has_ended = bool(after) and after[-1] in _end_ids(model)
    tokens = after[:-1] if has_ended else after
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    known = model.tokenizer.decode(before, **options)
    whole = model.tokenizer.decode(before + tokens, **options)
    alone = model.tokenizer.decode(tokens, **options)
    continuation = whole[len(known) :] if whole.startswith(known) else alone
    return {
        "prompt": prompt,
        "continuation": continuation,
        "text": prompt + continuation,
        "tokens": tokens,
        "ended": has_ended,
    }
