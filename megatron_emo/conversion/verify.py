"""Logits of a Megatron checkpoint against those of an HF folder, on the same tokens."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_emo.conversion import megatron_model
from megatron_emo.conversion.errors import ConversionError
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir

MAX_SEQUENCES = 8
MAX_LENGTH = 256
SAMPLED_TOKENS = 128
"""In each of two sequences, where no text is given."""
SEED = 1234
RELATIVE_BOUND = 2e-5
"""Of the largest logit. Two fp32 implementations that agree stay at about 1e-6 for each; the least
error met in conversion, the exact GELU for the tanh one, gives 2e-4."""
KL_BOUND = 1e-7
"""Nats, mean over tokens: half the square of a typical difference, and again generous."""


@dataclass(frozen=True)
class VerificationResult:
    """How far two models' logits are apart, computed in fp32 from equally rounded weights."""

    max_logit_difference: float
    """Largest absolute difference of a logit over tokens and the vocabulary."""
    max_logit: float
    """Largest absolute logit of the HF model, the scale of the difference."""
    argmax_agreement: float
    """Share of tokens after which both models hold the same token most probable."""
    mean_kl: float
    """KL(HF || Megatron) in nats, mean over tokens."""
    max_kl: float
    """The same, largest over tokens."""
    num_tokens: int
    """Positions compared."""
    megatron_dtype: torch.dtype
    """Of the checkpoint's parameters."""
    hf_dtype: torch.dtype
    """Of the folder's parameters."""
    tokens_from: str
    """Where the token ids come from."""

    @property
    def is_equal(self) -> bool:
        """True where rounding alone explains the differences; never with a NaN."""
        return (
            self.max_logit_difference <= RELATIVE_BOUND * max(1.0, self.max_logit)
            and self.mean_kl <= KL_BOUND
        )

    def __str__(self) -> str:
        verdict = "equal" if self.is_equal else "DIFFERENT"
        return (
            f"logits {verdict}: max difference {self.max_logit_difference:.2e} (of "
            f"{self.max_logit:.1f}), argmax agreement {self.argmax_agreement:.2%}, KL mean "
            f"{self.mean_kl:.1e} max {self.max_kl:.1e} nats, {self.num_tokens} tokens from "
            f"{self.tokens_from}; Megatron {_name(self.megatron_dtype)}, HF {_name(self.hf_dtype)}"
        )


def verify(
    megatron_dir: str | Path,
    hf_dir: str | Path,
    texts: Sequence[str] | None = None,
    token_ids: Sequence[Sequence[int]] | None = None,
    *,
    iteration: int | None = None,
) -> VerificationResult:
    """Run both models on the same tokens, print one line and return how far they are apart.

    One model is in memory at a time, in fp32. Where one side has rounded its weights, as an export
    to bf16 does, the other's are rounded alike first, so that the bound is that of fp32.

    Args:
        texts: turned into ids by the folder's tokenizer; the first MAX_SEQUENCES, MAX_LENGTH tokens
            of each.
        token_ids: ids of each sequence, instead of texts. With neither, ids are drawn with a fixed
            seed from the folder's tokenizer's vocabulary, or from config.json's without one.
        iteration: of the checkpoint; by default what its tracker names.

    Raises:
        FileNotFoundError, ValueError: a checkpoint that cannot be read, lacks its arguments, or
            does not hold the tensors that they call for; ids outside the vocabulary.
    """
    from transformers import AutoConfig

    folder = resolve_checkpoint_dir(megatron_dir, iteration)
    args = read_arguments(folder)
    if args is None:
        raise ConversionError(
            f"checkpoint {folder}: expected Megatron's arguments in it, found none"
        )
    config = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    sequences, origin = _sequences(hf_dir, config, texts, token_ids)
    megatron_dtype = megatron_model.params_dtype(args)
    expected, hf_dtype = _hf_logits(hf_dir, sequences, megatron_dtype)
    found = _megatron_logits(folder, args, config.vocab_size, sequences, hf_dtype)
    result = VerificationResult(
        **compare_logits(found, expected),
        megatron_dtype=megatron_dtype,
        hf_dtype=hf_dtype,
        tokens_from=origin,
    )
    print(result, flush=True)
    return result


