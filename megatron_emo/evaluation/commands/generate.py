"""Continue prompts with a model, by transformers' generate, and measure the continuations.

Each prompt and sample has random numbers of its own, from --seed and the prompt's index: results
do not depend on the batch size but for rounding, and a resumed run writes what a whole one does.
Lines gather in OUTPUT.part, and OUTPUT.recipe.json says how they were made. Prompts come out of
texts by --make-prompts, which needs no model.

python tools/evaluate.py generate --make-prompts test.jsonl --domain wikitext --output p.jsonl
python tools/evaluate.py generate --model emo/ --prompts p.jsonl --output emo.jsonl
"""

from __future__ import annotations

import argparse
import time

from megatron_emo.evaluation.commands.perplexity import add_model_arguments, need
from megatron_emo.evaluation.records import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help=".jsonl, .json, or one prompt a line")
    source.add_argument("--make-prompts", metavar="FILE", help="texts to take prompts from")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--output", metavar="FILE", required=True, help=".jsonl to write")
    parser.add_argument(
        "--field",
        metavar="NAME",
        help="the text in a JSON object (default: prompt; text with --make-prompts)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")
    parser.add_argument("--resume", action="store_true", help="go on with --output")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    _add_decoding_arguments(parser)
    _add_prompt_arguments(parser)
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="a model under which the continuations' perplexity is taken",
    )
    add_model_arguments(parser)


def _add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    modes = ["unbiased", "temperature", "top-k", "top-p", "typical", "sample", "greedy", "beam"]
    parser.add_argument(
        "--mode",
        choices=modes,
        default="unbiased",
        help="sample takes any of the four flags below together (default: %(default)s)",
    )
    for flag, kind, text in (
        ("--temperature", float, "divides the logits; not of unbiased, greedy, beam (default: 1)"),
        ("--top-k", int, "tokens kept (default: 50; of sample all)"),
        ("--top-p", float, "mass kept (default: 0.95; of sample all)"),
        ("--typical-p", float, "mass kept (default: 0.2; of sample all)"),
        ("--num-beams", int, "(default: 4)"),
    ):
        parser.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)
    for flag, default, text in (
        ("--max-new-tokens", 80, "most tokens of a continuation"),
        ("--min-new-tokens", 0, "EOS cannot come before so many"),
        ("--num-samples", 1, "of each prompt"),
        ("--batch-size", 16, "continuations at once"),
        ("--seed", 0, "of draws and of intervals"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    domains = ["wikitext", "webtext", "writingprompts", "ptb", "ag_news", "other"]
    parser.add_argument(
        "--domain",
        choices=domains,
        default="other",
        help="of --make-prompts: the paper's lengths, in words (default: %(default)s: 20 and 80)",
    )
    parser.add_argument(
        "--prompt-words", type=int, metavar="WORDS", help="of a prompt (default: the domain's)"
    )
    parser.add_argument(
        "--continuation-words",
        type=int,
        metavar="WORDS",
        help="of the text's own continuation (default: the domain's)",
    )


def run(args: argparse.Namespace) -> list[Record]:
    """Return the records; none with --make-prompts."""
    if args.make_prompts:
        return _make_prompts(args)
    need(args, "--model")
    return _generate(args)


def _make_prompts(args: argparse.Namespace) -> list[Record]:
    from pathlib import Path

    from megatron_emo.evaluation.prompts import Lengths, make_prompts, write_prompts
    from megatron_emo.evaluation.texts import read_texts

    if Path(args.output).exists() and not args.overwrite:
        raise FileExistsError(f"--output {args.output}: exists; --overwrite replaces it")
    lengths = Lengths.choose(args.domain, args.prompt_words, args.continuation_words)
    texts = read_texts(args.make_prompts, args.field or "text")
    rows = make_prompts(texts, lengths, args.limit)
    write_prompts(args.output, rows)
    print(
        f"{args.output}: {len(rows)} prompts of {lengths.prompt} words from {len(texts)} texts, "
        f"each with a reference of {lengths.continuation} words more"
    )
    return []


def _generate(args: argparse.Namespace) -> list[Record]:
    from megatron_emo.evaluation.entropy import generation_records
    from megatron_emo.evaluation.generation import generate, prompt_ids
    from megatron_emo.evaluation.models import complete_records, load_model
    from megatron_emo.evaluation.records import hash_file
    from megatron_emo.evaluation.rows import RowFile
    from megatron_emo.evaluation.texts import read_texts

    begun = time.monotonic()
    decoding = _decoding(args)
    prompts = read_texts(args.prompts, args.field or "prompt", args.limit)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    settings = {
        **decoding.to_json(),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "prompts": len(prompts),
    }
    recipe = {**settings, "model": model.sha256, "prompts_sha256": hash_file(args.prompts)}
    rows = RowFile(
        args.output,
        {**recipe, "field": args.field},
        total=len(prompts) * decoding.num_samples,
        group=args.batch_size,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    generated = generate(model, prompts, decoding, rows, batch_size=args.batch_size)
    rows.finish()
    print(f"{args.output}: {len(generated)} continuations")
    settings["settings_hash"] = rows.hash
    settings["prompts_cut"] = sum(
        prompt_ids(model, prompt, decoding.max_new_tokens)[1] for prompt in prompts
    )
    records = generation_records(
        *(model, generated, decoding.max_new_tokens, settings),
        seed=decoding.seed,
        batch_tokens=args.batch_tokens,
    )
    if args.reference:
        records.append(_reference_record(args, generated, settings))
    files, seconds = [args.prompts, args.output], time.monotonic() - begun
    return complete_records(records, model, files, labels=args.labels, seconds=seconds)


def _decoding(args):
    from megatron_emo.evaluation.generation import Decoding

    names = ("temperature", "top_k", "top_p", "typical_p", "num_beams")
    names += ("max_new_tokens", "min_new_tokens", "num_samples", "seed")
    return Decoding.choose(args.mode, **{name: getattr(args, name) for name in names})


def _reference_record(args, generated, settings):
    from megatron_emo.evaluation.entropy import generation_perplexity
    from megatron_emo.evaluation.models import load_model

    reference = load_model(args.reference, flag="--reference", dtype=args.dtype, device=args.device)
    return generation_perplexity(
        reference, generated, settings, seed=args.seed, batch_tokens=args.batch_tokens
    )
