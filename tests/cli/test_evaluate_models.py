"""tools/evaluate.py perplexity, distribution, generate and temperature on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from icl_models import save_with_tokenizer

from megatron_emo.evaluation.records import hash_file, hash_model, read_records

WORDS = "the film is so good and so bad it is about world".split()


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("evaluate").main


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(save_with_tokenizer(name, folder / name) for name in ("llama-tied", "gpt2"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Six texts of 36 to 46 words."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [" ".join(WORDS[(i * j) % 12] for j in range(36 + 2 * i)) for i in range(6)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def run(main, *argv: str | Path) -> dict:
    """{metric: record} of the file that --json names, last of argv."""
    main([str(word) for word in argv])
    return {record.metric: record for record in read_records([argv[-1]])}


def test_perplexity_of_documents_and_their_comparison(main, models, texts, tmp_path, capsys):
    found = {}
    for folder in models:
        sums = tmp_path / f"{folder.name}.jsonl"
        argv = ("perplexity", "--model", folder, "--texts", texts, "--window", "32")
        argv += ("--per-document", sums, "--label", "domain=test")
        found[folder.name] = run(main, *argv, "--json", tmp_path / f"{folder.name}.json")
        assert len(sums.read_text().splitlines()) == 6
    record = found["gpt2"]["token_perplexity"]
    assert record.model == "gpt2" and record.model_sha256 == hash_model(models[1])
    assert record.data == {"texts.jsonl": hash_file(texts)} and record.labels == {"domain": "test"}
    assert record.settings["window"] == 32 and record.settings["stride"] == 16
    assert record.settings["prefix"] == "</s>" and record.settings["documents"] == 6
    assert record.seconds > 0 and record.interval.low < record.value < record.interval.high
    cross_entropy = found["gpt2"]["cross_entropy"].value
    assert record.value == pytest.approx(math.exp(cross_entropy))

    files = (tmp_path / "llama-tied.jsonl", tmp_path / "gpt2.jsonl")
    compared = run(main, "perplexity", "--compare", *files, "--json", tmp_path / "c.json")
    difference = found["llama-tied"]["cross_entropy"].value - cross_entropy
    assert compared["cross_entropy_difference"].value == pytest.approx(difference, rel=1e-9)
    assert compared["cross_entropy_difference"].data == {f.name: hash_file(f) for f in files}
    assert "bits_per_byte_difference" in capsys.readouterr().out


def test_perplexity_of_a_stream(main, models, texts, tmp_path):
    argv = ("perplexity", "--model", models[0], "--texts", texts, "--mode", "stream")
    argv += ("--separator", r"\n", "--metrics", "bits_per_byte,word_perplexity", "--limit", "3")
    found = run(main, *argv, "--prefix", "none", "--json", tmp_path / "s.json")
    assert sorted(found) == ["bits_per_byte", "word_perplexity"]
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()[:3]]
    assert found["bits_per_byte"].n == len("\n".join(lines))
    assert found["word_perplexity"].n == 36 + 38 + 40
    assert found["bits_per_byte"].settings["unscored_first_tokens"] == 1
    assert found["bits_per_byte"].settings["separator"] == "\n"


def test_words_and_bytes_of_another_field(main, models, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "so good, it is", "page": "so good @,@ it is"}) + "\n")
    argv = ("perplexity", "--model", models[0], "--texts", path, "--count-field", "page")
    found = run(main, *argv, "--json", tmp_path / "d.json")
    assert found["word_perplexity"].n == 5 and found["bits_per_byte"].n == 17


def test_distribution(main, models, texts, tmp_path):
    argv = ("distribution", "--model", models[0], "--reference", models[1], "--texts", texts)
    found = run(main, *argv, "--json", tmp_path / "d.json")
    assert found["forward_kl"].value == pytest.approx(
        found["forward_cross_entropy"].value - found["reference_entropy"].value, rel=1e-4
    )
    ppl = ("perplexity", "--model", models[0], "--texts", texts)
    alone = run(main, *ppl, "--json", tmp_path / "p.json")
    assert found["cross_entropy"].value == pytest.approx(alone["cross_entropy"].value, rel=1e-6)
    record = found["tvd"]
    assert 0 < record.value < 1 and record.settings["reference"] == "gpt2"
    assert record.settings["texts"] == 6 and record.settings["left_out_short"] == 0
    emo = run(main, *argv, "--convention", "emo", "--json", tmp_path / "e.json")
    assert emo["tvd"].value != record.value and "released" in emo["tvd"].definition


def test_prompts_generate_resume_and_reference(main, models, texts, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    argv = ("generate", "--make-prompts", texts, "--prompt-words", "4", "--continuation-words", "9")
    run_ = [str(word) for word in (*argv, "--output", prompts)]
    main(run_)
    assert "prompts.jsonl: 6 prompts of 4 words" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--overwrite replaces it"):
        main(run_)
    argv = ("generate", "--model", models[0], "--prompts", prompts, "--output", out)
    argv += ("--max-new-tokens", "6", "--batch-size", "2", "--seed", "4")
    found = run(main, *argv, "--reference", models[1], "--json", tmp_path / "g.json")
    assert sorted(found) == [
        *("ended_share", "generation_entropy", "generation_perplexity"),
        *("generation_top1_mass", "mean_length"),
    ]
    assert found["mean_length"].n == 6 and found["mean_length"].seed == 4
    assert found["generation_perplexity"].settings["reference"] == "gpt2"
    assert set(found["mean_length"].data) == {"prompts.jsonl", "out.jsonl"}
    whole = out.read_bytes()
    row = json.loads(whole.splitlines()[0])
    assert row["text"] == row["prompt"] + row["continuation"]
    assert row["settings"] == found["mean_length"].settings["settings_hash"]

    out.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="out.jsonl: exists; --resume goes on"):
        main([str(word) for word in argv])
    again = run(main, *argv, "--resume", "--json", tmp_path / "r.json")
    assert out.read_bytes() == whole
    assert again["generation_entropy"].value == found["generation_entropy"].value
    greedy = (*argv, "--mode", "greedy", "--resume", "--json", tmp_path / "x.json")
    with pytest.raises(SystemExit, match="out.jsonl:1: has mode 'unbiased', expected 'greedy'; --"):
        main([str(word) for word in greedy])


def test_a_temperature_that_makes_entropies_equal(main, models, texts, tmp_path):
    argv = ("temperature", "--model", models[0], "--texts", texts, "--tolerance", "1e-5")
    found = run(main, *argv, "--match-entropy-of", models[1], "--json", tmp_path / "t.json")
    assert found["entropy_after"].value == pytest.approx(found["entropy_target"].value, abs=1e-5)
    temperature = found["matched_temperature"].value
    assert abs(temperature - 1) > 1e-3
    assert found["matched_temperature"].settings["match_entropy_of"] == "gpt2"
    # The same entropies, by the other command and the same texts.
    argv = ("distribution", "--model", models[0], "--reference", models[1], "--texts", texts)
    argv += ("--temperature", str(temperature), "--json", tmp_path / "d.json")
    measured = run(main, *argv)
    assert measured["entropy"].value == pytest.approx(measured["reference_entropy"].value, abs=2e-5)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("perplexity --texts {texts}", "--model: expected a value, got none"),
        ("perplexity --model {a}", "--texts: expected a value, got none"),
        ("perplexity --model {a} --texts {texts} --metrics ppl", "--metrics: expected some of"),
        ("perplexity --model {a} --texts {texts} --window 999", "--window: expected 1 to 256"),
        ("perplexity --model {a} --texts {texts} --separator x", "--separator: expected --mode"),
        ("perplexity --model {a} --texts {texts} --resume", "expected --per-document"),
        (
            "perplexity --model {a} --texts {texts} --mode stream --per-document {out}",
            "--per-document: expected --mode documents",
        ),
        ("perplexity --model {a} --compare {texts} {texts}", "--compare: reads its two files"),
        ("perplexity --model {out} --texts {texts}", "expected a folder with config.json"),
        ("perplexity --model {a} --texts {texts} --temperature 0", "--temperature: expected above"),
        ("distribution --model {a} --reference {b} --texts {texts} --min-words 99", "found 0 of 6"),
        ("generate --prompts {texts} --output {out}", "--model: expected a value, got none"),
        ("generate --model {a} --prompts {texts} --output {out}", "--field: expected one of"),
        ("temperature --model {a} --texts {texts} --entropy 9", "--entropy: expected above 0 and"),
        ("temperature --model {a} --texts {texts} --entropy 1 --tolerance 0", "--tolerance:"),
    ],
)
def test_mistakes_are_named(main, models, texts, tmp_path, argv, message):
    names = {"a": models[0], "b": models[1], "texts": texts, "out": tmp_path / "out.jsonl"}
    with pytest.raises(SystemExit, match=message):
        main(argv.format(**names).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["perplexity", "distribution", "generate", "temperature"])
def test_help(main, command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"tools/evaluate.py {command} " in capsys.readouterr().out
