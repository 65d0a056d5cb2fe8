"""Text to .bin/.idx: what Megatron's own reader finds must be what the tokenizer says."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import warnings
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_emo.data import files
from megatron_emo.data.documents import DocumentError, InputFormat, RawDocument
from megatron_emo.data.encode import Encoder, EncoderOptions, encode_batches, start_fork_server
from megatron_emo.data.megatron_tokenizer import (
    TokenizerOptions,
    add_tokenizer_arguments,
    build_megatron_tokenizer,
)
from megatron_emo.data.preprocess import PreprocessConfig, preprocess
from megatron_emo.data.tokenizer import TokenizerTraining, train_sentencepiece
from megatron_emo.data.upstream import import_indexed_dataset

# megatron-core's reader logs on rank 0 and warns that nothing told it its rank.
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")

TEXTS = [f"the cat number {n} sat on the mat\nand saw {n * n} birds" for n in range(700)]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "megatron_indexed"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text("\n\n".join(TEXTS[:60]))
    training = TokenizerTraining([str(folder / "corpus.txt")], folder / "t.model", vocab_size=320)
    return train_sentencepiece(training).path


@pytest.fixture
def make_config(tmp_path, model):
    """Return make_config(lines or bytes, **changes): a config over that JSONL input."""

    def make(data: list[dict] | bytes, **changes) -> PreprocessConfig:
        if not isinstance(data, bytes):
            data = "".join(json.dumps(record) + "\n" for record in data).encode()
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "corpus.jsonl").write_bytes(data)
        options = TokenizerOptions("SentencePieceTokenizer", tokenizer_model=str(model))
        settings = {"tokenizer": options, "output_prefix": str(tmp_path / "out" / "data")}
        return PreprocessConfig([str(tmp_path / "in" / "corpus.jsonl")], **settings | changes)

    return make


def hugging_face_folder(folder: Path, vocabulary: dict[str, int], **config) -> TokenizerOptions:
    """Write a word-level tokenizer and return the options that name it."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerOptions("HuggingFaceTokenizer", tokenizer_model=str(folder))


def read_documents(prefix: str) -> list[list[int]]:
    dataset = import_indexed_dataset().IndexedDataset(prefix)
    bounds = dataset.document_indices
    assert bounds.tolist() == list(range(len(dataset) + 1))  # one sequence per document
    return [dataset[index].tolist() for index in range(len(dataset))]


def output_names(config: PreprocessConfig) -> list[str]:
    folder = Path(config.output_prefix).parent
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_megatron_reads_what_sentencepiece_encodes(make_config, model):
    config = make_config([{"text": text} for text in TEXTS], append_eod=True)
    summary = preprocess(config)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [[*processor.encode(text), processor.eos_id()] for text in TEXTS]
    assert read_documents(config.prefixes()[0]) == expected
    assert (summary.num_documents, summary.num_tokens) == (700, [sum(map(len, expected))])
    assert output_names(config) == ["data_text_document.bin", "data_text_document.idx"]


def test_tokenizer_flags_are_megatrons():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing
        from megatron.training.arguments import _add_tokenizer_args

    def flags(add) -> dict:
        parser = argparse.ArgumentParser()
        add(parser)
        return {
            action.dest: (action.option_strings[0], type(action), action.default, action.nargs)
            for action in parser._actions
        }

    ours, megatrons = flags(add_tokenizer_arguments), flags(_add_tokenizer_args)
    assert ours == {dest: megatrons[dest] for dest in ours}
    assert len(ours) > 10


def test_two_workers_write_the_same_bytes_as_one(make_config):
    lines = [{"text": text} for text in TEXTS * 3]
    one = make_config(lines, append_eod=True)
    two = make_config(lines, append_eod=True, workers=2, output_prefix=one.output_prefix + "2")
    assert preprocess(one).num_tokens == preprocess(two).num_tokens
    for suffix in (".bin", ".idx"):
        first, second = (Path(config.prefixes()[0] + suffix) for config in (one, two))
        assert first.read_bytes() == second.read_bytes()


def test_an_error_in_a_worker_ends_the_run_without_output(make_config):
    data = b'{"text": "a"}\n' * 600 + b'{"text": "\xff"}\n' + b'{"text": "a"}\n' * 3000
    config = make_config(data, workers=2)
    with pytest.raises(DocumentError, match=r"corpus\.jsonl:601: not UTF-8"):
        preprocess(config)
    assert output_names(config) == []


