"""How sharp a model is: its entropy on texts, its own or given, and the temperature to match it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_emo.evaluation.generation import prompt_ids
from megatron_emo.evaluation.intervals import bootstrap_mean
from megatron_emo.evaluation.models import (
    BATCH_TOKENS,
    LanguageModel,
    Progress,
    Window,
    logit_blocks,
)
from megatron_emo.evaluation.perplexity import ratio_interval, sum_nats
from megatron_emo.evaluation.records import Json, Record

TEMPERATURES = (0.01, 100.0)
"""Where a match is looked for."""
MAX_PASSES = 40


@dataclass(frozen=True)
class Sharpness:
    """Sums over the predictions of each window, [windows] float64."""

    entropy: np.ndarray
    """Of q, nats."""
    top1: np.ndarray
    """The largest probability."""
    slope: np.ndarray
    """d entropy / d log temperature: the variance of log q under q."""
    tokens: np.ndarray

    @property
    def mean_entropy(self) -> float:
        return float(self.entropy.sum() / self.tokens.sum())

    @property
    def mean_slope(self) -> float:
        return float(self.slope.sum() / self.tokens.sum())


def measure_sharpness(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    temperature: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Sharpness:
    """Return sums over all predictions that count, of q = softmax(z / temperature).

    Sums over the vocabulary are accumulated in fp64.

    Raises:
        ValueError: no prediction counts.
    """
    counts = np.array([len(window.targets) for window in windows], dtype=np.float64)
    if not counts.sum():
        raise ValueError("entropy: expected at least 1 predicted token, found 0")
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    for block in logit_blocks(
        model, windows, batch_tokens=batch_tokens, temperature=temperature, progress=progress
    ):
        log_q = block.logits.log_softmax(-1)
        q = log_q.exp()
        entropy = -(q * log_q).sum(-1, dtype=torch.float64)
        centred = log_q + entropy[:, None].to(log_q.dtype)
        slope = (q * centred.square()).sum(-1, dtype=torch.float64)
        values = torch.stack([entropy, q.amax(-1).double(), slope], dim=1)
        sums.index_add_(0, block.window, values.cpu())
    return Sharpness(*sums.numpy().T, tokens=counts)


@dataclass(frozen=True)
class Match:
    """The temperature that was found, and what was measured on the way."""

    temperature: float
    entropy_before: float
    """nats/token at temperature 1."""
    entropy_after: float
    passes: int
    tried: Mapping[float, float] = field(default_factory=dict)
    """{temperature: entropy}"""


def match_temperature(
    measure: Callable[[float], tuple[float, float]], target: float, tolerance: float = 1e-4
) -> Match:
    """Return the temperature at which the mean entropy is `target`, to `tolerance` nats.

    Newton's steps in log temperature, since the entropy's slope comes with it; a step that leaves
    the bracket is replaced by its middle. Entropy rises with temperature, so the match is unique.
    Each step is a pass over the texts: nothing is kept but the means.

    Args:
        measure: temperature -> (mean entropy, its slope in log temperature).

    Raises:
        ValueError: a target that no temperature from 0.01 to 100 gives.
    """
    ends = [math.log(temperature) for temperature in TEMPERATURES]
    low, high = ends
    tried: dict[float, float] = {}
    position = 0.0
    for passes in range(1, MAX_PASSES + 1):
        temperature = math.exp(position)
        entropy, slope = measure(temperature)
        tried[temperature] = entropy
        print(f"temperature {temperature:.6g}: {entropy:.6g} nats/token", file=sys.stderr)
        if abs(entropy - target) <= tolerance:
            return Match(temperature, tried[1.0], entropy, passes, tried)
        if position == ends[int(entropy < target)]:
            break
        low, high = (position, high) if entropy < target else (low, position)
        position = _next_position(position, (target - entropy) / max(slope, 1e-12), low, high, ends)
    raise ValueError(
        f"temperature: expected an entropy of {target:.6g} nats/token at a temperature of "
        f"{TEMPERATURES[0]} to {TEMPERATURES[1]}, found {min(tried.values()):.6g} to "
        f"{max(tried.values()):.6g}"
    )


def _next_position(
    position: float, step: float, low: float, high: float, ends: Sequence[float]
) -> float:
    """Newton's, where it stays within the bracket; an end not yet measured, or the middle."""
    if low < position + step < high:
        return position + step
    end = high if step > 0 else low
    return end if end in ends else (low + high) / 2


def temperature_records(
    match: Match, target: float, tokens: int, settings: Mapping[str, Json]
) -> list[Record]:
    """Return the temperature and the entropies before, after and asked for."""
    settings = {
        **settings,
        "passes": match.passes,
        "tried": {f"{temperature:.8g}": value for temperature, value in match.tried.items()},
    }
    of_q = "mean over the texts' tokens of the entropy of softmax(z/T)"
    rows = [
        ("matched_temperature", match.temperature, "1", f"T at which the {of_q} is the target"),
        ("entropy_before", match.entropy_before, "nats/token", f"{of_q}, T = 1"),
        ("entropy_after", match.entropy_after, "nats/token", f"{of_q}, T the matched temperature"),
        ("entropy_target", target, "nats/token", "what the entropy was to be"),
    ]
    return [Record(*row, tokens, n_unit="tokens", settings=settings) for row in rows]


