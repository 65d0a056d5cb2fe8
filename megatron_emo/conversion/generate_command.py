"""What tools/generate.py does with its flags: prompts in, texts or a file of rows out."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_emo.conversion.convert import DTYPES
from megatron_emo.conversion.export_hf import ExportOptions
from megatron_emo.conversion.hf import HFFolder
from megatron_emo.conversion.language_model import load_megatron
from megatron_emo.evaluation.generation import (
    DEFAULT_NEW_TOKENS,
    Decoding,
    fit_new_tokens,
    generate,
)
from megatron_emo.evaluation.models import LanguageModel, load_model, resolve_device
from megatron_emo.evaluation.records import Json
from megatron_emo.evaluation.rows import RowFile, refuse_existing
from megatron_emo.evaluation.texts import read_texts

MEGATRON_FLAGS = ("iteration", "hf_config", "model_type", "vocab_size", "tokenizer_model")
"""Of no use with a Hugging Face folder, which says all of it."""


def run_generate(args: argparse.Namespace) -> None:
    """`tools/generate.py`.

    Raises:
        ValueError, OSError: bad flags, before a model is read; prompts that do not fit the model.
    """
    decoding = choose_decoding(args)
    prompts = read_prompts(args.prompt, args.prompt_file)
    resolve_device(args.device)
    again = {"resume": args.resume, "overwrite": args.overwrite}
    if args.output is None:
        for name in (name for name, value in again.items() if value):
            raise ValueError(f"--{name}: expected --output with it, found none")
    else:
        refuse_existing(args.output, **again)
    model = _load(args)
    new = fit_new_tokens(model, prompts, args.max_new_tokens)
    decoding = replace(decoding, max_new_tokens=new)
    batch_size, total = args.batch_size, len(prompts) * decoding.num_samples
    if args.output is None:
        generate(model, prompts, decoding, _Console(total), batch_size=batch_size)
        return
    recipe = _recipe(model, prompts, decoding, batch_size)
    rows = RowFile(args.output, recipe, total=total, group=batch_size, **again)
    generate(model, prompts, decoding, rows, batch_size=batch_size)
    rows.finish()
    print(f"{args.output}: {total} texts")


def choose_decoding(args: argparse.Namespace) -> Decoding:
    """Return the decoding of the flags; the tokens to make are open without --max-new-tokens.

    Raises:
        ValueError: a flag out of range, or one that --temperature 0 leaves without effect.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")
    new = DEFAULT_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    common = {"max_new_tokens": new, "num_samples": args.num_samples, "seed": args.seed}
    neutral = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    if args.temperature == 0:
        for name, value in {**neutral, "num_samples": 1}.items():
            found = getattr(args, name)
            if found != value:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected {value} with --temperature 0, which "
                    f"draws nothing, got {found}"
                )
        return Decoding.choose("greedy", **common)
    given = {name: getattr(args, name) for name in neutral}
    given = {name: None if value == neutral[name] else value for name, value in given.items()}
    return Decoding.choose("sample", temperature=args.temperature, **given, **common)


def read_prompts(given: Sequence[str] | None, file: str | Path | None) -> list[str]:
    """Return the prompts given and those of a file, as `read_texts`; by default an empty one.

    Raises:
        ValueError: text that is not UTF-8; a file without any.
    """
    prompts = list(given or [])
    for prompt in prompts:
        # What of a command line is not UTF-8 comes as surrogates.
        if prompt.encode(errors="ignore").decode() != prompt:
            raise ValueError(f"--prompt: expected UTF-8, got {prompt[:40]!r}")
    if file is not None:
        prompts += read_texts(file, "prompt")
    return prompts or [""]


def _load(args: argparse.Namespace) -> LanguageModel:
    if args.hf is not None:
        for name in MEGATRON_FLAGS:
            value = getattr(args, name)
            flag = f"--{name.replace('_', '-')} {value}"
            if value is not None:
                raise ValueError(f"{flag}: expected with --megatron alone, found --hf {args.hf}")
        _ = HFFolder(args.hf).tensors  # Refuses code, and damaged files by their names.
        return load_model(args.hf, flag="--hf", dtype=args.dtype, device=args.device)
    options = ExportOptions(
        iteration=args.iteration,
        dtype=DTYPES[args.dtype],
        reference=args.hf_config,
        model_type=args.model_type,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer_model,
    )
    return load_megatron(args.megatron, options, args.device)


def _recipe(
    model: LanguageModel, prompts: Sequence[str], decoding: Decoding, batch_size: int
) -> dict[str, Json]:
    dtype = str(model.model.dtype).removeprefix("torch.")
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = {**decoding.to_json(), "batch_size": batch_size, "dtype": dtype}
    return {**settings, "prompts": len(prompts), "prompts_sha256": digest, "model": model.sha256}


class _Console:
    """Prints texts as they come."""

    def __init__(self, total: int) -> None:
        self.found: list[dict] = []
        self._total, self._printed = total, 0

    def append(self, rows: Sequence[Mapping[str, Json]]) -> None:
        for row in rows:
            self._printed += 1
            if self._total > 1:
                print(f"== {self._printed}/{self._total}")
            print(row["text"], flush=True)
