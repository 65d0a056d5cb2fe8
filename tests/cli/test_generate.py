"""tools/generate.py on tiny models, against transformers on the folder that an export writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import POSITIONS, VOCAB_SIZE, save_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from megatron_emo.conversion.language_model import load_megatron

PROMPTS = ["the a sees", "the b", "sees the k the"]
PIECES = 40


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Path:
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(f"the {a} sees the {b}" for a in "abcdef" for b in "ghijkl"))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "sp"),
        vocab_size=PIECES,
        model_type="bpe",
        minloglevel=2,
    )
    return folder / "sp.model"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, load_tool) -> dict[str, Path]:
    """Of a tied GPT-2 with its tokenizer and an untied Llama with 2 of 4 heads for keys, without.

    131 tokens are padded to 256 rows, 40 to 128.
    """
    folder, convert = tmp_path_factory.mktemp("checkpoints"), load_tool("convert_checkpoint").main
    save_model("gpt2", folder / "gpt2-hf")
    save_model("llama", folder / "llama-hf", vocab_size=PIECES)
    known = ["</s>", "the", "sees", *"abcdefghijkl"]
    known += [f"w{index}" for index in range(len(known), VOCAB_SIZE)]
    words = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(words, "the"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder / "gpt2-hf")
    for name in ("gpt2", "llama"):
        argv = ["import", "--hf", f"{folder}/{name}-hf", "--output", f"{folder}/{name}"]
        convert([*argv, "--no-verify"])
    return {name: folder / name for name in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("generate").main


def run(tool, *argv: object) -> None:
    tool([str(word) for word in argv])


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(params=["gpt2", "llama"])
def exported(request, checkpoints, sentencepiece, load_tool, tmp_path):
    """(the flags that name a checkpoint, the folder exported from it)"""
    flags = ["--megatron", str(checkpoints[request.param])]
    if request.param == "llama":
        flags += ["--tokenizer-model", str(sentencepiece)]
    out = tmp_path / "exported"
    load_tool("convert_checkpoint").main(["export", *flags, "--output", str(out), "--no-verify"])
    return flags, out


def test_greedy_texts_are_those_of_transformers_on_the_exported_folder(
    tool, exported, checkpoints, tmp_path
):
    flags, folder = exported
    before = listing(checkpoints["gpt2"].parent)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    argv = (*prompts, "--temperature", 0, "--max-new-tokens", 10)
    run(tool, *flags, *argv, "--output", tmp_path / "megatron.jsonl")
    run(tool, "--hf", folder, *argv, "--output", tmp_path / "hf.jsonl")
    assert listing(checkpoints["gpt2"].parent) == before

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    greedy = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    expected = [
        tokenizer.decode(
            model.generate(**tokenizer(prompt, return_tensors="pt"), generation_config=greedy)[0],
            skip_special_tokens=True,
        )
        for prompt in PROMPTS
    ]
    for file in ("megatron.jsonl", "hf.jsonl"):
        found = rows(tmp_path / file)
        assert [row["text"] for row in found] == expected
        assert [row["prompt"] for row in found] == PROMPTS
    assert len(set(expected)) == 3


def test_the_same_seed_draws_the_same_texts(tool, exported, tmp_path):
    flags, folder = exported
    argv = ("--num-samples", 3, "--max-new-tokens", 10, "--top-p", 0.95, "--temperature", 2)
    for name, source, seed in (
        ("first", flags, 7),
        ("second", flags, 7),
        ("other", flags, 8),
        ("folder", ("--hf", folder), 7),
    ):
        run(tool, *source, *argv, "--seed", seed, "--output", tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    texts = {name: [row["text"] for row in rows(tmp_path / name)] for name in ("first", "other")}
    assert len({*texts["first"], *texts["other"]}) == 6
    assert [row["text"] for row in rows(tmp_path / "folder")] == texts["first"]


def test_a_file_says_how_it_was_made(tool, checkpoints, tmp_path):
    file = tmp_path / "new" / "texts.jsonl"
    argv = ("--prompt", "the a", "--max-new-tokens", 4, "--top-k", 9, "--dtype", "bfloat16")
    run(tool, "--megatron", checkpoints["gpt2"], *argv, "--device", "cpu", "--output", file)
    (row,) = rows(file)
    note = json.loads((tmp_path / "new" / "texts.jsonl.recipe.json").read_text())
    assert row.pop("settings") == note["settings"]
    assert row["text"] == "the a" + row.pop("continuation")
    assert len(row.pop("tokens")) == 4 and len(row.pop("text")) > 5
    assert row == {"id": 0, "sample": 0, "prompt": "the a", "ended": False}
    assert len(note["recipe"].pop("model")) == len(note["recipe"].pop("prompts_sha256")) == 64
    assert note["recipe"] == {
        "mode": "sample",
        "dtype": "bfloat16",
        "max_new_tokens": 4,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_k": 9,
        "num_samples": 1,
        "batch_size": 8,
        "prompts": 1,
        "seed": 1234,
    }
    assert len(list(file.parent.iterdir())) == 2


def test_the_hash_of_a_checkpoint_is_of_its_weights(tool, checkpoints, tmp_path, load_tool):
    other, folder = tmp_path / "other", tmp_path / "hf"
    shutil.copytree(checkpoints["gpt2"].parent / "gpt2-hf", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    argv = ["import", "--hf", str(folder), "--output", str(other), "--no-verify"]
    load_tool("convert_checkpoint").main(argv)
    models = [load_megatron(path) for path in (checkpoints["gpt2"], checkpoints["gpt2"], other)]
    assert models[0].sha256 == models[1].sha256 != models[2].sha256
    assert [model.name for model in models[1:]] == ["gpt2/release", "other/release"]


def test_a_text_ends_where_the_exported_folder_says(tool, checkpoints, tmp_path):
    tokenizer, file = tmp_path / "tokenizer", tmp_path / "texts.jsonl"
    shutil.copytree(checkpoints["gpt2"].parent / "gpt2-hf", tokenizer)
    argv = ("--megatron", checkpoints["gpt2"], "--tokenizer-model", tokenizer, "--output", file)
    argv += ("--prompt", "the a", "--max-new-tokens", 9, "--overwrite")
    run(tool, *argv)
    (row,) = rows(file)
    end = row["tokens"][3]
    GenerationConfig(eos_token_id=[end, 77]).save_pretrained(tokenizer)
    run(tool, *argv)
    (cut,) = rows(file)
    assert cut["tokens"] == row["tokens"][: row["tokens"].index(end)]
    assert cut["ended"] and not row["ended"]


def test_a_run_that_was_cut_off_is_taken_up(tool, checkpoints, tmp_path, monkeypatch):
    flags = ("--megatron", checkpoints["gpt2"], "--num-samples", 5, "--batch-size", 2)
    argv = (*flags, "--max-new-tokens", 6, "--prompt", "the a", "--prompt", "the b")
    whole, file = tmp_path / "whole.jsonl", tmp_path / "texts.jsonl"
    run(tool, *argv, "--output", whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    part = tmp_path / "texts.jsonl.part"

    for kept, cut in ((4, b'{"id": 0, "sam'), (5, b""), (0, b""), (10, b"")):
        part.write_bytes(b"".join(lines[:kept]) + cut)
        drawn = []
        draw = torch.nn.Module.__call__

        def count(self, *args, draw=draw, drawn=drawn, **kwargs):
            if type(self).__name__ == "GPT2LMHeadModel":
                drawn.append(1)
            return draw(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__call__", count)
            run(tool, *argv, "--output", file, "--resume")
        assert len(drawn) == 6 * (5 - kept // 2)
        assert file.read_bytes() == whole.read_bytes()
        assert not part.exists()
        file.unlink()

    part.write_bytes(b"".join(lines[:4]))
    again = (*argv, "--output", file)
    with pytest.raises(SystemExit, match="--output .*part: exists; --resume goes on, --overwrite"):
        run(tool, *again)
    with pytest.raises(SystemExit, match="part:1: has top_k None, expected 3; --overwrite starts"):
        run(tool, *again, "--resume", "--top-k", 3)
    with pytest.raises(SystemExit, match="has prompts 2, expected 1; prompts_sha256 '"):
        run(tool, *flags, "--max-new-tokens", 6, "--prompt", "the b", "--output", file, "--resume")
    assert part.read_bytes() == b"".join(lines[:4])
    run(tool, *again, "--overwrite")
    assert file.read_bytes() == whole.read_bytes()


def test_texts_on_the_console(tool, checkpoints, tmp_path, capsys):
    flags = ("--megatron", checkpoints["gpt2"], "--temperature", 0, "--max-new-tokens", 5)
    run(tool, *flags, "--prompt", "the a")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the a ") and len(line.split()) <= 7
    file = tmp_path / "prompts.txt"
    file.write_text("the b\n\nthe c\n")
    run(tool, *flags, "--prompt", "the a", "--prompt-file", file)
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["== 1/3", "== 2/3", "== 3/3"]
    assert lines[1] == line
    assert [text[:5] for text in lines[1::2]] == ["the a", "the b", "the c"]
    # Without a prompt, a text as it begins after the end of another.
    run(tool, *flags)
    text = capsys.readouterr().out
    run(tool, *flags, "--prompt", "</s>")
    assert capsys.readouterr().out.removeprefix("</s>") == text != "\n"
    # Of .jsonl the prompts are those of --make-prompts.
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 3, "prompt": "the a", "reference": "the a sees"}\n')
    run(tool, *flags, "--prompt-file", file)
    assert capsys.readouterr().out == f"{line}\n"


def refused(tool, message: str, *argv: object) -> None:
    with pytest.raises(SystemExit, match=message):
        run(tool, *argv)


BAD_FLAGS = {
    "--top-p 2": "--top-p: expected above 0 and up to 1, got 2.0",
    "--top-p 0": "--top-p: expected above 0 and up to 1, got 0.0",
    "--typical-p nan": "--typical-p: expected above 0 and up to 1, got nan",
    "--top-k=-1": "--top-k: expected at least 1, got -1",
    "--temperature=-0.5": "--temperature: expected above 0 and finite, got -0.5",
    "--temperature nan": "--temperature: expected above 0 and finite, got nan",
    "--max-new-tokens 0": "--max-new-tokens: expected at least 1, got 0",
    "--num-samples 0": "--num-samples: expected at least 1, got 0",
    "--batch-size 0": "--batch-size: expected at least 1, got 0",
    "--seed=-1": "--seed: expected at least 0, got -1",
    "--temperature 0 --num-samples 2": "--num-samples: expected 1 with --temperature 0, which .* 2",
    "--temperature 0 --top-k 5": "--top-k: expected 0 with --temperature 0, which .* got 5",
    "--temperature 0 --top-p 0.9": "--top-p: expected 1.0 with --temperature 0, which .* got 0.9",
    "--device abacus": "--device: expected a device of this machine, got abacus: ",
    "--resume": "--resume: expected --output with it, found none",
    "--overwrite": "--overwrite: expected --output with it, found none",
}


def test_bad_flags_are_named_before_a_model_is_read(tool, tmp_path):
    model = ("--megatron", tmp_path / "none")
    for words, message in BAD_FLAGS.items():
        refused(tool, f"generate: {message}", *model, *words.split())
    refused(tool, "--prompt: expected UTF-8, got 'a.*'", *model, "--prompt", "a\udcff")
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes(b"caf\xe9\n")
    refused(tool, "empty.txt: expected texts, found none", *model, "--prompt-file", empty)
    refused(tool, "latin.txt: expected UTF-8, byte 3", *model, "--prompt-file", latin)
    refused(tool, "No such file.*absent", *model, "--prompt-file", tmp_path / "absent")
    refused(tool, "--output .*empty.txt: exists; --resume goes", *model, "--output", empty)
    assert empty.read_text() == "\n \n"
    refused(tool, "none: no such folder", *model)
    refused(tool, "--iteration 5: expected with --megatron alone", "--hf", "x", "--iteration", 5)
    refused(tool, "expected a folder with config.json", "--hf", tmp_path)


def test_models_and_prompts_that_do_not_fit_are_named(tool, checkpoints, sentencepiece, tmp_path):
    llama, gpt2 = ("--megatron", checkpoints["llama"]), ("--megatron", checkpoints["gpt2"])
    refused(tool, "no tokenizer found, its arguments name None; give --tokenizer-model", *llama)
    refused(tool, "--tokenizer-model x: no such file", *llama, "--tokenizer-model", "x")
    refused(tool, "no folder iter_0000007", *gpt2, "--iteration", 7)
    refused(
        tool, f"--max-new-tokens: expected at most {POSITIONS - 1}", *gpt2, "--max-new-tokens=48"
    )
    too_small = (*gpt2, "--vocab-size", 30, "--tokenizer-model", sentencepiece)
    refused(tool, "it has 40 tokens, expected at most 30", *too_small)
    run(tool, *llama, "--hf-config", checkpoints["gpt2"].parent / "llama-hf", *_with(sentencepiece))
    # A model that fails leaves no output and what there was.
    file = tmp_path / "texts.jsonl"
    file.write_text("old")
    argv = ("--output", file, "--overwrite", "--max-new-tokens", 48)
    refused(tool, "--max-new-tokens: .* got 48", *gpt2, *argv)
    assert file.read_text() == "old"


def _with(tokenizer: Path) -> tuple[object, ...]:
    return ("--tokenizer-model", tokenizer, "--max-new-tokens", 2)


def test_code_in_a_folder_does_not_run(tool, exported, tmp_path):
    _, folder = exported
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    config = json.loads((evil / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(tool, "found evil.py, auto_map in config.json", "--hf", evil)
    assert not (tmp_path / "ran").exists()


def test_help_names_units_and_defaults(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tool, "--help")
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0 takes the most probable token (default 1.0)" in said
    assert "texts for each prompt (default 1)" in said
