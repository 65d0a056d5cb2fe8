"""Bigram languages: first-order chains over a small vocabulary, and sequences drawn from them.

The random ones follow the synthetic study of MixCE (Zhang et al., ACL 2023; bloomberg/MixCE-acl2023
`synthetic.py`). The corpus ones are ours in its spirit: bigrams of a text's most frequent words.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MAX_LENGTH = 500
"""Tokens of a sequence. Where it is cut no end of sequence is counted, so that data hold nothing
the language lacks; MixCE forces an end there."""

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]|\n\s*\n")
_SPEC = re.compile(r"(?P<kind>random\d{1,2}|corpus):(?P<vocab_size>\d+)(@(?P<hidden_size>\d+))?")


@dataclass(frozen=True)
class Language:
    """A chain over V tokens, the last of which ends a sequence.

    `rows` is [V, V] float64 and sums to 1 along its last dim: row 0 is the first token's
    distribution, row i + 1 the one after token i. Nothing follows the end, which has no row.
    """

    rows: np.ndarray

    @property
    def vocab_size(self) -> int:
        return len(self.rows)

    def expected_visits(self) -> np.ndarray:
        """Return how often a sequence comes by each row on average, [V] float64; row 0 once."""
        visits = np.zeros(self.vocab_size)
        reach = np.zeros(self.vocab_size)
        reach[0] = 1.0
        for _ in range(MAX_LENGTH):
            visits += reach
            reach = np.concatenate([[0.0], (reach @ self.rows)[:-1]])
        return visits


@dataclass(frozen=True)
class LanguageSpec:
    """Which language, and how wide the model is that learns it: `random50:20`, `corpus:50@8`."""

    kind: str
    """randomZ: rows drawn anew for each seed, Z percent of their entries zeroed; corpus."""
    vocab_size: int
    """With the end of a sequence."""
    hidden_size: int = 50
    """Width of the model's embedding and hidden layer; MixCE's is 50."""

    @classmethod
    def parse(cls, text: str) -> LanguageSpec:
        """Return the spec that `str` gives.

        Raises:
            ValueError: text of another form, or fewer than 3 tokens.
        """
        match = _SPEC.fullmatch(text)
        if not match or int(match["vocab_size"]) < 3 or match["hidden_size"] == "0":
            raise ValueError(
                "--language: expected randomZ:V or corpus:V, Z a percentage and V >= 3 tokens, "
                f"then @H for a model of width H >= 1, got {text!r}"
            )
        return cls(match["kind"], int(match["vocab_size"]), int(match["hidden_size"] or 50))

    def __str__(self) -> str:
        return f"{self.kind}:{self.vocab_size}" + (
            "" if self.hidden_size == 50 else f"@{self.hidden_size}"
        )

    @property
    def needs_text(self) -> bool:
        return self.kind == "corpus"

    def build(self, seed: int, text_path: str | None) -> Language:
        """Return the language; a corpus's is the same for every seed.

        Raises:
            ValueError: a corpus without a text, or one with too few words.
        """
        if not self.needs_text:
            return random_language(self.vocab_size, int(self.kind.removeprefix("random")), seed)
        if text_path is None:
            raise ValueError(f"--text: expected a file for --language {self}, got none")
        return _language_of_file(text_path, self.vocab_size)


def random_language(vocab_size: int, zero_percent: float, seed: int) -> Language:
    """Return rows drawn from a Dirichlet distribution of concentration 1/2.

    Each entry is zeroed with `zero_percent` percent, but for the end's column, the last token's row
    and the first token's distribution, which is uniform.
    """
    rng = np.random.default_rng([seed, 0])
    rows = rng.dirichlet(np.full(vocab_size, 0.5), size=vocab_size - 1)
    zeroed = rng.random(rows.shape) < zero_percent / 100
    zeroed[-1] = False
    zeroed[:, -1] = False
    rows[zeroed] = 0.0
    rows /= rows.sum(1, keepdims=True)
    return Language(np.vstack([np.full(vocab_size, 1 / vocab_size), rows]))


def corpus_language(text: str, vocab_size: int) -> Language:
    """Return the bigrams of the V - 1 most frequent words of a text, with the zeros it has.

    Words are runs of letters in lower case, and sentences end at . ! ? or an empty line. A word
    that a rarer one follows counts for nothing there; one that ends a sentence is followed by the
    end. The first token is uniform, as in the random languages, so that every row is visited.

    Raises:
        ValueError: a text with fewer different words, or a word that is never followed.
    """
    sentences = [_WORD.findall(part) for part in _SENTENCE_END.split(text.lower())]
    frequent = Counter(word for words in sentences for word in words).most_common(vocab_size - 1)
    if len(frequent) < vocab_size - 1:
        raise ValueError(
            f"--text: expected at least {vocab_size - 1} different words, got {len(frequent)}"
        )
    index = {word: i for i, (word, _) in enumerate(frequent)}
    end = vocab_size - 1
    counts = np.zeros((end, vocab_size))
    for words in sentences:
        ids = [index.get(word, -1) for word in words] + [end]
        for token, following in zip(ids, ids[1:], strict=False):
            if token >= 0 and following >= 0:
                counts[token, following] += 1
    totals = counts.sum(1, keepdims=True)
    if not totals.all():
        word = frequent[int(np.argmin(totals))][0]
        raise ValueError(
            f"--text: expected each of the {end} most frequent words to be followed by another of "
            f"them or by a sentence's end, {word!r} never is"
        )
    return Language(np.vstack([np.full(vocab_size, 1 / vocab_size), counts / totals]))


@lru_cache(maxsize=4)
def _language_of_file(path: str, vocab_size: int) -> Language:
    with open(path, encoding="utf-8") as file:
        return corpus_language(file.read(), vocab_size)


@dataclass(frozen=True)
class Sequences:
    """Sequences as what a bigram model sees of them."""

    pairs: np.ndarray
    """row * V + next token of every token, int64 [tokens]."""
    sequence: np.ndarray
    """The sequence each token belongs to, int64 [tokens]."""
    num_sequences: int
    vocab_size: int

    def counts(self, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return how often each token follows each row, [V, V] float64."""
        v = self.vocab_size
        return np.bincount(self.pairs[tokens], minlength=v * v).reshape(v, v).astype(float)

    def shuffled_batches(self, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the counts of batches of `batch_size` sequences in a new order; the rest of a last
        incomplete batch is left out."""
        num_batches = self.num_sequences // batch_size
        # Of 16 bits, numpy sorts in linear time.
        places = (np.arange(self.num_sequences) // batch_size).astype(np.uint16)
        batch_of = np.empty_like(places)
        batch_of[rng.permutation(self.num_sequences)] = places
        batch = batch_of[self.sequence]
        order = np.argsort(batch, kind="stable")
        ends = np.cumsum(np.bincount(batch, minlength=num_batches))[:num_batches]
        return [self.counts(tokens) for tokens in np.split(order, ends)[:num_batches]]


def sample_sequences(language: Language, num_sequences: int, seed: int | list[int]) -> Sequences:
    """Return sequences drawn from the language, all advanced a token at a time together."""
    rng = np.random.default_rng(seed)
    # Equal to 1 from the last possible token on, and a draw is below 1: an impossible token, whose
    # interval is empty, never comes.
    cumulative = np.cumsum(language.rows, axis=1)
    cumulative /= cumulative[:, -1:]
    v = language.vocab_size
    alive = np.arange(num_sequences)
    row = np.zeros(num_sequences, dtype=np.int64)
    pairs, owners = [], []
    for _ in range(MAX_LENGTH):
        token = (cumulative[row] <= rng.random((len(alive), 1))).sum(1)
        pairs.append(row * v + token)
        owners.append(alive)
        goes_on = token != v - 1
        alive, row = alive[goes_on], token[goes_on] + 1
        if not len(alive):
            break
    return Sequences(np.concatenate(pairs), np.concatenate(owners), num_sequences, v)
