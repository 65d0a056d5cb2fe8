"""SentencePiece training, judged through the sentencepiece library and Megatron's wrapper."""

from __future__ import annotations

import json

import pytest
import sentencepiece

from megatron_emo.data.documents import DocumentError
from megatron_emo.data.megatron_tokenizer import TokenizerOptions, build_megatron_tokenizer
from megatron_emo.data.tokenizer import TokenizerTraining, train_sentencepiece

LINES = [f"the cat number {n} sat on the mat\n    and saw {n * n} birds" for n in range(60)]
ODD_TEXT = " two  spaces,\ttab,\n\n    indent, café, 一, \x00 \N{GRINNING FACE} "


@pytest.fixture
def training(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))

    def make(**changes):
        settings = {"vocab_size": 320, "output": tmp_path / "t.model"} | changes
        return TokenizerTraining(input=[str(path)], **settings)

    return make


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_megatron_finds_the_special_ids_and_loses_no_character(training, model_type):
    trained = train_sentencepiece(training(model_type=model_type))
    options = TokenizerOptions("SentencePieceTokenizer", tokenizer_model=str(trained.path))
    tokenizer = build_megatron_tokenizer(options)
    assert trained.vocab_size == tokenizer.vocab_size == 320
    assert trained.num_lines == 2 * len(LINES)
    ids = (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad)
    assert ids == (0, 1, 2, 2, 3)
    for text in (ODD_TEXT, LINES[0]):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_without_byte_fallback_line_breaks_are_still_known(training):
    path = train_sentencepiece(training(byte_fallback=False, vocab_size=80)).path
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert processor.decode(processor.encode(LINES[0])) == LINES[0]
    assert processor.unk_id() in processor.encode("一")


def test_same_corpus_gives_the_same_bytes(training, tmp_path):
    first = train_sentencepiece(training()).path.read_bytes()
    second = train_sentencepiece(training(output=tmp_path / "again.model")).path.read_bytes()
    assert first == second


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_too_large_vocabulary_names_a_maximum_that_works(training, model_type):
    with pytest.raises(ValueError, match=r"--vocab-size 9999 is too large .* at most \d+") as error:
        train_sentencepiece(training(vocab_size=9999, model_type=model_type))
    maximum = int(str(error.value).split("at most ")[1].split()[0])
    assert train_sentencepiece(training(vocab_size=maximum, model_type=model_type))


def test_too_small_vocabulary_names_a_minimum_that_works(training):
    with pytest.raises(ValueError, match=r"--vocab-size 9 is too small.* at least \d+") as error:
        train_sentencepiece(training(vocab_size=9))
    minimum = int(str(error.value).split("at least ")[1].split()[0])
    assert train_sentencepiece(training(vocab_size=minimum))


def test_existing_model_is_kept_unless_overwrite(training):
    train_sentencepiece(training())
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        train_sentencepiece(training(vocab_size=330))
    assert train_sentencepiece(training(vocab_size=330, overwrite=True)).vocab_size == 330


def test_errors_in_the_corpus_pass_through_the_trainer(training, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(DocumentError, match=r"corpus\.jsonl:2: key 'text' holds int"):
        train_sentencepiece(training())
    path.write_bytes(b'{"text": ""}\n')
    with pytest.raises(ValueError, match=r"--input .*corpus\.jsonl: no text in it"):
        train_sentencepiece(training())
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "word"), ("character_coverage", 0.0), ("max_lines", 0), ("num_threads", 0)],
)
def test_settings_out_of_range_name_their_flag(training, field, value):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} {value}: expected"):
        training(**{field: value})


def test_a_line_of_any_length_is_learnt_from(training, tmp_path):
    # The library alone drops lines over 4192 bytes.
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "zebra " * 1000}))
    path = train_sentencepiece(training(vocab_size=270)).path
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert all(not processor.is_byte(piece) for piece in processor.encode("zebra"))
