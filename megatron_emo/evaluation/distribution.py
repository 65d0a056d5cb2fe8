"""How far a model's next-token distributions lie from a reference model's, along given texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_emo.evaluation.models import (
    BATCH_TOKENS,
    LanguageModel,
    Progress,
    Window,
    check_same_ids,
    logit_blocks,
)
from megatron_emo.evaluation.perplexity import ratio_interval
from megatron_emo.evaluation.records import Json, Record

MIN_WORDS = 20
MAX_TOKENS = 500
CONVENTIONS = ("tokens", "emo")

# name: (unit, definition for one position; p is the reference, q the model, y the text's token)
MEASURES: dict[str, tuple[str, str]] = {
    "forward_cross_entropy": ("nats/token", "-sum_v p log q"),
    "reverse_cross_entropy": ("nats/token", "-sum_v q log p"),
    "tvd": ("1", "1/2 sum_v |p - q|"),
    "forward_kl": ("nats/token", "sum_v p (log p - log q)"),
    "reverse_kl": ("nats/token", "sum_v q (log q - log p)"),
    "js": ("nats/token", "1/2 KL(p||m) + 1/2 KL(q||m), m = (p + q)/2"),
    "entropy": ("nats/token", "-sum_v q log q"),
    "reference_entropy": ("nats/token", "-sum_v p log p"),
    "top1_mass": ("1", "max_v q"),
    "cross_entropy": ("nats/token", "-log q_y"),
    "reference_cross_entropy": ("nats/token", "-log p_y"),
}
_OF_TEXT = ("cross_entropy", "reference_cross_entropy")
_HOW = {
    "tokens": "mean over all predicted tokens",
    "emo": (
        "mean over a text's positions, then over texts, as the released distribution_measures: "
        "from the second position to the one after the last token; of the text's own tokens, all "
        "but the first"
    ),
}
_LEGEND = "p the reference, q the model, v the whole vocabulary, y the text's token"


@dataclass(frozen=True)
class Selection:
    """Texts that are measured."""

    windows: list[Window]
    """One for each text."""
    num_short: int
    """Left out: fewer words than the least."""
    num_long: int
    """Left out: more tokens than the most, or than a context holds."""


def select_texts(
    model: LanguageModel,
    reference: LanguageModel,
    texts: Sequence[str],
    *,
    convention: str = "tokens",
    min_words: int = MIN_WORDS,
    max_tokens: int = MAX_TOKENS,
) -> Selection:
    """Return a window for each text of at least `min_words` and at most `max_tokens`.

    With `tokens` a text is read after BOS, or EOS where there is none, and each of its tokens is
    predicted; with `emo` it is read as the tokenizer gives it, words are what single blanks part,
    and all positions are kept.

    Raises:
        ValueError: an unknown convention, texts that the two split differently, or no text left.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"--convention: expected one of {CONVENTIONS}, got {convention!r}")
    contexts = [m.context_length for m in (model, reference) if m.context_length]
    most = min([max_tokens, *contexts])
    windows, short = [], 0
    kept = [t for t in texts if len(t.split(" " if convention == "emo" else None)) >= min_words]
    short = len(texts) - len(kept)
    for text in kept:
        check_same_ids(model, reference, text, "--reference")
        window = _window(model, text, convention, len(windows))
        if len(window.tokens) <= most and window.targets:
            windows.append(window)
    if not windows:
        raise ValueError(
            f"distribution: expected at least 1 text of --min-words {min_words} and at most "
            f"--max-tokens {most}, found 0 of {len(texts)}: {short} too short"
        )
    return Selection(windows, short, len(kept) - len(windows))


def _window(model: LanguageModel, text: str, convention: str, document: int) -> Window:
    if convention == "emo":
        ids = model.tokenizer(text, verbose=False)["input_ids"]
        return Window(ids, [*ids[1:], -1], document=document)
    ids = model.encode(text)
    ids = ids if model.prefix_id is None else [model.prefix_id, *ids]
    return Window(ids[:-1], ids[1:], document=document)