def generation_windows(
    model: LanguageModel, rows: Sequence[Mapping], max_new_tokens: int
) -> list[Window]:
    """Return a window for each row of `generate`: the predictions that its tokens were drawn from.

    EOS is not among them.
    """
    windows = []
    for row in rows:
        before, _ = prompt_ids(model, row["prompt"], max_new_tokens)
        tokens = before + row["tokens"]
        windows.append(Window(tokens[:-1], row["tokens"], first=len(before) - 1))
    return windows


def generation_records(
    model: LanguageModel,
    rows: Sequence[Mapping],
    max_new_tokens: int,
    settings: Mapping[str, Json],
    *,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Record]:
    """Return length, share that ended, entropy and top-1 mass of q along the model's own texts.

    Entropy and top-1 mass are of softmax(z) at temperature 1, whatever the texts were drawn by.

    Raises:
        ValueError: no continuation has a token.
    """
    windows = generation_windows(model, rows, max_new_tokens)
    lengths = np.array([len(row["tokens"]) for row in rows], dtype=np.float64)
    ended = np.array([row["ended"] for row in rows], dtype=np.float64)
    total = int(lengths.sum())
    if not total:
        raise ValueError("generation_entropy: expected at least 1 generated token, found 0")
    progress = Progress("entropy of generations", total)
    sharpness = measure_sharpness(model, windows, batch_tokens=batch_tokens, progress=progress)
    several = len(rows) > 1
    records = [
        Record(
            *(metric, float(values.mean()), unit, definition, len(rows)),
            n_unit="continuations",
            seed=seed,
            interval=bootstrap_mean(values, seed=seed) if several else None,
            settings=settings,
        )
        for metric, values, unit, definition in (
            ("mean_length", lengths, "tokens", "tokens of a continuation, EOS not counted"),
            ("ended_share", ended, "1", "share of continuations that EOS ended"),
        )
    ]
    for metric, sums, unit, what in (
        ("generation_entropy", sharpness.entropy, "nats/token", "entropy of q"),
        ("generation_top1_mass", sharpness.top1, "1", "largest probability of q"),
    ):
        definition = f"mean {what} = softmax(z) over the generated tokens, under their own model"
        records.append(
            Record(
                *(metric, float(sums.sum() / total), unit, definition, total),
                n_unit="tokens",
                seed=seed,
                interval=ratio_interval(sums, lengths, seed=seed),
                settings=settings,
            )
        )
    return records


def generation_perplexity(
    reference: LanguageModel,
    rows: Sequence[Mapping],
    settings: Mapping[str, Json],
    *,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Record:
    """Return the perplexity of continuations given their prompts under another model.

    A text is split by the reference's own tokenizer; what differs from the prompt alone counts as
    continuation. Where prompt and continuation exceed its context, the begin is not read.

    Raises:
        ValueError: no continuation has a token.
    """
    windows = [_reference_window(reference, row) for row in rows]
    tokens = np.array([len(window.targets) for window in windows], dtype=np.float64)
    if not tokens.sum():
        raise ValueError("generation_perplexity: expected at least 1 generated token, found 0")
    progress = Progress("generation perplexity", int(tokens.sum()))
    nats = sum_nats(reference, windows, batch_tokens=batch_tokens, progress=progress)
    mean = float(nats.sum() / tokens.sum())
    interval = ratio_interval(nats, tokens, seed=seed)
    if interval:
        interval = type(interval)(math.exp(interval.low), math.exp(interval.high))
    return Record(
        "generation_perplexity",
        math.exp(mean),
        "1",
        "exp(nats/tokens) of continuations given prompts under the reference, token-weighted",
        int(tokens.sum()),
        n_unit="tokens",
        seed=seed,
        interval=interval,
        settings={**settings, "reference": reference.name, "reference_sha256": reference.sha256},
    )


def _reference_window(reference: LanguageModel, row: Mapping) -> Window:
    if not row["continuation"]:
        return Window((), ())
    prefix = [] if reference.prefix_id is None else [reference.prefix_id]
    prompt = prefix + reference.encode(row["prompt"])
    ids = prefix + reference.encode(row["text"])
    pairs = enumerate(zip(prompt, ids, strict=False))
    shared = next((index for index, (a, b) in pairs if a != b), min(len(prompt), len(ids)))
    begin = max(0, len(ids) - 1 - (reference.context_length or len(ids)))
    first = max(shared, begin + 1)
    return Window(ids[begin:-1], ids[first:], first=first - 1 - begin)
