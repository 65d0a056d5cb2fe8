"""Fingerprints of vocabularies, against the documented hash worked out by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import warnings

import pytest

from megatron_emo.vocabulary import (
    fingerprint_tokenizer,
    fingerprint_vocabulary,
    load_tokenizer,
    tokens_by_id,
)


def fingerprint_by_hand(tokens: list[bytes]) -> str:
    entries = (struct.pack("<QQ", i, len(token)) + token for i, token in enumerate(tokens))
    return hashlib.sha256(b"".join(entries)).hexdigest()


def test_the_fingerprint_is_the_documented_hash_of_ids_and_bytes():
    expected = fingerprint_by_hand([b"a", "\u2581b".encode(), b""])
    assert fingerprint_vocabulary(["a", "\u2581b", ""]) == expected
    assert fingerprint_vocabulary({"\u2581b": 1, "": 2, "a": 0}) == expected
    assert fingerprint_vocabulary([b"a", b"\xe2\x96\x81b", b""]) == expected


def test_order_holes_and_boundaries_enter_the_fingerprint():
    variants = [["ab", "c"], ["a", "bc"], ["c", "ab"], {"ab": 0, "c": 2}, ["ab", "c", ""]]
    assert len({fingerprint_vocabulary(tokens) for tokens in variants}) == len(variants)


@pytest.mark.parametrize("nothing", [None, [], object()])
def test_a_tokenizer_without_a_vocabulary_has_no_fingerprint(nothing):
    assert fingerprint_tokenizer(nothing) == ""


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    sentences = [f"the {word} sat on the {word}s" for word in ("cat", "mat", "rat", "bat")] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(prefix),
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, sentencepiece_model):
    """A Hugging Face tokenizer with the tokens of the sentencepiece model."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    tokens = tokens_by_id(load_tokenizer(sentencepiece_model))
    ids = {token: index for index, token in tokens.items()}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    folder = tmp_path_factory.mktemp("hf")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def megatron_tokenizer(library: str, path=None, **settings):
    with warnings.catch_warnings():
        # Megatron says that Transformer Engine and Apex are absent, and that there is no rank.
        warnings.simplefilter("ignore")
        tokenizers = pytest.importorskip("megatron.core.tokenizers")
        return tokenizers.MegatronTokenizer.from_pretrained(
            tokenizer_path=path, metadata_path={"library": library}, **settings
        )


def test_one_vocabulary_has_one_fingerprint_through_every_library(sentencepiece_model, hf_folder):
    fingerprints = {
        "sentencepiece": fingerprint_tokenizer(load_tokenizer(sentencepiece_model)),
        "hf": fingerprint_tokenizer(load_tokenizer(hf_folder)),
        "megatron sentencepiece": fingerprint_tokenizer(
            megatron_tokenizer("sentencepiece", str(sentencepiece_model))
        ),
        "megatron hf": fingerprint_tokenizer(megatron_tokenizer("huggingface", str(hf_folder))),
    }
    pieces = tokens_by_id(load_tokenizer(sentencepiece_model)).values()
    expected = fingerprint_by_hand([piece.encode() for piece in pieces])
    assert fingerprints == dict.fromkeys(fingerprints, expected)


def test_an_added_token_changes_the_fingerprint(hf_folder):
    tokenizer = load_tokenizer(hf_folder)
    before = fingerprint_tokenizer(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert fingerprint_tokenizer(tokenizer) != before


def test_megatrons_null_tokenizer_is_unknown():
    assert fingerprint_tokenizer(megatron_tokenizer("null-text", vocab_size=32)) == ""


def test_megatrons_tiktoken_vocabulary_is_read_as_bytes(tmp_path):
    pytest.importorskip("tiktoken")
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""}
        for i in range(256)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    tokenizer = megatron_tokenizer(
        "tiktoken", str(tmp_path / "vocab.json"), vocab_size=266, num_special_tokens=10
    )
    tokens = tokens_by_id(tokenizer)
    assert sorted(tokens) == list(range(266))
    assert tokens[10 + 0xFF] == b"\xff"
    assert len(fingerprint_tokenizer(tokenizer)) == 64


def test_a_tokenizer_that_has_no_one_vocabulary_file_is_refused(tmp_path, sentencepiece_model):
    with pytest.raises(ValueError, match="--tokenizer-type TikTokenizer: expected Hugging"):
        load_tokenizer(sentencepiece_model, "TikTokenizer")
    with pytest.raises(FileNotFoundError, match="--tokenizer-model .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
