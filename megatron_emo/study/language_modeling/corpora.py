"""The domains' documents out of the files they come in, split without overlap, and prompts.

python -m megatron_emo.study.language_modeling.corpora --output runs/lm/data \\
    --files wikitext=wiki.train.tokens,wiki.valid.tokens,wiki.test.tokens
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_emo.evaluation.prompts import DOMAINS as PROMPT_LENGTHS
from megatron_emo.evaluation.prompts import Lengths, make_prompts, write_prompts
from megatron_emo.evaluation.records import hash_file
from megatron_emo.whole_files import write_json, write_json_lines

SPLITS = ("train", "valid", "test")
PASSAGE_WORDS = 150
"""Lines of a book are joined until they have so many."""

Groups = list[list[str]]
"""Documents; those of a group go to the same split."""


def read_wikitext(path: Path) -> Groups:
    """Return an article a group, a paragraph a document; headings and blank lines are left out."""
    groups: Groups = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        text = line.strip()
        if re.fullmatch(r"= [^=].* =", text):
            groups.append([])
        elif text and not re.fullmatch(r"(= )+.*( =)+", text):
            if not groups:
                groups.append([])
            groups[-1].append(text)
    return [group for group in groups if group]


def read_ag_news(path: Path) -> Groups:
    r"""Return title and description of each row; "\" stands for a line's end in the file."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    for number, row in enumerate(rows, 1):
        if len(row) != 3:
            raise ValueError(f"{path}: row {number}: expected class, title, text, got {len(row)}")
    return [[" ".join(f"{title} {text}".replace("\\", " ").split())] for _, title, text in rows]


def read_stories_json(path: Path) -> Groups:
    """Return the human stories of a WritingPrompts file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("original"), list):
        raise ValueError(f"{path}: expected an object with a list 'original'")
    return [[text.strip()] for text in content["original"]]


def read_tinystories(path: Path) -> Groups:
    """Return the stories: a single line's end parts them, a blank line parts paragraphs.

    The first and the last are left out, since the file begins and ends within one.
    """
    text = path.read_text(encoding="utf-8").replace("<|endoftext|>", "\n")
    stories = [story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", text)]
    return [[story] for story in stories[1:-1] if story]


def read_book(path: Path) -> Groups:
    """Return passages, without what Project Gutenberg puts around a book.

    A passage ends with the first line from its 150th word on that ends a sentence or is blank.
    """
    text = path.read_text(encoding="utf-8-sig").replace("\r", "")
    begin = re.search(r"^\*\*\* ?START OF TH.*$", text, re.MULTILINE)
    text = text[begin.end() :] if begin else text
    end = re.search(r"^(End of (the )?Project Gutenberg|\*\*\* ?END OF TH)", text, re.MULTILINE)
    text = text[: end.start()] if end else text
    passages, words = [], []
    for line in text.split("\n"):
        words += line.split()
        if len(words) >= PASSAGE_WORDS and re.search(r"(^|[.!?][\"'”’_]*)\s*$", line):
            passages.append([" ".join(words)])
            words = []
    return passages


def read_lines(path: Path) -> Groups:
    """Return a document a line, as the official WritingPrompts files have it."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [[line.replace("<newline>", "\n").strip()] for line in lines if line.strip()]


def read_json_lines(path: Path) -> Groups:
    """Return "text" of each object."""
    from megatron_emo.evaluation.texts import read_texts

    return [[text] for text in read_texts(path)]


@dataclass(frozen=True)
class Domain:
    """Where a domain's documents are, below the data folder, and how they are read."""

    read: Callable[[Path], Groups]
    files: tuple[str, ...]
    test_files: tuple[str, ...] = ()
    """Where there are any, `files` are for train and valid alone."""
    shares: tuple[float, float] = (0.1, 0.3)
    """Of valid and test."""
    in_order: bool = False
    """Valid is the end of the files, not a sample."""


_BOOKS = ("botchan.txt", "time_machine.txt", "pride_and_prejudice_1342-0.txt")
_STORIES = ("gpt2-xl", "opt-2.7b", "gpt-neo-2.7B")

DOMAINS = {
    "wikitext": Domain(
        read_wikitext,
        ("text/wikitext103/wiki.valid.tokens",),
        ("text/wikitext103/wiki.test.tokens",),
        in_order=True,
    ),
    # One row in twelve is long enough for a prompt: more of them for the test.
    "ag_news": Domain(read_ag_news, ("cls/ag_news/test.csv",), shares=(0.1, 0.4)),
    "writingprompts": Domain(
        read_stories_json,
        tuple(f"text/writingprompts/writing_{name}.raw_data.json" for name in _STORIES),
    ),
    "tinystories": Domain(read_tinystories, ("text/tinystories_944k.txt",)),
    "books": Domain(read_book, tuple(f"text/gutenberg/{name}" for name in _BOOKS)),
}
"""What is found offline: small parts of the official sets, in part those meant for tests."""

_READERS = {".jsonl": read_json_lines, ".csv": read_ag_news, ".tokens": read_wikitext}


