"""`tools/evaluate.py text`: texts in, records out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emo.evaluation.records import hash_file, read_records

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "the cat sat on the mat and the cat sat on the floor",
    "a dog ran over the hill",
    "over and over again over and over again",
    "naïve 日本 text with the cat sat on the mat",
    "",
    "word",
]


@pytest.fixture
def evaluate(load_tool):
    return lambda *flags: load_tool("evaluate").main(["text", *map(str, flags)])


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"sampled": text}) + "\n" for text in TEXTS))
    return path


def test_all_metrics_of_odd_texts(evaluate, texts, tmp_path, capsys):
    out = tmp_path / "text.json"
    evaluate("--texts", texts, "--field", "sampled", "--json", out, "--label", "objective=emo1")
    records = {record.metric: record for record in read_records([out])}
    assert list(records) == [
        *("diversity", "diversity-mixce"),
        *("rep-2", "rep-3", "rep-4"),
        *("repetitiveness-2", "repetitiveness-3", "repetitiveness-4"),
        *("distinct-1", "distinct-2", "distinct-3", "distinct-4"),
        "zipf",
        *("self-bleu-2", "self-bleu-3", "self-bleu-4"),
        "repetition-loops",
    ]
    for record in records.values():
        assert record.data == {"texts.jsonl": hash_file(texts)}
        assert record.labels == {"objective": "emo1"}
        assert record.n == (5 if record.metric == "diversity-mixce" else 6)
        assert record.unit == ("%" if record.metric.startswith("rep-") else "1")
        has_interval = record.metric not in ("zipf",) and "distinct" not in record.metric
        assert (record.interval is not None) == has_interval
        if record.interval:
            assert record.interval.low <= record.value <= record.interval.high
    # 12 + 5 + 7 + 9 bigrams, of which 8, 5, 4 and 9 are distinct.
    assert records["rep-2"].value == pytest.approx(100 * (1 - 26 / 33))
    assert records["repetition-loops"].value == pytest.approx(1 / 6)
    assert records["self-bleu-2"].settings["references"] == 5
    assert records["self-bleu-2"].settings["references_capped"] is False
    assert len(capsys.readouterr().out.splitlines()) == len(records)


def test_the_convention_and_the_caps_are_in_the_records(evaluate, texts, tmp_path):
    out = tmp_path / "text.json"
    flags = ["--texts", texts, "--field", "sampled", "--metrics", "self-bleu,rep", "--bootstrap", 0]
    flags += ["--convention", "simctg", "--self-bleu-sample", 3, "--self-bleu-references", 2]
    evaluate(*flags, "--seed", 7, "--json", out)
    records = {record.metric: record for record in read_records([out])}
    # The last bigram of each text left out: 11 + 4 + 6 + 8 with 7, 4, 4 and 8 distinct.
    assert records["rep-2"].value == round(100 * (1 - 23 / 29), 2)
    assert records["rep-2"].settings["convention"] == "simctg"
    assert records["rep-2"].definition.startswith("simctg")
    assert records["rep-2"].interval is None and records["rep-2"].seed == 7
    bleu = records["self-bleu-4"]
    assert bleu.n == 3 and bleu.settings["references"] == 2 and bleu.settings["references_capped"]
    again = tmp_path / "again.json"
    evaluate(*flags, "--seed", 7, "--json", again)
    assert [r.value for r in read_records([again])] == [r.value for r in records.values()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--field", "text"], "--field: expected one of"),
        (["--limit", 0], "--limit: expected at least 1, got 0"),
        (["--bootstrap", -1], "--bootstrap: expected at least 0, got -1"),
        (["--self-bleu-sample", 0], "--self-bleu-sample: expected at least 1, got 0"),
        (["--self-bleu-references", 0], "--self-bleu-references: expected at least 1, got 0"),
        (["--metrics", "self-bleu", "--limit", 1], "expected at least 2 texts, found 1"),
    ],
)
def test_bad_flags_are_named_and_nothing_is_written(evaluate, texts, tmp_path, flags, message):
    out = tmp_path / "text.json"
    with pytest.raises(SystemExit, match=message):
        evaluate("--texts", texts, "--field", "sampled", "--json", out, *flags)
    assert not out.exists()


def test_texts_too_short_for_a_metric_are_named(evaluate, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one two three\nfour\n")
    evaluate("--texts", path, "--metrics", "loops")
    for metrics, message in (
        ("rep", "rep-4: found no 4-gram in 2 texts"),
        ("diversity", "rep-4: found no 4-gram in 2 texts"),
        ("distinct", "distinct-4: found no 4-gram in 2 texts"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate("--texts", path, "--metrics", metrics)


def test_an_unknown_metric_is_refused_at_once(evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate("--texts", "no-such-file", "--metrics", "rep,divers")
    assert "expected some of diversity, rep" in capsys.readouterr().err


def test_a_tokenizer_splits_instead_of_white_space(evaluate, texts, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({character for text in TEXTS for character in text})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "letters")
    out = tmp_path / "text.json"
    flags = ["--field", "sampled", "--metrics", "distinct", "--tokenizer", tmp_path / "letters"]
    evaluate("--texts", texts, *flags, "--json", out)
    record = read_records([out])[0]
    letters = "".join(TEXTS)
    assert record.value == pytest.approx(len(set(letters)) / len(letters))
    assert record.settings["tokens"] == "tokens of letters"


def test_words_are_counted_without_any_model_package(texts):
    code = f"""
import sys
for absent in ("torch", "transformers", "sklearn", "scipy", "nltk", "mauve", "megatron"):
    sys.modules[absent] = None
from megatron_emo.evaluation.command import build_parser, run_command
flags = ["text", "--texts", {str(texts)!r}, "--field", "sampled"]
assert run_command(build_parser("").parse_args(flags))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
