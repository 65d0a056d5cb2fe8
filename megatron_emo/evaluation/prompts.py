"""Prompts out of texts, as the EMO paper's: the first words of a text, and how it went on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_emo.whole_files import write_json_lines

# domain: (words of a prompt, words of its continuation)
DOMAINS = {
    "wikitext": (20, 80),
    "webtext": (20, 80),
    "writingprompts": (35, 80),
    "ptb": (5, 25),
    "ag_news": (10, 30),
    "other": (20, 80),
}
MIN_CHARACTERS = 100
SPARE_WORDS = 10
HEADING = "=="


@dataclass(frozen=True)
class Lengths:
    """Words of a prompt and of what follows it."""

    prompt: int
    continuation: int

    @classmethod
    def choose(
        cls, domain: str = "other", prompt: int | None = None, continuation: int | None = None
    ) -> Lengths:
        """Return a domain's lengths, each replaced where given.

        Raises:
            ValueError: an unknown domain, or a length below 1.
        """
        if domain not in DOMAINS:
            raise ValueError(f"--domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")
        lengths = cls(
            DOMAINS[domain][0] if prompt is None else prompt,
            DOMAINS[domain][1] if continuation is None else continuation,
        )
        for flag, words in (
            ("--prompt-words", lengths.prompt),
            ("--continuation-words", lengths.continuation),
        ):
            if words < 1:
                raise ValueError(f"{flag}: expected at least 1, got {words}")
        return lengths


def make_prompts(
    texts: Sequence[str], lengths: Lengths, limit: int | None = None
) -> list[dict[str, str | int]]:
    """Return {id, prompt, reference} of the first texts that are long enough.

    A text needs 100 characters, ten words beyond prompt and continuation, and no "==", by which
    WikiText marks headings. The reference is the prompt with the text's own continuation. Words
    are runs of non-blanks, and the text between them stays as it is; the released code splits at
    single blanks, so that a blank at the begin counts as a word there.

    Args:
        limit: of prompts, not of texts looked at.

    Raises:
        ValueError: a limit below 1, or no text that is long enough.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {limit}")
    needed = lengths.prompt + lengths.continuation + SPARE_WORDS
    rows = []
    for index, text in enumerate(texts):
        words = list(re.finditer(r"\S+", text))
        if len(text) < MIN_CHARACTERS or len(words) < needed or HEADING in text:
            continue
        begin = words[0].start()
        prompt = text[begin : words[lengths.prompt - 1].end()]
        reference = text[begin : words[lengths.prompt + lengths.continuation - 1].end()]
        rows.append({"id": index, "prompt": prompt, "reference": reference})
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(
            f"--make-prompts: expected texts of {needed} words and {MIN_CHARACTERS} characters "
            f'without "{HEADING}", found 0 among {len(texts)}'
        )
    return rows


def write_prompts(path: str | os.PathLike, rows: Sequence[dict[str, str | int]]) -> None:
    """Write JSON lines, whole or not at all."""
    write_json_lines(path, rows)
