"""Tables brought from one tokenizer to another, against the text that tokens decode to."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_emo.cost_embedding import unit_rows, verify_cost_embedding, write_cost_embedding
from megatron_emo.cost_embedding.map_tokenizer import (
    TokenKey,
    count_tokens,
    map_table,
    pair_tokens,
    token_keys,
)
from megatron_emo.cost_embedding.prepare import prepare_cost_embedding
from megatron_emo.vocabulary import fingerprint_tokenizer, load_tokenizer, tokens_by_id

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = [
    "The cat sat on the mat, and the rat sat on the hat.",
    "A café in Malmö sells naïve hats\tfor 12 crowns (or more)!",
    "the cats and rats are sitting; the bats are setting 中文 字",
] * 4


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A folder with a tokenizer of GPT-2's kind, with a special and an added token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder = tmp_path_factory.mktemp("byte-level")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.add_tokens(["Ġraw"])
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", fast.eos_token_id)]
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    words = ["[UNK]", "[CLS]", "the", "The", "cat", "##s", "##ing", ".", "(", "中", "12", "</s>"]
    ids = {word: index for index, word in enumerate(words)}
    model = tokenizers.models.WordPiece(ids, unk_token="[UNK]")
    folder = tmp_path_factory.mktemp("wordpiece")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)
    return folder


def ordinary(tokenizer) -> dict[int, bytes]:
    return {i: key.data for i, key in token_keys(tokenizer).items() if not key.is_special}


# What a token stands for


def test_byte_level_tokens_are_the_bytes_they_decode_to(byte_level):
    tokenizer = load_tokenizer(byte_level)
    found = ordinary(tokenizer)
    decoder = tokenizer.backend_tokenizer.decoder
    tokens = tokens_by_id(tokenizer)
    raw = tokenizer.convert_tokens_to_ids("Ġraw")
    assert found.pop(raw) == "Ġraw".encode()
    assert len(found) >= 300
    for index, data in found.items():
        assert data.decode("utf-8", "replace") == decoder.decode([tokens[index]])
    # Single bytes decode to nothing by themselves: take them from whole characters.
    single = {data for data in found.values() if len(data) == 1}
    assert len(single) == 256
    by_letter = {tokens[i]: data for i, data in found.items() if len(tokens[i]) == 1}
    everything = "".join(map(chr, range(0x20, 0x250))) + "中文\U0001f600\n\t\0"
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    stand_ins = "".join(part for part, _ in split.pre_tokenize_str(everything))
    assert b"".join(by_letter[letter] for letter in stand_ins) == everything.encode()


def test_sentencepiece_tokens_are_the_text_they_decode_to(sentencepiece_model):
    processor = load_tokenizer(sentencepiece_model)
    found = ordinary(processor)
    before = processor.piece_to_id("t")
    for index, data in found.items():
        if processor.is_byte(index):
            assert data == bytes([int(processor.id_to_piece(index)[3:5], 16)])
        else:
            assert processor.decode([before, index]) == "t" + data.decode()
    assert all(processor.is_control(i) or processor.is_unknown(i) for i in range(3))
    assert token_keys(processor)[2] == TokenKey(True, b"</s>")
    # A byte that a piece of its own stands for is that piece.
    letter = processor.piece_to_id("t")
    spare = processor.piece_to_id("<0x74>")
    assert found[letter] == b"t" and spare not in found
    assert found[processor.piece_to_id("<0x0A>")] == b"\n"


def test_wordpiece_tokens_start_or_continue_words(wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    tokens = tokens_by_id(tokenizer)
    found = {tokens[index]: key for index, key in token_keys(tokenizer).items()}
    assert found["the"] == TokenKey(False, b" the") and found["12"] == TokenKey(False, b" 12")
    assert found["##s"] == TokenKey(False, b"s") and found["."] == TokenKey(False, b".")
    assert found["中"] == TokenKey(False, "中".encode())
    assert found["[CLS]"] == TokenKey(True, b"[CLS]")
    assert found["</s>"] == TokenKey(False, b"</s>")


def test_bytes_and_plain_words_stand_for_themselves():
    class Bytes:
        vocab = [b" the", b"\xff"]

    class Words:
        vocab = ["the", "<0x41>", "cat#"]

    assert token_keys(Bytes()) == {0: TokenKey(False, b" the"), 1: TokenKey(False, b"\xff")}
    assert [key.data for key in token_keys(Words()).values()] == [b"the", b"<0x41>", b"cat#"]
    with pytest.raises(ValueError, match="tokenizer object: expected one with a vocabulary"):
        token_keys(object())


# Pairs


def test_pairs_are_the_tokens_with_the_same_bytes(byte_level, sentencepiece_model, wordpiece):
    paths = (byte_level, sentencepiece_model, wordpiece)
    loaded = [load_tokenizer(path) for path in paths]
    keys = [token_keys(tokenizer) for tokenizer in loaded]
    for a in range(3):
        for b in range(3):
            pairs = pair_tokens(loaded[a], loaded[b])
            expected = {
                (target, source)
                for target, wanted in keys[b].items()
                for source, key in keys[a].items()
                if key == wanted
            }
            assert set(pairs.items()) == expected and len(pairs) == len(expected)
    names = [tokens_by_id(tokenizer) for tokenizer in loaded]
    by_name = {
        names[1][target]: names[0][source]
        for target, source in pair_tokens(loaded[0], loaded[1]).items()
    }
    assert by_name["\u2581the"] == "\u0120the" and by_name["</s>"] == "</s>"
    assert by_name["<0x0A>"] == "\u010a" and by_name["<0xFF>"] == "\u00ff"
    to_words = {
        names[2][target]: names[0][source]
        for target, source in pair_tokens(loaded[0], loaded[2]).items()
    }
    assert to_words["the"] == "\u0120the" and to_words["##s"] == "s"
    # The end of a document there is no text that looks like it here.
    assert "</s>" not in to_words


def test_a_vocabulary_maps_onto_itself(byte_level):
    tokenizer = load_tokenizer(byte_level)
    size = len(tokens_by_id(tokenizer))
    assert pair_tokens(tokenizer, tokenizer) == {i: i for i in range(size)}


# Tables


def test_rows_follow_their_tokens_and_the_rest_is_zero(byte_level, sentencepiece_model):
    source, target = load_tokenizer(sentencepiece_model), load_tokenizer(byte_level)
    table = torch.randn(source.get_piece_size() + 3, 5)  # 3 rows of padding
    num_rows = len(tokens_by_id(target)) + 2
    result, coverage = map_table(table, source, target, num_rows=num_rows)
    pairs = pair_tokens(source, target)
    for index in range(num_rows):
        expected = table[pairs[index]] if index in pairs else torch.zeros(5)
        assert torch.equal(result[index], expected)
    assert (coverage.num_tokens, coverage.num_covered) == (num_rows - 2, len(pairs))
    assert coverage.share == len(pairs) / (num_rows - 2) and coverage.text_share is None
    assert 0 < coverage.num_covered < coverage.num_tokens
    cut, coverage = map_table(table, source, target, num_rows=100)
    assert torch.equal(cut, result[:100]) and coverage.num_tokens == 100
    assert coverage.num_covered == sum(i < 100 for i in pairs)


def test_text_weighs_tokens_by_how_often_they_occur(tmp_path, byte_level, sentencepiece_model):
    text = tmp_path / "text"
    text.write_text("\n".join(TEXT) + "\nzebra\n", encoding="utf-8")
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    for one, other in ((byte_level, sentencepiece_model), (sentencepiece_model, byte_level)):
        source, target = load_tokenizer(one), load_tokenizer(other)
        backend = getattr(target, "backend_tokenizer", None)
        counts = Counter()
        for line in lines:
            if backend is None:
                counts.update(target.encode(line))
            else:
                counts.update(backend.encode(line, add_special_tokens=False).ids)
        assert count_tokens(target, text) == counts
        table = torch.randn(400, 2)
        num_rows = len(tokens_by_id(target))
        _, coverage = map_table(table, source, target, num_rows=num_rows, text=text)
        pairs = pair_tokens(source, target)
        covered = sum(count for index, count in counts.items() if index in pairs)
        assert coverage.num_text_tokens == counts.total()
        assert coverage.num_text_covered == covered
        assert coverage.text_share == covered / counts.total()


def test_tables_that_cannot_be_mapped_are_refused(byte_level, wordpiece):
    source, target = load_tokenizer(byte_level), load_tokenizer(wordpiece)
    with pytest.raises(ValueError, match=r"--map-from-tokenizer: it has \d+ tokens, the table 9"):
        map_table(torch.ones(9, 2), source, target, num_rows=12)
    with pytest.raises(ValueError, match="--vocab-size: expected at least 1 row to write, got 0"):
        map_table(torch.ones(900, 2), source, target, num_rows=0)

    class Foreign:
        vocab = ["qqq", "zzz"]

    with pytest.raises(ValueError, match="expected tokens in common .*found none"):
        map_table(torch.ones(2, 2), Foreign(), target, num_rows=12)


# The whole way


def test_a_prepared_file_is_mapped_and_says_so(tmp_path, byte_level, sentencepiece_model):
    source, target = load_tokenizer(sentencepiece_model), load_tokenizer(byte_level)
    table = torch.randn(source.get_piece_size(), 4)
    made = tmp_path / "made.safetensors"
    write_cost_embedding(
        made, table, source="a", tokenizer_fingerprint=fingerprint_tokenizer(source)
    )
    output = tmp_path / "mapped.safetensors"
    settings = {"from_safetensors": str(made), "tokenizer_model": str(byte_level)}
    info, _, coverage = prepare_cost_embedding(
        output, map_from_tokenizer=str(sentencepiece_model), **settings
    )
    assert verify_cost_embedding(output) == info
    num_rows = len(tokens_by_id(target))
    assert info.vocab_size == num_rows
    assert info.tokenizer_fingerprint == fingerprint_tokenizer(target)
    assert info.num_zero_rows == num_rows - coverage.num_covered
    assert info.source == (
        f"safetensors:{made}, {coverage.num_covered} of {num_rows} tokens mapped from tokenizer "
        f"{sentencepiece_model} to {byte_level}"
    )
    expected, _ = map_table(unit_rows(table), source, target, num_rows=num_rows)
    torch.testing.assert_close(load_file(output)["cost_embedding"], expected)
    with pytest.raises(ValueError, match="--map-from-tokenizer .*made for"):
        prepare_cost_embedding(tmp_path / "no", map_from_tokenizer=str(byte_level), **settings)
    info, *_ = prepare_cost_embedding(
        output,
        map_from_tokenizer=str(sentencepiece_model),
        cost_dim=2,
        vocab_size=300,
        overwrite=True,
        **settings,
    )
    assert (info.vocab_size, info.dim, info.source_dim) == (300, 2, 4)


def test_flags_that_need_each_other_say_so(tmp_path, byte_level):
    save_file({"w": torch.ones(500, 2)}, tmp_path / "in")
    given = {"from_safetensors": str(tmp_path / "in")}
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--map-from-tokenizer .*expected --tokenizer-model"):
        prepare_cost_embedding(out, map_from_tokenizer=str(byte_level), **given)
    with pytest.raises(ValueError, match="--text here: expected --map-from-tokenizer"):
        prepare_cost_embedding(out, text="here", **given)
    both = {"tokenizer_model": str(byte_level), **given}
    with pytest.raises(FileNotFoundError, match="--map-from-tokenizer nowhere: no such file"):
        prepare_cost_embedding(out, map_from_tokenizer="nowhere", **both)
    with pytest.raises(FileNotFoundError, match="--text nowhere: no such file"):
        prepare_cost_embedding(out, map_from_tokenizer=str(byte_level), text="nowhere", **both)
    with pytest.raises(ValueError, match="expected one of from_hf, .*, from_npy, got 2"):
        prepare_cost_embedding(out, from_npy="x", **given)
    assert not out.exists()