def compare_logits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Return the figures of VerificationResult for logits [s, V], one pair for each sequence."""
    differences, kls, same = [], [], []
    for ours, theirs in zip(found, expected, strict=True):
        log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        differences.append((ours.double() - theirs.double()).abs().amax(-1))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    difference, kl = torch.cat(differences), torch.cat(kls)
    return {
        "max_logit_difference": difference.max().item(),
        "max_logit": max(theirs.abs().max().item() for theirs in expected),
        "argmax_agreement": torch.cat(same).double().mean().item(),
        "mean_kl": _not_negative(kl.mean().item()),
        "max_kl": _not_negative(kl.max().item()),
        "num_tokens": kl.numel(),
    }


def _not_negative(kl: float) -> float:
    """A divergence below 0 is rounding; NaN stays."""
    return kl if math.isnan(kl) else max(kl, 0.0)


def _sequences(
    hf_dir: str | Path,
    config: Any,
    texts: Sequence[str] | None,
    token_ids: Sequence[Sequence[int]] | None,
) -> tuple[list[Tensor], str]:
    """Return ids [s] of each sequence, and where they come from."""
    if texts is not None and token_ids is not None:
        raise ValueError("texts and token_ids: expected one of them, found both")
    longest = min(MAX_LENGTH, getattr(config, "max_position_embeddings", None) or MAX_LENGTH)
    if token_ids is not None:
        ids, origin = [list(sequence) for sequence in token_ids], "the ids given"
    elif texts is not None:
        tokenizer = _load_tokenizer(hf_dir)
        if tokenizer is None:
            raise ValueError(f"{hf_dir}: no tokenizer to read the texts with; give token ids")
        ids, origin = [tokenizer(text)["input_ids"] for text in texts], "the text given"
    else:
        ids, origin = _sampled_ids(hf_dir, config.vocab_size, min(SAMPLED_TOKENS, longest))
    ids = [sequence[:longest] for sequence in ids if len(sequence)][:MAX_SEQUENCES]
    if not ids:
        raise ValueError(f"{origin}: no token to verify with")
    largest = max(max(sequence) for sequence in ids)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{origin}: id {largest}, expected ids below the vocab_size {config.vocab_size} of "
            f"{hf_dir}"
        )
    return [torch.tensor(sequence) for sequence in ids], origin


def _sampled_ids(hf_dir: str | Path, vocab_size: int, length: int) -> tuple[list[list[int]], str]:
    tokenizer = _load_tokenizer(hf_dir)
    known = range(vocab_size)
    origin = f"the vocabulary's ids at random (seed {SEED})"
    if tokenizer is not None:
        known = sorted(index for index in tokenizer.get_vocab().values() if index < vocab_size)
        origin = f"the tokenizer's vocabulary at random (seed {SEED})"
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(known), (2, length), generator=generator)
    return [[known[index] for index in row] for row in drawn.tolist()], origin


def _load_tokenizer(hf_dir: str | Path) -> Any:
    """Return the folder's tokenizer, None where it has no files of one."""
    from transformers import AutoTokenizer

    if not any(Path(hf_dir).glob("*token*")) and not (Path(hf_dir) / "vocab.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)


@torch.no_grad()
def _hf_logits(
    hf_dir: str | Path, sequences: Sequence[Tensor], rounded_to: torch.dtype
) -> tuple[list[Tensor], torch.dtype]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf_dir,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="eager",
    )
    dtype = next(model.parameters()).dtype
    model = _rounded_fp32(model, rounded_to).eval()
    return [model(ids[None]).logits[0].float() for ids in sequences], dtype


def _megatron_logits(
    folder: Path,
    args: argparse.Namespace,
    vocab_size: int,
    sequences: Sequence[Tensor],
    rounded_to: torch.dtype,
) -> list[Tensor]:
    with megatron_model.one_process():
        model = megatron_model.build_model(args, vocab_size)
        megatron_model.load_checkpoint(model, folder)
        model = _rounded_fp32(model, rounded_to)
        return [megatron_model.model_logits(model, ids[None])[0] for ids in sequences]


@torch.no_grad()
def _rounded_fp32(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
