"""Which training examples stand before a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_emo.evaluation.icl_data import Example
from megatron_emo.evaluation.icl_tasks import RETRIEVERS

Encode = Callable[[Sequence[str]], np.ndarray]
"""texts -> [texts, features], to be compared by their cosine."""
_BLOCK = 256
_ENCODER_TOKENS = 256


def choose_shots(
    questions: Sequence[Example],
    train: Sequence[Example],
    shots: int,
    retriever: str = "topk",
    *,
    within_group: bool = False,
    encode: Encode | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Return for each question the positions in `train` of its shots, the most wanted one first.

    Args:
        retriever: topk, the nearest by cosine, ties to the earlier one; random, drawn anew for each
            question; first, the first ones of the file; none.
        within_group: only examples of the question's own group.
        encode: features for topk; TF-IDF of `train` where None.

    Raises:
        ValueError: an unknown retriever, fewer training examples than shots, or texts without a
            word for TF-IDF.

    References:
        topk is the default of OpenICL's TopkRetriever, with other features; Liu et al., 2022.
    """
    if retriever not in RETRIEVERS:
        raise ValueError(f"--retriever: expected one of {', '.join(RETRIEVERS)}, got {retriever!r}")
    if shots < 0:
        raise ValueError(f"--shots: expected at least 0, got {shots}")
    if shots == 0 or retriever == "none":
        return [[] for _ in questions]
    pools = _pools(questions, train, shots, within_group)
    if retriever == "first":
        return [pools[group(question, within_group)][:shots].tolist() for question in questions]
    if retriever == "random":
        rng = np.random.default_rng(seed)
        return [
            rng.choice(pools[group(question, within_group)], shots, replace=False).tolist()
            for question in questions
        ]
    chosen = []
    for question, cosines in zip(questions, _cosines(questions, train, encode), strict=True):
        pool = pools[group(question, within_group)]
        nearest = np.argsort(-cosines[pool], kind="stable")[:shots]
        chosen.append(pool[nearest].tolist())
    return chosen


def group(example: Example, within_group: bool) -> str:
    """Return whose examples may be its shots."""
    return example.group if within_group else ""


def _pools(
    questions: Sequence[Example], train: Sequence[Example], shots: int, within_group: bool
) -> dict[str, np.ndarray]:
    pools: dict[str, list[int]] = {group(question, within_group): [] for question in questions}
    for position, example in enumerate(train):
        pools.get(group(example, within_group), []).append(position)
    for name, pool in pools.items():
        if len(pool) < shots:
            of = f" of {name}" if name else ""
            raise ValueError(
                f"--shots: expected at most {len(pool)}, the training examples{of}, got {shots}"
            )
    return {name: np.array(pool) for name, pool in pools.items()}


def _cosines(
    questions: Sequence[Example], train: Sequence[Example], encode: Encode | None
) -> Iterator[np.ndarray]:
    """Yield for each question [train]; a block of questions at a time lies in memory."""
    asked, known = ([example.text for example in part] for part in (questions, train))
    if encode is None:
        a, b = _tf_idf(asked, known)
    else:
        a, b = (_unit_rows(encode(texts)) for texts in (asked, known))
    for start in range(0, len(asked), _BLOCK):
        block = a[start : start + _BLOCK] @ b.T
        yield from block if isinstance(block, np.ndarray) else block.toarray()


def _tf_idf(asked: Sequence[str], known: Sequence[str]):
    """Both as sparse unit rows over the words of `known`, single letters too."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    try:
        b = vectorizer.fit_transform(known)
    except ValueError as error:
        raise ValueError(f"--retriever topk: no word in {len(known)} training texts") from error
    return vectorizer.transform(asked), b


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def encoder_of(folder: str, device: str = "auto", batch_size: int = 32) -> Encode:
    """Return features by a local model: its last hidden states, averaged over a text's tokens.

    Texts are cut at 256 tokens. One without tokens has the zero vector.

    Raises:
        FileNotFoundError, ValueError: a folder that transformers cannot load.
    """
    import torch

    from megatron_emo.evaluation.models import load_model

    loaded = load_model(folder, flag="--encoder", device=device)
    body = loaded.model.base_model

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        ids = [loaded.tokenizer(text)["input_ids"][:_ENCODER_TOKENS] for text in texts]
        order = sorted((i for i, row in enumerate(ids) if row), key=lambda i: len(ids[i]))
        features = np.zeros((len(ids), loaded.model.config.hidden_size), np.float32)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            lengths = torch.tensor([len(ids[i]) for i in batch])
            width = int(lengths.max())
            padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
            mask = (torch.arange(width) < lengths[:, None]).to(loaded.device)
            hidden = body(padded.to(loaded.device), attention_mask=mask.long()).last_hidden_state
            weights = mask / lengths[:, None].to(loaded.device)
            features[batch] = torch.einsum("btd,bt->bd", hidden.float(), weights).cpu().numpy()
        return features

    return encode
