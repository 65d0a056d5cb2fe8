"""Faults of data files that Megatron's own reader lets pass, and a preprocessing that is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from megatron_emo.data.check import check_indexed_dataset
from megatron_emo.data.documents import (
    DocumentError,
    DocumentReader,
    InputFormat,
    RawDocument,
    decode_document,
)
from megatron_emo.data.megatron_tokenizer import TokenizerOptions
from megatron_emo.data.preprocess import PreprocessConfig, preprocess
from megatron_emo.data.tokenizer import TokenizerTraining, train_sentencepiece
from megatron_emo.data.upstream import import_build_tokenizer, import_indexed_dataset

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 2]]
HEADER = struct.calcsize("<9sQBQQ")
FIELDS = [0, 9, 17, 18, 26, HEADER, HEADER + 12, HEADER + 36, HEADER + 36 + 32]
"""Bytes at which a field of the .idx begins, and its end: three sequences, four bounds."""


def write_pair(prefix: Path, documents: list[list[int]]) -> str:
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_sound_pair_is_read_alike(tmp_path, mmap):
    prefix = write_pair(tmp_path / "data", DOCUMENTS)
    check_indexed_dataset(prefix, 100)
    dataset = import_indexed_dataset().IndexedDataset(prefix, mmap=mmap)
    assert [dataset[index].tolist() for index in range(3)] == DOCUMENTS  # of one token, too


@pytest.mark.parametrize("cut", [0, 1, 2, 6, 8, 17])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_truncated_bin_is_refused_whatever_the_reader(tmp_path, mmap, cut):
    """Without the check the reader without mmap returns what lay in memory."""
    prefix = write_pair(tmp_path / "data", DOCUMENTS)
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"{cut} bytes, expected 18"):
        check_indexed_dataset(prefix, 100)
    if not mmap and cut == 17:
        dataset = import_indexed_dataset().IndexedDataset(prefix, mmap=mmap)
        assert len(dataset[2]) == 5  # a token of them is not in the file


@pytest.mark.parametrize("cut", FIELDS[:-1])
def test_an_index_cut_at_a_field_is_refused(tmp_path, cut):
    prefix = write_pair(tmp_path / "data", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    assert path.stat().st_size == FIELDS[-1]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"data\.idx: .*{cut} bytes"):
        check_indexed_dataset(prefix, 100)


def test_two_pairs_with_one_file_exchanged_are_refused(tmp_path):
    one = write_pair(tmp_path / "one", DOCUMENTS)
    two = write_pair(tmp_path / "two", DOCUMENTS[:2])
    shutil.copyfile(f"{one}.bin", tmp_path / "kept")
    shutil.copyfile(f"{two}.bin", f"{one}.bin")
    (tmp_path / "kept").rename(f"{two}.bin")
    for prefix, sizes in ((one, "8 bytes, expected 18"), (two, "18 bytes, expected 8")):
        with pytest.raises(ValueError, match=sizes):
            check_indexed_dataset(prefix, 100)


def test_lines_of_ten_megabytes(tmp_path):
    """A sound one is read; of a bad one, what is wrong is said in a line."""
    text = "word " * 2_000_000
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    (document,) = DocumentReader([path], InputFormat())
    assert decode_document(document, ("text",)) == [text]
    for damage in (lambda line: line[:-3], lambda line: line.replace("text", "body")):
        path.write_text(damage(json.dumps({"text": text})) + "\n")
        (document,) = DocumentReader([path], InputFormat())
        start = time.process_time()
        with pytest.raises(DocumentError) as caught:
            decode_document(document, ("text",))
        assert len(str(caught.value)) < 400 and time.process_time() - start < 5


@pytest.mark.parametrize("count", [1, 3000, 1_000_000])
def test_keys_of_a_wrong_object_are_named_shortly(count):
    line = json.dumps(dict.fromkeys(map(str, range(min(count, 3000))), "x" * (count // 3000 + 1)))
    with pytest.raises(DocumentError, match=r"a:1: no key 'text'") as caught:
        decode_document(RawDocument("a", 1, 0, line.encode(), True), ("text",))
    assert len(str(caught.value)) < 1000


@pytest.fixture
def config(tmp_path) -> PreprocessConfig:
    lines = [json.dumps({"text": f"the cat {n} sat on the mat " * 20}) for n in range(2000)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    sample = tmp_path / "sample.txt"
    sample.write_text("\n\n".join(f"the cat {n} sat on the mat" for n in range(60)))
    model = tmp_path / "t.model"
    train_sentencepiece(TokenizerTraining([str(sample)], model, vocab_size=290))
    options = TokenizerOptions("SentencePieceTokenizer", tokenizer_model=str(model))
    prefix = str(tmp_path / "out" / "data")
    return PreprocessConfig([str(tmp_path / "corpus.jsonl")], prefix, options, overwrite=True)


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_whole_pair_or_none(config):
    """kill -9 of a process that preprocesses, 30 times; what it leaves does not hinder the next."""
    import_build_tokenizer()  # so that a child takes no seconds to import
    seconds = _run_and_kill(config, after=600.0)
    (prefix,) = config.prefixes()
    whole = [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")]
    draw = random.Random(5)
    num_whole = 0
    for number in range(30):
        if number % 2:
            shutil.rmtree(Path(prefix).parent, ignore_errors=True)
        _run_and_kill(config, after=draw.uniform(0, 1.1) * seconds)
        if not Path(prefix + ".idx").exists():
            continue
        num_whole += 1
        assert [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")] == whole
        check_indexed_dataset(prefix, 290)
    assert 0 < num_whole < 30
    _run_and_kill(config, after=600.0)
    names = sorted(path.name for path in Path(prefix).parent.iterdir())
    assert names == ["data_text_document.bin", "data_text_document.idx"]


def _run_and_kill(config: PreprocessConfig, after: float) -> float:
    """Preprocess in a child that is killed after so many seconds; return how many it ran."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
        child = os.fork()
    if child == 0:
        try:
            preprocess(config)
        finally:
            os._exit(0)
    ended = 0
    while not ended and time.monotonic() - start < after:
        ended, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return time.monotonic() - start