def read_files(paths: Iterable[Path], read: Callable[[Path], Groups] | None = None) -> Groups:
    """Return the groups of all files; without `read`, as their suffixes say, else line by line.

    Raises:
        ValueError: a file without any document, or not of its kind.
    """
    groups: Groups = []
    for path in paths:
        found = (read or _READERS.get(path.suffix, read_lines))(path)
        if not found:
            raise ValueError(f"{path}: expected documents, found none")
        groups += found
    return groups


def split_domain(name: str, root: Path, seed: int) -> dict[str, list[str]]:
    """Return the documents of each split of a domain of `DOMAINS`, by seed.

    Raises:
        FileNotFoundError: a file that is not below `root`.
        ValueError: as `read_files`.
    """
    domain = DOMAINS[name]
    groups = read_files([root / file for file in domain.files], domain.read)
    rng = random.Random(f"{seed} {name}")
    if not domain.in_order:
        rng.shuffle(groups)
    num_valid = max(1, round(domain.shares[0] * len(groups)))
    num_test = 0 if domain.test_files else max(1, round(domain.shares[1] * len(groups)))
    test, rest = groups[:num_test], groups[num_test:]
    if domain.test_files:
        test = read_files([root / file for file in domain.test_files], domain.read)
    splits = {"train": rest[:-num_valid], "valid": rest[-num_valid:], "test": test}
    documents = {
        split: [text for group in part for text in group] for split, part in splits.items()
    }
    # Evaluations take the first ones: of a sample, not of the first articles.
    rng.shuffle(documents["test"])
    rng.shuffle(documents["valid"])
    return remove_overlap(documents)


def remove_overlap(documents: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the splits with each text once: in test before valid before train."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for text in documents[split]:
            key = " ".join(text.split())
            if key and key not in seen:
                seen.add(key)
                kept[split].append(text)
    return {split: kept[split] for split in SPLITS}


def write_domain(
    folder: Path,
    name: str,
    documents: dict[str, list[str]],
    num_prompts: int,
    sources: Sequence[Path],
) -> str:
    """Write {train,valid,test}.jsonl, prompts.jsonl and sources.json; return a line about it.

    Raises:
        ValueError: a split without documents, or no text long enough for a prompt.
    """
    for split, texts in documents.items():
        if not texts:
            raise ValueError(f"{name}: expected {split} documents, found none")
    lengths = Lengths.choose(name if name in PROMPT_LENGTHS else "other")
    prompts = make_prompts(documents["test"], lengths, num_prompts)
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in documents.items():
        write_json_lines(folder / f"{split}.jsonl", ({"text": text} for text in texts))
    write_prompts(folder / "prompts.jsonl", prompts)
    hashes = {path.name: hash_file(path) for path in sources}
    write_json(folder / "sources.json", hashes)
    counts = ", ".join(
        f"{split} {len(texts):,} documents of {sum(len(t.split()) for t in texts):,} words"
        for split, texts in documents.items()
    )
    return f"{name}: {counts}; {len(prompts)} prompts of {lengths.prompt} words"


def parse_files(texts: Sequence[str]) -> dict[str, tuple[Path, Path, Path]]:
    """Return {domain: (train, valid, test)} of NAME=TRAIN,VALID,TEST.

    Raises:
        ValueError: another form, or a file that does not exist.
    """
    files = {}
    for text in texts:
        name, _, value = text.partition("=")
        paths = tuple(Path(part) for part in value.split(","))
        if not re.fullmatch(r"[\w-]+", name) or len(paths) != 3:
            raise ValueError(f"--data: expected NAME=TRAIN,VALID,TEST, got {text!r}")
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--data {name}: {path}: no such file")
        files[name] = paths
    return files


def main(argv: list[str] | None = None) -> None:
    """Write the splits and prompts of domains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="a folder for each domain")
    add("--root", type=Path, metavar="DIR", help="the data folder of --domains")
    add("--domains", default="", metavar="A,B", help=f"of {', '.join(DOMAINS)} (default: none)")
    add(
        "--files", action="append", default=[], metavar="NAME=TRAIN,VALID,TEST", help="given splits"
    )
    add("--seed", type=int, default=0, help="of the splits (default: %(default)s)")
    add("--num-prompts", type=int, default=256, metavar="N", help="at most (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in filter(None, args.domains.split(",")):
        documents = split_domain(name, args.root, args.seed)
        sources = [args.root / f for f in (*DOMAINS[name].files, *DOMAINS[name].test_files)]
        print(write_domain(args.output / name, name, documents, args.num_prompts, sources))
    for name, paths in parse_files(args.files).items():
        read = DOMAINS[name].read if name == "wikitext" else None
        documents = {
            split: [text for group in read_files([path], read) for text in group]
            for split, path in zip(SPLITS, paths, strict=True)
        }
        documents = remove_overlap(documents)
        print(write_domain(args.output / name, name, documents, args.num_prompts, paths))


if __name__ == "__main__":
    main()
