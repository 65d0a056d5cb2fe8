"""The data tools as a user runs them, from a corpus to a checked .bin/.idx pair."""

from __future__ import annotations

import gzip
import json

import pytest

TOOLS = ["make_demo_corpus", "train_tokenizer", "preprocess_data", "check_data"]


@pytest.mark.parametrize("name", TOOLS)
def test_help_shows_the_docstrings_command(load_tool, capsys, name):
    with pytest.raises(SystemExit) as stop:
        load_tool(name).main(["--help"])
    assert stop.value.code == 0
    assert f"python tools/{name}.py --" in capsys.readouterr().out


def test_corpus_to_checked_data(load_tool, tmp_path, capsys):
    lines = [json.dumps({"text": f"a cat and {n} birds"}) for n in range(40)]
    (tmp_path / "1.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:]).encode()))
    inputs, model, prefix = str(tmp_path / "*.jsonl*"), str(tmp_path / "t.model"), tmp_path / "data"
    train = ["--input", inputs, "--output", model, "--vocab-size", "290"]
    load_tool("train_tokenizer").main(train)
    assert "290 pieces from 40 lines" in capsys.readouterr().out
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    arguments = ["--input", inputs, "--output-prefix", str(prefix), *tokenizer, "--append-eod"]
    load_tool("preprocess_data").main(arguments)
    assert f"{prefix}_text_document.bin: 40 documents" in capsys.readouterr().out
    check = ["--data-path", f"{prefix}_text_document", "--vocab-size"]
    load_tool("check_data").main([*check, "290"])
    assert "40 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"check_data: .*data_text_document\.bin: token 0 is"):
        load_tool("check_data").main([*check, "2"])
    with pytest.raises(SystemExit, match=r"preprocess_data: .*\.bin exists; pass --overwrite"):
        load_tool("preprocess_data").main(arguments)
    with pytest.raises(SystemExit, match=r"train_tokenizer: .*t\.model exists; pass --overwrite"):
        load_tool("train_tokenizer").main(train)


def test_make_demo_corpus_writes_what_it_says(load_tool, tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    load_tool("make_demo_corpus").main(["--output", str(path)])
    num_lines = path.read_bytes().count(b"\n")
    assert f"{path}: {num_lines} documents" in capsys.readouterr().out


def test_progress_names_the_rates(load_tool, tmp_path, caplog):
    path = tmp_path / "corpus.txt"
    path.write_text("one two three\n\n" * 600)
    model = tmp_path / "t.model"
    vocab = ["--vocab-size", "270"]
    load_tool("train_tokenizer").main(["--input", str(path), "--output", str(model), *vocab])
    load_tool("preprocess_data").main(
        ["--input", str(path), "--output-prefix", str(tmp_path / "d"), "--log-interval", "256"]
        + ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    )
    assert [record.message.split(" | ")[0] for record in caplog.records] == [
        "256 documents",
        "512 documents",
    ]
    for unit in ("MB/s", "tokens/s", "ETA 0m"):
        assert unit in caplog.text