def test_a_killed_worker_is_an_error_and_no_hang(model):
    options = EncoderOptions(TokenizerOptions("SentencePieceTokenizer", str(model)))
    documents = (RawDocument("a.txt", line, 0, b"the cat", False) for line in itertools.count(1))
    start_fork_server()
    before = active_children()  # the suite's other pools
    batches = encode_batches(documents, Encoder(options), options, num_workers=2)
    assert next(batches).num_documents == 256
    for process in set(active_children()) - set(before):
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a tokenizer worker died .* from a\.txt:\d+ on"):
        for _ in batches:
            pass


BAD_LINES = [b'{"text": "\xff"}', b"nonsense", b'{"body": "x"}', b'{"text": 1}']


@pytest.mark.parametrize("line", BAD_LINES)
def test_an_unusable_document_stops_the_run_without_output(make_config, line):
    config = make_config(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DocumentError, match=r"corpus\.jsonl:2: "):
        preprocess(config)
    assert output_names(config) == []


def test_unusable_documents_are_skipped_and_counted_on_request(make_config, caplog):
    data = b"\n".join([b'{"text": "fine"}', *BAD_LINES, b'{"text": ""}', b'{"text": "good"}'])
    config = make_config(data, on_error="skip")
    summary = preprocess(config)
    assert (summary.num_documents, summary.num_skipped, summary.num_empty) == (2, 4, 1)
    assert len(read_documents(config.prefixes()[0])) == 2
    assert "corpus.jsonl:2: not UTF-8" in caplog.text
    assert "corpus.jsonl:6: empty document left out" in caplog.text


def test_a_document_empty_under_one_key_is_left_out_under_all(make_config, model):
    lines = [{"a": "one", "b": "two"}, {"a": "", "b": "x"}, {"a": "three", "b": "four"}]
    config = make_config(lines, json_keys=("a", "b"), append_eod=True)
    assert preprocess(config).num_empty == 1
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for prefix, texts in zip(config.prefixes(), (["one", "three"], ["two", "four"]), strict=True):
        assert read_documents(prefix) == [[*processor.encode(text), 2] for text in texts]


@pytest.mark.parametrize("data", [b'{"text": ""}\n', b"\n\n", b""])
def test_a_corpus_without_documents_is_an_error(make_config, data):
    with pytest.raises(ValueError, match="no document to write|the file is empty"):
        preprocess(config := make_config(data))
    assert output_names(config) == []


def test_long_documents_and_nul_characters_survive(make_config, model):
    texts = ["a cat " * 300_000, "a\x00b", "\x00"]  # the first is more than one batch's bytes
    config = make_config([{"text": text} for text in texts], max_documents=2)
    assert preprocess(config).num_documents == 2
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [processor.decode(ids) for ids in read_documents(config.prefixes()[0])] == texts[:2]


def test_an_id_outside_the_vocabulary_is_refused_before_it_wraps(make_config, tmp_path):
    options = hugging_face_folder(tmp_path / "hf", {"<unk>": 0, "cat": 1, "gap": 70000})
    config = make_config([{"text": "cat"}, {"text": "cat gap cat"}], tokenizer=options)
    message = r"corpus\.jsonl:2: token id 70000 is outside the vocabulary \[0, 3\); 1 such id"
    with pytest.raises(DocumentError, match=message):
        preprocess(config)
    assert output_names(config) == []


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_the_dtype_holds_the_vocabulary(make_config, tmp_path, vocab_size, dtype):
    vocabulary = {"<unk>": 0} | {f"w{n}": n for n in range(1, vocab_size)}
    options = hugging_face_folder(tmp_path / "hf", vocabulary)
    config = make_config([{"text": f"w1 w{vocab_size - 1}"}], tokenizer=options)
    preprocess(config)
    assert read_documents(config.prefixes()[0]) == [[1, vocab_size - 1]]
    assert import_indexed_dataset().IndexedDataset(config.prefixes()[0]).index.dtype == dtype


def test_append_eod_needs_a_tokenizer_that_has_one(make_config, tmp_path):
    config = make_config([{"text": "cat"}], append_eod=True)
    without = hugging_face_folder(tmp_path / "hf", {"<unk>": 0, "cat": 1})
    with pytest.raises(ValueError, match="--append-eod: this tokenizer has no end-of-document"):
        preprocess(make_config([{"text": "cat"}], append_eod=True, tokenizer=without))
    preprocess(config)
    assert read_documents(config.prefixes()[0])[0][-1] == 2


