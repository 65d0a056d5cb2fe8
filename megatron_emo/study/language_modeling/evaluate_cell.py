"""Measure one trained model on its domain: every evaluation in one process, since imports are slow.

Perplexity of the test documents; the temperature at which the model's entropy on validation
documents equals the control's; continuations of the prompts drawn from the model itself, at that
temperature, and greedily; MAUVE and repetition of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_emo.evaluation.command import build_parser, run_command
from megatron_emo.evaluation.records import Record, write_records

# Training saw no beginning token: a text's first token has nothing before it, and is not scored.
NO_PREFIX = ("--prefix", "none")
TEXT_METRICS = "diversity,rep,distinct"


class Cell:
    """The evaluation commands with what is common to them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.parser = args, build_parser("")

    def measure(self, command: str, *flags, **labels: str) -> list[Record]:
        """Run a subcommand of tools/evaluate.py and return its records."""
        given = [*self.args.label, *(f"{name}={value}" for name, value in labels.items())]
        words = [word for label in given for word in ("--label", label)]
        argv = [command, *map(str, flags), *words]
        print(f"== {command} {' '.join(f'{k}={v}' for k, v in labels.items())}", flush=True)
        return run_command(self.parser.parse_args(argv))

    def perplexity(self) -> list[Record]:
        """Perplexities of the test documents; their sums in documents.jsonl."""
        args = self.args
        flags = ["--model", args.model, "--texts", args.data / "test.jsonl"]
        flags += ["--per-document", args.output / "documents.jsonl", "--overwrite"]
        return self.measure("perplexity", *flags, *NO_PREFIX, *_limit(args.test_documents))

    def temperature(self) -> list[Record]:
        """The matched temperature and the entropies around it."""
        args = self.args
        flags = ["--model", args.model, "--texts", args.data / "valid.jsonl"]
        flags += ["--match-entropy-of", args.match_entropy_of]
        return self.measure("temperature", *flags, *NO_PREFIX, *_limit(args.valid_documents))

    def decode(self, decoding: str, temperature: float) -> list[Record]:
        """Continuations of the prompts, their MAUVE and their repetition."""
        args = self.args
        prompts, texts = args.data / "prompts.jsonl", args.output / f"{decoding}.jsonl"
        mode = {"matched": ["temperature", "--temperature", temperature]}.get(decoding, [decoding])
        flags = ["--model", args.model, "--prompts", prompts, "--output", texts, "--overwrite"]
        flags += ["--mode", *mode, "--seed", args.seed, "--batch-size", args.batch_size]
        flags += ["--max-new-tokens", args.max_new_tokens, *_limit(args.num_prompts)]
        label = {"decoding": decoding}
        records = self.measure("generate", *flags, **label)
        flags = ["--p", prompts, "--field-p", "reference", "--q", texts]
        flags += ["--featurizer", args.featurizer, "--cache", args.cache]
        flags += ["--seeds", args.clusterings, *_limit(args.num_prompts)]
        records += self.measure("mauve", *flags, **label)
        flags = ["--texts", texts, "--field", "continuation", "--metrics", TEXT_METRICS]
        return records + self.repetition(*flags, **label)

    def repetition(self, *flags, **label: str) -> list[Record]:
        """Repetition and diversity; none of texts without n-grams.

        A model whose continuations are all empty has shown that: the other cells go on.
        """
        try:
            return self.measure("text", *flags, "--convention", "simctg", **label)
        except ValueError as error:
            print(f"no record: {error}", flush=True)
            return []


def _limit(number: int | None) -> list:
    return [] if number is None else ["--limit", number]


def evaluate_cell(args: argparse.Namespace) -> list[Record]:
    """Return all records of a model on a domain."""
    cell = Cell(args)
    records = cell.perplexity()
    matched = cell.temperature()
    temperature = next(r.value for r in matched if r.metric == "matched_temperature")
    records += matched
    unbiased = cell.decode("unbiased", 1.0)
    records += unbiased
    if temperature == 1.0:
        # The control is matched with itself: the same draws from the same model.
        records += [replace(r, labels={**r.labels, "decoding": "matched"}) for r in unbiased]
    else:
        records += cell.decode("matched", temperature)
    return records + cell.decode("greedy", 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Write records.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    add("--match-entropy-of", type=Path, required=True, metavar="DIR", help="the control's folder")
    add("--featurizer", type=Path, required=True, metavar="DIR", help="of MAUVE")
    add("--data", type=Path, required=True, metavar="DIR", help="a domain's splits and prompts")
    add("--output", type=Path, required=True, metavar="DIR", help="records and texts")
    add("--cache", type=Path, required=True, metavar="DIR", help="features, kept between cells")
    add("--label", action="append", default=[], metavar="NAME=VALUE", help="kept with each record")
    for flag, default, text in (
        ("--seed", 0, "of draws"),
        ("--max-new-tokens", 80, "of a continuation"),
        ("--batch-size", 64, "continuations at once"),
        ("--clusterings", 5, "of MAUVE, each with a seed of its own"),
        ("--num-prompts", None, "the first N"),
        ("--test-documents", None, "the first N, for perplexity"),
        ("--valid-documents", None, "the first N, for the temperature"),
    ):
        shown = "all" if default is None else default
        add(flag, type=int, default=default, metavar="N", help=f"{text} (default: {shown})")
    args = parser.parse_args(argv)
    try:
        records = evaluate_cell(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate_cell: {error}") from error
    write_records(args.output / "records.json", records)


if __name__ == "__main__":
    main()
