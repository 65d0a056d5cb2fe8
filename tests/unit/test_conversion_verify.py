"""The figures of a verification, and the tokens it takes, without Megatron."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_emo.conversion.verify import VerificationResult, _sequences, compare_logits


def result(**changes) -> VerificationResult:
    values = {
        "max_logit_difference": 1e-6,
        "max_logit": 5.0,
        "argmax_agreement": 1.0,
        "mean_kl": 1e-13,
        "max_kl": 1e-12,
        "num_tokens": 48,
        "megatron_dtype": torch.float32,
        "hf_dtype": torch.bfloat16,
        "tokens_from": "the ids given",
    }
    return VerificationResult(**values | changes)


def test_figures_are_those_of_numpy_in_float64():
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randn(length, 11, generator=generator) * 3 for length in (5, 2)]
    found = [logits + 0.3 * torch.randn(logits.shape, generator=generator) for logits in expected]
    theirs = np.concatenate([logits.numpy() for logits in expected]).astype(np.float64)
    ours = np.concatenate([logits.numpy() for logits in found]).astype(np.float64)
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    figures = compare_logits(found, expected)
    assert figures["num_tokens"] == 7
    assert figures["mean_kl"] == pytest.approx(kl.mean(), rel=1e-12)
    assert figures["max_kl"] == pytest.approx(kl.max(), rel=1e-12)
    assert figures["max_logit_difference"] == np.abs(ours - theirs).max()
    assert figures["max_logit"] == np.abs(theirs).max()
    assert figures["argmax_agreement"] == (ours.argmax(-1) == theirs.argmax(-1)).mean()


def test_a_shift_of_all_logits_differs_although_the_distribution_does_not():
    logits = torch.randn(4, 9)
    figures = compare_logits([logits + 1], [logits])
    assert figures["max_logit_difference"] == pytest.approx(1, abs=1e-6)
    assert figures["mean_kl"] < 1e-12


@pytest.mark.parametrize(
    ("changes", "is_equal"),
    [
        ({}, True),
        ({"max_logit_difference": 1.3e-3}, False),  # erf in the place of tanh GELU
        ({"max_logit_difference": 1.3e-3, "max_logit": 200.0}, True),
        ({"mean_kl": 1e-5}, False),
        ({"max_logit_difference": float("nan")}, False),
        ({"mean_kl": float("nan")}, False),
    ],
)
def test_verdict(changes, is_equal):
    verdict = result(**changes)
    assert verdict.is_equal is is_equal
    assert ("DIFFERENT" in str(verdict)) is not is_equal


def test_the_line_says_figures_and_dtypes():
    assert str(result()) == (
        "logits equal: max difference 1.00e-06 (of 5.0), argmax agreement 100.00%, KL mean 1.0e-13 "
        "max 1.0e-12 nats, 48 tokens from the ids given; Megatron float32, HF bfloat16"
    )


def test_nan_logits_are_not_equal():
    logits = torch.randn(3, 5)
    spoiled = logits.clone()
    spoiled[1, 2] = float("nan")
    assert not result(**compare_logits([spoiled], [logits])).is_equal


CONFIG = SimpleNamespace(vocab_size=20, max_position_embeddings=6)


def test_ids_are_cut_to_the_positions_there_are(tmp_path):
    sequences, origin = _sequences(tmp_path, CONFIG, None, [list(range(9)), [], [19]])
    assert [sequence.tolist() for sequence in sequences] == [[0, 1, 2, 3, 4, 5], [19]]
    assert origin == "the ids given"


def test_ids_are_drawn_alike_where_there_is_no_tokenizer(tmp_path):
    sequences, origin = _sequences(tmp_path, CONFIG, None, None)
    again, _ = _sequences(tmp_path, CONFIG, None, None)
    assert [len(sequence) for sequence in sequences] == [6, 6]
    assert all(torch.equal(one, other) for one, other in zip(sequences, again, strict=True))
    assert torch.cat(sequences).max() < 20
    assert "seed 1234" in origin


def test_text_goes_through_the_folders_tokenizer(tmp_path):
    write_tokenizer(tmp_path, ["<unk>", "to", "be", "or", "not"])
    sequences, origin = _sequences(tmp_path, CONFIG, ["to be or not", "be"], None)
    assert [sequence.tolist() for sequence in sequences] == [[1, 2, 3, 4], [2]]
    assert origin == "the text given"
    drawn, origin = _sequences(tmp_path, CONFIG, None, None)
    assert torch.cat(drawn).max() < 5
    assert "tokenizer's vocabulary" in origin


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [
        (None, [[3, 20]], "id 20, expected ids below the vocab_size 20"),
        (None, [[]], "no token to verify with"),
        (["to be"], None, "no tokenizer to read the texts with"),
        (["to be"], [[1]], "expected one of them, found both"),
    ],
)
def test_errors_name_what_was_found(tmp_path, texts, ids, message):
    with pytest.raises(ValueError, match=message):
        _sequences(tmp_path, CONFIG, texts, ids)


def write_tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