def measure_distributions(
    model: LanguageModel,
    reference: LanguageModel,
    windows: Sequence[Window],
    *,
    temperature: float = 1.0,
    convention: str = "tokens",
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {measure: (sum over a window's positions, number of them)}, arrays [windows] float64.

    Log-softmax is fp32, sums over the vocabulary and over positions fp64. Logits beyond the
    narrower of two vocabularies that differ in padding alone are left out of both.

    Args:
        temperature: the model's; the reference's is 1.
    """
    progress = Progress("distribution", sum(len(window.targets) for window in windows))
    sums = torch.zeros(len(windows), len(MEASURES), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    first = torch.ones(len(windows), dtype=torch.bool)
    blocks = zip(
        logit_blocks(
            model, windows, batch_tokens=batch_tokens, temperature=temperature, progress=progress
        ),
        logit_blocks(reference, windows, batch_tokens=batch_tokens),
        strict=True,
    )
    for block, other in blocks:
        values = compare_logits(block.logits, other.logits.to(block.logits.device), block.target)
        is_counted = _counted(block.window, block.target, first, convention)
        sums.index_add_(0, block.window, values.cpu().where(is_counted, 0.0))
        counts.index_add_(0, block.window, is_counted.double())
    return {
        name: (sums[:, column].numpy(), counts[:, column].numpy())
        for column, name in enumerate(MEASURES)
    }


def _counted(
    window: torch.Tensor, target: torch.Tensor, first: torch.Tensor, convention: str
) -> torch.Tensor:
    """[n, measures] bool. `first` says of each window whether its first position is still to come.

    Positions of a window come in their order, in one block or several.
    """
    is_text = torch.tensor([name in _OF_TEXT for name in MEASURES])
    has_target = (target >= 0)[:, None]
    if convention == "tokens":
        return has_target.expand(-1, len(MEASURES))
    begins = torch.ones_like(window, dtype=torch.bool)
    begins[1:] = window[1:] != window[:-1]
    is_first = begins & first[window]
    first[window] = False
    return torch.where(is_text, has_target, ~is_first[:, None])


def compare_logits(
    logits: torch.Tensor, reference_logits: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return the MEASURES of each position, [n, measures] float64; of -1 for a target, any number.

    Args:
        logits, reference_logits: [n, vocabulary].
        target: [n].
    """
    width = min(logits.shape[-1], reference_logits.shape[-1])
    log_q = logits[:, :width].log_softmax(-1)
    log_p = reference_logits[:, :width].log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    # log p - log m = log1p(tilt), log q - log m = log1p(-tilt), with digits where p is near q.
    tilt = (p - q) / (p + q).clamp(min=torch.finfo(p.dtype).tiny)
    at = target.clamp(min=0).to(log_q.device)[:, None]

    # Adding sum(q) - sum(p), which is 0, takes the rounding of both normalisers out of the KLs.
    def total(values: torch.Tensor) -> torch.Tensor:
        return values.sum(-1, dtype=torch.float64)

    values = {
        "forward_cross_entropy": -total(p * log_q),
        "reverse_cross_entropy": -total(q * log_p),
        "tvd": total((p - q).abs()) / 2,
        "forward_kl": total(p * (log_p - log_q) + (q - p)),
        "reverse_kl": total(q * (log_q - log_p) + (p - q)),
        "js": total(torch.special.xlog1py(p, tilt) + torch.special.xlog1py(q, -tilt)) / 2,
        "entropy": -total(q * log_q),
        "reference_entropy": -total(p * log_p),
        "top1_mass": q.amax(-1).double(),
        "cross_entropy": -log_q.gather(1, at)[:, 0].double(),
        "reference_cross_entropy": -log_p.gather(1, at)[:, 0].double(),
    }
    return torch.stack([values[name] for name in MEASURES], dim=1)


def distribution_records(
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Mapping[str, Json],
    *,
    convention: str = "tokens",
    draws: int = 1000,
    seed: int = 0,
) -> list[Record]:
    """Return a record for each measure, intervals over resampled texts.

    Raises:
        ValueError: a measure without a single position.
    """
    records = []
    for name, (sums, counts) in measured.items():
        unit, definition = MEASURES[name]
        if not counts.sum():
            raise ValueError(f"{name}: expected at least 1 predicted token, found 0")
        if convention == "emo":
            has_any = counts > 0
            values, weights = sums[has_any] / counts[has_any], np.ones(int(has_any.sum()))
        else:
            values, weights = sums, counts
        records.append(
            Record(
                *(name, float(values.sum() / weights.sum()), unit),
                f"{definition}, {_HOW[convention]}; {_LEGEND}",
                int(counts.sum()),
                n_unit="tokens",
                seed=seed,
                interval=ratio_interval(values, weights, draws, seed),
                settings={**settings, "convention": convention, "texts": len(sums)},
            )
        )
    return records
