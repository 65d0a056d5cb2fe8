"""The sentences to train on, in their documents, and the texts whose perplexity is measured.

python -m megatron_emo.study.calibration.texts --text wiki.train.tokens --sentences 25000 \\
    --eval wikitext=wiki.test.tokens --output runs/calibration/data
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_emo.evaluation.records import hash_file
from megatron_emo.study.language_modeling.corpora import DOMAINS, Groups, read_files
from megatron_emo.whole_files import write_json, write_json_lines

SENTENCE_RULE = (
    "a sentence ends at . ! or ?, with the quotes and brackets that close after it, before a blank "
    "and a character that is no lower-case letter; in a document whose punctuation stands apart "
    "from words, as in WikiText, only such punctuation ends one"
)

_NEXT = r"\s+(?=[^a-z\s])(?![\"'”’)\]\s]+$)"
_APART = re.compile(r"(?:^|(?<=\s))[.!?]" + _NEXT)
_ATTACHED = re.compile(r"[.!?][\"'”’)\]]*" + _NEXT)


def stands_apart(paragraphs: Iterable[str]) -> bool:
    """Return whether punctuation has blanks on both sides, as where a text was tokenised."""
    return any(re.search(r"\s[.!?](\s|$)", text) for text in paragraphs)


def split_sentences(text: str, apart: bool = False) -> list[str]:
    """Return the sentences of a paragraph by `SENTENCE_RULE`, blanks around them left out.

    Args:
        apart: whether the text's punctuation stands apart from words.
    """
    end = _APART if apart else _ATTACHED
    begins = [0, *(match.end() for match in end.finditer(text)), len(text)]
    parts = [text[a:b].strip() for a, b in zip(begins, begins[1:], strict=False)]
    return [part for part in parts if part]


def take_sentences(groups: Groups, number: int) -> list[str]:
    """Return the documents that the first `number` sentences make.

    A group's paragraphs are one document, a line each; the last one ends with the last sentence.

    Raises:
        ValueError: fewer sentences than asked for, or a number below 1.
    """
    if number < 1:
        raise ValueError(f"--sentences: expected at least 1, got {number:,}")
    documents, left, found = [], number, 0
    for group in groups:
        lines, apart = [], stands_apart(group)
        for paragraph in group:
            sentences = split_sentences(paragraph, apart)
            found += len(sentences)
            if kept := sentences[:left]:
                lines.append(" ".join(kept))
                left -= len(kept)
        if lines:
            documents.append("\n".join(lines))
    if left:
        raise ValueError(
            f"--sentences: --text has {found:,}, expected {number:,}; pass --sentences {found} or "
            "more --text"
        )
    return documents


def choose_documents(
    groups: Groups, trained: Iterable[str], number: int | None, seed: int = 0
) -> list[str]:
    """Return documents to measure perplexity on: a sample, none of which was trained on.

    Args:
        trained: documents of the training, a paragraph a line.
        number: at most; None for all.

    Raises:
        ValueError: nothing is left, or a number below 1.
    """
    if number is not None and number < 1:
        raise ValueError(f"--documents: expected at least 1, got {number}")
    seen = {_key(line) for document in trained for line in document.split("\n")}
    # Of a first token alone nothing is predicted.
    kept = [text for group in groups for text in group if len(text.split()) > 1]
    kept = [text for text in kept if _key(text) not in seen]
    random.Random(seed).shuffle(kept)
    if not kept:
        raise ValueError("--eval: expected documents beside those trained on, found none")
    return kept[:number]


def _key(text: str) -> str:
    return " ".join(text.split())


def read_documents(name: str, paths: Sequence[Path]) -> Groups:
    """Return the groups of a text's files; a domain of the language modelling study by its name."""
    known = DOMAINS.get(name)
    return read_files(paths, known.read if known and name != "wikitext" else None)


def write_texts(
    output: Path,
    training: Sequence[Path],
    num_sentences: int,
    evaluation: Mapping[str, Path],
    num_documents: int | None,
) -> str:
    """Write train.jsonl, eval-NAME.jsonl and sources.json; return a line about each text.

    Raises:
        ValueError: as `take_sentences` and `choose_documents`.
    """
    documents = take_sentences(read_files(training), num_sentences)
    chosen = {
        name: choose_documents(read_documents(name, [path]), documents, num_documents)
        for name, path in evaluation.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    lines = [f"train: {num_sentences:,} sentences in {_size(documents)}"]
    for name, texts in chosen.items():
        _write(output / f"eval-{name}.jsonl", texts)
        lines.append(f"{name}: {_size(texts)}")
    _write(output / "train.jsonl", documents)
    sources = {path.name: hash_file(path) for path in (*training, *evaluation.values())}
    about = {"sentences": num_sentences, "sentence_rule": SENTENCE_RULE, "sha256": sources}
    write_json(output / "sources.json", about)
    return "\n".join(lines)


def _size(texts: Sequence[str]) -> str:
    return f"{len(texts):,} documents of {sum(len(text.split()) for text in texts):,} words"


def _write(path: Path, texts: Sequence[str]) -> None:
    write_json_lines(path, ({"text": text} for text in texts))


def parse_named_files(flag: str, texts: Sequence[str]) -> dict[str, Path]:
    """Return {name: file} of NAME=FILE.

    Raises:
        ValueError: another form, or a file that does not exist.
    """
    files = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not value:
            raise ValueError(f"{flag}: expected NAME=FILE, got {text!r}")
        if not Path(value).is_file():
            raise ValueError(f"{flag} {name}: {value}: no such file")
        files[name] = Path(value)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="for the files")
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="to train on")
    add("--sentences", type=int, required=True, metavar="N", help="of them, the first ones")
    add("--eval", action="append", default=[], metavar="NAME=FILE", help="can be repeated")
    add("--documents", type=int, metavar="N", help="of each --eval (default: all)")
    args = parser.parse_args(argv)
    try:
        evaluation = parse_named_files("--eval", args.eval)
        print(write_texts(args.output, args.text, args.sentences, evaluation, args.documents))
    except (ValueError, OSError) as error:
        raise SystemExit(f"texts: {error}") from error


if __name__ == "__main__":
    main()