def test_existing_output_is_kept_unless_overwrite(make_config):
    preprocess(config := make_config([{"text": "one"}]))
    before = read_documents(config.prefixes()[0])
    with pytest.raises(FileExistsError, match=r"data_text_document\.bin exists; pass --overwrite"):
        preprocess(make_config([{"text": "two"}]))
    with pytest.raises(DocumentError):
        preprocess(make_config(b"nonsense", overwrite=True))
    assert read_documents(config.prefixes()[0]) == before
    preprocess(make_config([{"text": "two"}], overwrite=True))
    assert read_documents(config.prefixes()[0]) != before


def test_a_full_disk_names_the_file_and_leaves_nothing(make_config):
    config = make_config([{"text": text} for text in TEXTS])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes per file
    try:
        with pytest.raises(OSError, match=r"data_text_document\.(bin|idx)'"):
            preprocess(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert output_names(config) == []


@pytest.mark.parametrize("survived", [0, 1])
def test_killed_while_publishing_no_index_meets_another_runs_data(
    make_config, monkeypatch, survived
):
    preprocess(config := make_config([{"text": "one"}]))
    left = iter(range(survived))
    replace = os.replace

    def dies(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        preprocess(make_config([{"text": "two"}], overwrite=True))
    assert not Path(config.prefixes()[0] + ".idx").exists()


def test_two_runs_cannot_write_one_prefix(tmp_path):
    prefix = str(tmp_path / "data")
    first = files.IndexedDatasetWriter(prefix, np.uint16)
    with pytest.raises(FileExistsError, match=r"data\.bin\.tmp is being written by another"):
        files.IndexedDatasetWriter(prefix, np.uint16)
    first.add_document(np.array([1, 2], dtype=np.uint16))
    first.finish()
    first.publish()
    files.IndexedDatasetWriter(prefix, np.uint16).discard()
    assert read_documents(prefix) == [[1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_type": "GPT2BPETokenizer"}, "GPT2BPETokenizer needs --vocab-file"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
        (
            {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "no.model"},
            "--tokenizer-model no.model: no such file",
        ),
        (
            {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": __file__},
            r"--tokenizer-type SentencePieceTokenizer \(.*test_preprocess\.py\) cannot be built",
        ),
    ],
)
def test_tokenizer_flags_that_do_not_work_are_named(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_megatron_tokenizer(TokenizerOptions(**options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "--workers 0: expected at least 1"),
        ({"max_documents": 0}, "--max-documents 0: expected at least 1"),
        ({"on_error": "ignore"}, "--on-error ignore: expected one of"),
        ({"json_keys": ("a", "a")}, "--json-keys a a: a key is named twice"),
    ],
)
def test_settings_out_of_range_name_their_flag(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config([], **changes)


@pytest.mark.skipif(not SHARED.exists(), reason="no data set made by Megatron-DeepSpeed here")
def test_gpt2_data_set_of_megatron_deepspeed_is_made_again(tmp_path, monkeypatch):
    """Decode its documents, tokenize them here, and find the same bytes."""
    (tmp_path / "gpt2").mkdir()  # what megatron-core asks the hub for
    vocab, merges = SHARED / "gpt2-tiny-vocab.json", SHARED / "gpt2-tiny-merges.txt"
    (tmp_path / "gpt2" / "vocab.json").write_bytes(vocab.read_bytes())
    (tmp_path / "gpt2" / "merges.txt").write_bytes(merges.read_bytes())
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    monkeypatch.chdir(tmp_path)
    decoder = tokenizers.decoders.ByteLevel()
    pieces = {index: piece for piece, index in json.loads(vocab.read_text()).items()}
    dataset = import_indexed_dataset().IndexedDataset(
        str(SHARED / "meg-gpt2-openwebtext_text_document")
    )
    with Path("corpus.jsonl").open("w") as handle:
        for index in range(100):
            text = decoder.decode([pieces[token] for token in dataset[index][:-1].tolist()])
            handle.write(json.dumps({"text": text}) + "\n")
    options = TokenizerOptions("GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))
    config = PreprocessConfig(
        ["corpus.jsonl"], "again", options, input_format=InputFormat("jsonl"), append_eod=True
    )
    preprocess(config)
    made = Path("again_text_document.bin").read_bytes()
    original = (SHARED / "meg-gpt2-openwebtext_text_document.bin").read_bytes()
    assert len(made) == 2 * int(dataset.sequence_lengths[:100].sum())
    assert made == original[: len(made)]
