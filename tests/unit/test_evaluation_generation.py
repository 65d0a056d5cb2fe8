"""Continuations: against a loop over single steps, exact probabilities, and cut files."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from icl_models import save_with_tokenizer
from scipy.stats import chisquare

from megatron_emo.evaluation.generation import (
    DEFAULT_NEW_TOKENS,
    MODES,
    Decoding,
    fit_new_tokens,
    generate,
    prompt_ids,
    whole_prompt_ids,
)
from megatron_emo.evaluation.models import LanguageModel, load_model
from megatron_emo.evaluation.prompts import DOMAINS, Lengths, make_prompts, write_prompts
from megatron_emo.evaluation.rows import RowFile, read_rows

NOTE = ".jsonl.recipe.json"
PROMPTS = ["the film is so", "good", "Review: it is bad and the film", "", "naïve 中文"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = save_with_tokenizer("llama-tied", tmp_path_factory.mktemp("m") / "llama")
    return load_model(folder)


@pytest.fixture(scope="module", params=["llama-tied", "gpt2", "opt"])
def any_model(request, tmp_path_factory) -> LanguageModel:
    """Rotary, learned, and learned positions that the attention mask counts."""
    folder = tmp_path_factory.mktemp(request.param)
    model = load_model(save_with_tokenizer(request.param, folder))
    for name, parameter in model.model.named_parameters():
        # Of 1 or so, with which GPT-2 and OPT have one token for every text.
        if name.endswith(("norm.bias", "ln_f.bias")):
            torch.nn.init.zeros_(parameter)
    return model


@pytest.fixture
def produce(model, tmp_path):
    """Return produce(decoding, batch_size, ...) -> rows, in a file of their own."""
    names = iter(range(1000))

    def run(decoding: Decoding, batch_size: int = 3, of=model, prompts=PROMPTS, **options):
        path = options.pop("path", tmp_path / f"{next(names)}.jsonl")
        total = len(prompts) * decoding.num_samples
        rows = RowFile(path, decoding.to_json(), total=total, group=batch_size, **options)
        found = generate(of, prompts, decoding, rows, batch_size=batch_size)
        rows.finish()
        assert [{**row, "settings": rows.hash} for row in found] == read_rows(path)
        return found

    return run


def next_probabilities(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def keep(decoding: Decoding, q: torch.Tensor) -> torch.Tensor:
    """q narrowed by top-k, then top-p, then typical-p; ties do not occur."""
    for name in ("top_k", "top_p", "typical_p"):
        limit = getattr(decoding, name)
        if limit is None:
            continue
        surprise = -q.log()
        if name == "typical_p":
            surprise = (surprise - (q * surprise).nansum()).abs()
        order = surprise.argsort()
        kept = (
            order[:limit]
            if name == "top_k"
            else order[: int((q[order].cumsum(0) < limit).sum()) + 1]
        )
        q = torch.zeros_like(q).index_copy(0, kept, q[kept])
        q = q / q.sum()
    return q


CASES = [
    ("unbiased", {}),
    ("temperature", {"temperature": 0.5}),
    ("top-k", {"top_k": 5, "temperature": 1.5}),
    ("top-p", {"top_p": 0.6}),
    ("typical", {"typical_p": 0.3}),
    ("sample", {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "typical_p": 0.6}),
    ("sample", {"top_k": 9, "top_p": 0.7}),
    ("sample", {}),
    ("greedy", {}),
]


@pytest.mark.parametrize("mode, settings", CASES)
def test_a_loop_over_single_steps_gives_the_same(model, produce, mode, settings):
    decoding = Decoding.choose(mode, **settings, max_new_tokens=6, num_samples=1, seed=5)
    for row in produce(decoding):
        ids, _ = prompt_ids(model, row["prompt"], 6)
        uniforms = np.random.default_rng([5, row["id"], 0]).random(6)
        tokens = []
        for uniform in uniforms:
            q = next_probabilities(model, ids + tokens)
            if decoding.temperature:
                q = (q.log() / decoding.temperature).softmax(-1)
            cumulative = keep(decoding, q).cumsum(0)
            token = int(q.argmax()) if mode == "greedy" else int((cumulative <= uniform).sum())
            if token == model.tokenizer.eos_token_id:
                break
            tokens.append(token)
        assert row["tokens"] == tokens
        assert row["ended"] == (len(tokens) < 6)


def test_greedy_rows_of_a_batch_are_those_of_whole_forwards(any_model, produce):
    for size in (1, 3, 5):
        rows = produce(Decoding.choose("greedy", max_new_tokens=8), size, of=any_model)
        for row in rows:
            ids = whole_prompt_ids(any_model, row["prompt"])
            for token in row["tokens"]:
                assert token == int(next_probabilities(any_model, ids).argmax())
                ids = [*ids, token]
        assert len({tuple(row["tokens"]) for row in rows}) == len(PROMPTS)


def test_what_a_mode_keeps_is_drawn_from_and_nothing_else(model, produce):
    for mode, settings in CASES[1:7]:
        decoding = Decoding.choose(mode, **settings, max_new_tokens=1, num_samples=400)
        rows = produce(decoding, batch_size=400, prompts=["the film"])
        eos = model.tokenizer.eos_token_id
        found = {row["tokens"][0] if row["tokens"] else eos for row in rows}
        q = next_probabilities(model, whole_prompt_ids(model, "the film"))
        allowed = keep(decoding, (q.log() / decoding.temperature).softmax(-1)).nonzero().flatten()
        assert found <= {*allowed.tolist()} and len(found) > min(len(allowed) / 3, 30)


def test_beams_find_what_transformers_finds(model, produce):
    rows = produce(Decoding.choose("beam", num_beams=3, max_new_tokens=5), batch_size=5)
    for row in rows:
        ids, _ = prompt_ids(model, row["prompt"], 5)
        out = model.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=3,
            do_sample=False,
            max_new_tokens=5,
            eos_token_id=model.tokenizer.eos_token_id,
            pad_token_id=0,
        )
        new = out[0, len(ids) :].tolist()
        assert row["tokens"] == new[: len(row["tokens"])] and len(row["tokens"]) > 0


def test_first_tokens_have_the_model_s_probabilities(model, produce):
    decoding = Decoding.choose("unbiased", max_new_tokens=1, num_samples=3000)
    rows = produce(decoding, batch_size=1000, prompts=["the film"])
    eos = model.tokenizer.eos_token_id
    counts = Counter(row["tokens"][0] if row["tokens"] else eos for row in rows)
    q = next_probabilities(model, prompt_ids(model, "the film", 1)[0]).numpy()
    often = np.flatnonzero(q * 3000 >= 5)
    observed = np.array([counts[token] for token in often] + [0])
    expected = np.append(q[often] * 3000, 0.0)
    observed[-1], expected[-1] = 3000 - observed.sum(), 3000 - expected.sum()
    assert len(often) > 50
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["unbiased", "top-p", "greedy", "beam"])
def test_the_batch_size_changes_nothing(produce, mode):
    decoding = Decoding.choose(mode, max_new_tokens=8)
    rows = [produce(decoding, batch_size=size) for size in (1, 2, 5)]
    assert rows[0] == rows[1] == rows[2]


def test_seeds_and_samples_differ(produce):
    texts = [
        [row["text"] for row in produce(Decoding.choose("unbiased", max_new_tokens=8, seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    rows = produce(
        Decoding.choose("unbiased", max_new_tokens=8, num_samples=3), prompts=PROMPTS[:2]
    )
    assert [(row["id"], row["sample"]) for row in rows] == [
        (i, s) for i in (0, 1) for s in range(3)
    ]
    assert len({row["text"] for row in rows}) == 6


def test_global_random_numbers_are_left_alone(produce):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    produce(Decoding.choose("unbiased", max_new_tokens=2))
    assert torch.rand(1) == expected


def test_a_row_holds_the_whole_text(model, produce):
    for row in produce(Decoding.choose("unbiased", max_new_tokens=9)):
        assert row["text"] == row["prompt"] + row["continuation"]
        assert len(row["tokens"]) <= 9
    whole = produce(Decoding.choose("greedy", max_new_tokens=9), prompts=["the film is"])[0]
    assert whole["continuation"] == model.tokenizer.decode(whole["tokens"])


def test_eos_ends_a_row_and_can_be_put_off(model, produce, tmp_path):
    from transformers import AutoTokenizer

    # The greedy third token of the first prompt is made EOS.
    tokens = produce(Decoding.choose("greedy", max_new_tokens=5), prompts=PROMPTS[:1])[0]["tokens"]
    folder = save_with_tokenizer("llama-tied", tmp_path / "ends")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[2])
    tokenizer.save_pretrained(folder)
    ends = load_model(folder)
    options = {"of": ends, "prompts": PROMPTS[:1]}
    row = produce(Decoding.choose("greedy", max_new_tokens=5), **options)[0]
    first = tokens.index(tokens[2])
    assert row["tokens"] == tokens[:first] and row["ended"]
    later = produce(Decoding.choose("greedy", max_new_tokens=5, min_new_tokens=5), **options)[0]
    assert len(later["tokens"]) == 5 and not later["ended"]


def test_any_of_several_ends_ends_its_own_row(model, produce, tmp_path):
    prompts, greedy = PROMPTS[:2], Decoding.choose("greedy", max_new_tokens=8)
    tokens, others = (row["tokens"] for row in produce(greedy, prompts=prompts))
    end = next(token for token in tokens if token not in others)
    unused = next(index for index in range(250) if index not in (*tokens, *others))
    folder = save_with_tokenizer("llama-tied", tmp_path / "ends")
    own = {"eos_token_id": [unused, end]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    rows = produce(greedy, of=load_model(folder), prompts=prompts)
    assert [row["tokens"] for row in rows] == [tokens[: tokens.index(end)], others]
    assert [row["ended"] for row in rows] == [True, False]


def test_settings_of_the_folder_do_not_leak_in(model, produce, tmp_path):
    folder = save_with_tokenizer("llama-tied", tmp_path / "opinionated")
    (folder / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "temperature": 0.1})
    )
    decoding = Decoding.choose("unbiased", max_new_tokens=6)
    assert produce(decoding, of=load_model(folder)) == produce(decoding)


def test_the_begin_of_a_long_prompt_is_cut(tmp_path, produce):
    model = load_model(save_with_tokenizer("gpt2", tmp_path / "short", positions=16))
    long = " ".join(["good"] * 30) + " film"
    ids, is_cut = prompt_ids(model, long, 6)
    assert is_cut and ids == model.encode(long)[-10:]
    row = produce(Decoding.choose("greedy", max_new_tokens=6), of=model, prompts=[long])[0]
    assert len(row["tokens"]) == 6 and row["text"].startswith(long)
    with pytest.raises(ValueError, match="--max-new-tokens: expected below 16, .* got 16"):
        prompt_ids(model, long, 16)


def test_special_tokens_stay_before_a_prompt_and_not_behind(tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = save_with_tokenizer("llama-tied", tmp_path / "special")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(7)
    begin, name = tokenizer.bos_token_id, tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A </s>", special_tokens=[("</s>", end), (name, begin)]
    )
    tokenizer.save_pretrained(folder)
    model = load_model(folder)
    assert model.tokenizer("good")["input_ids"][-1] == end
    assert prompt_ids(model, "good", 5) == ([7, *model.encode("good")], False)
    assert prompt_ids(model, "", 5) == ([7], False) and end != 7


class Fake:
    """A tokenizer that knows no text."""

    def __init__(self, ids=(), eos=None, bos=None):
        self._ids, self.eos_token_id, self.bos_token_id = list(ids), eos, bos

    def __call__(self, text, **_):
        return {"input_ids": self._ids}


@pytest.mark.parametrize(
    "ids, eos, bos, start",
    [([4], 1, 2, [4]), ([], 1, 2, [1]), ([], None, 2, [2]), ([], 0, None, [0])],
)
def test_where_a_prompt_without_tokens_begins(model, ids, eos, bos, start):
    assert whole_prompt_ids(replace(model, tokenizer=Fake(ids, eos, bos)), "") == start


def test_prompts_that_cannot_be_read_are_named(model):
    with pytest.raises(ValueError, match="prompt '': has no tokens, and the tokenizer no EOS or B"):
        whole_prompt_ids(replace(model, tokenizer=Fake()), "")
    size = model.vocab_size
    with pytest.raises(ValueError, match=f"prompt 'w': the tokenizer gives id {size}, expected id"):
        whole_prompt_ids(replace(model, tokenizer=Fake([3, size])), "w")
    assert whole_prompt_ids(replace(model, tokenizer=Fake([3, size - 1])), "w") == [3, size - 1]


def test_new_tokens_that_fit(tmp_path):
    model = load_model(save_with_tokenizer("gpt2", tmp_path / "short", positions=16))
    prompts = ["good", " good" * 12]
    assert len(model.encode(prompts[1])) == 12
    assert fit_new_tokens(model, prompts) == fit_new_tokens(model, prompts, 4) == 4
    assert fit_new_tokens(replace(model, context_length=None), prompts, 99) == 99
    assert fit_new_tokens(replace(model, context_length=999), prompts) == DEFAULT_NEW_TOKENS
    with pytest.raises(ValueError, match="--max-new-tokens: expected at most 4, .* 16 .* got 5"):
        fit_new_tokens(model, prompts, 5)
    with pytest.raises(ValueError, match="found one of 16 tokens, expected fewer than the 16 pos"):
        fit_new_tokens(model, ["good", " good" * 16])


def rows_of_one(model, path) -> list[dict]:
    rows, decoding = (
        RowFile(path, {}, total=1, group=1),
        Decoding.choose("greedy", max_new_tokens=8),
    )
    return generate(model, ["the film"], decoding, rows, seconds=0.0)


def test_progress_counts_tokens_of_what_is_left(model, tmp_path, capsys):
    decoding = Decoding.choose("greedy", max_new_tokens=3)
    rows = RowFile(tmp_path / "a.jsonl", {}, total=5, group=2)
    rows.found = [{}, {}]
    generate(model, PROMPTS, decoding, rows, batch_size=2, seconds=0.0)
    said = [line.split(" tokens at most, ")[0] for line in capsys.readouterr().err.splitlines()]
    steps = [f"generate: {number}/9" for number in (2, 4, 6, 7, 8, 9)]
    assert [line for line in dict.fromkeys(said) if line.startswith("generate")] == steps
    # Once all have ended, what was not made is done all the same.
    end = model.tokenizer.eos_token_id
    first = next(row["tokens"] for row in rows_of_one(model, tmp_path / "b.jsonl"))
    model.model.generation_config.eos_token_id = first[2]
    capsys.readouterr()
    rows_of_one(model, tmp_path / "c.jsonl")
    model.model.generation_config.eos_token_id = end
    said = [line.split(" tokens at most, ")[0] for line in capsys.readouterr().err.splitlines()]
    made = first.index(first[2]) + 1
    assert made < 8
    assert said == [f"generate: {number}/8" for number in (*range(1, made + 1), 8)]


# A file that was cut off


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("as_part", [False, True])
def test_a_resumed_file_equals_a_whole_one(produce, tmp_path, kept, as_part):
    decoding = Decoding.choose("unbiased", max_new_tokens=6)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    rows = produce(decoding, batch_size=2, path=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    # The line after those kept ends in the middle of a character.
    middle = b"".join(lines[:kept]) + (
        lines[4].split("中".encode())[0] + b"\xe4" if kept < 5 else b""
    )
    (tmp_path / "cut.jsonl.part" if as_part else cut).write_bytes(middle)
    assert produce(decoding, batch_size=2, path=cut, resume=True) is not None
    assert cut.read_bytes() == whole.read_bytes()
    names = {name + ending for name in ("cut", "whole") for ending in (".jsonl", NOTE)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(rows) == 5


@pytest.mark.parametrize("kept, made", [(5, []), (4, [1]), (3, [2, 1]), (0, [2, 2, 1])])
def test_finished_groups_are_not_made_again(model, produce, tmp_path, monkeypatch, kept, made):
    decoding = Decoding.choose("unbiased", max_new_tokens=4)
    path = tmp_path / "a.jsonl"
    produce(decoding, batch_size=2, path=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]))
    calls = []
    generate_ = model.model.generate
    monkeypatch.setattr(
        model.model, "generate", lambda **o: calls.append(len(o["input_ids"])) or generate_(**o)
    )
    produce(decoding, batch_size=2, path=path, resume=True)
    produce(decoding, batch_size=2, path=path, resume=True)
    assert calls == made


def test_what_is_there_is_kept(produce, tmp_path):
    path = tmp_path / "a.jsonl"
    decoding = Decoding.choose("greedy", max_new_tokens=3)
    produce(decoding, path=path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="--resume goes on, --overwrite replaces it"):
        produce(decoding, path=path)
    message = "--output .*a.jsonl:1: has max_new_tokens 3, expected 4; --overwrite starts anew"
    with pytest.raises(ValueError, match=message):
        produce(Decoding.choose("greedy", max_new_tokens=4), path=path, resume=True)
    assert path.read_bytes() == before
    produce(Decoding.choose("greedy", max_new_tokens=4), path=path, overwrite=True)
    assert path.read_bytes() != before


# Settings


@pytest.mark.parametrize(
    "mode, settings, message",
    [
        ("nucleus", {}, "--mode: expected one of unbiased"),
        ("unbiased", {"temperature": 0.7}, "--temperature: --mode unbiased does not have it"),
        ("top-p", {"top_k": 3}, "--top-k: --mode top-p does not have it, got 3"),
        ("greedy", {"num_beams": 2}, "--num-beams: --mode greedy does not have it"),
        (
            "temperature",
            {"temperature": 0.0},
            "--temperature: expected above 0 and finite, got 0.0",
        ),
        ("sample", {"temperature": float("inf")}, "--temperature: .* finite, got inf"),
        ("sample", {"temperature": float("nan")}, "--temperature: .* finite, got nan"),
        ("sample", {"typical_p": 0.0}, "--typical-p: expected above 0 and up to 1, got 0.0"),
        ("sample", {"num_beams": 2}, "--num-beams: --mode sample does not have it"),
        ("top-p", {"top_p": 1.5}, "--top-p: expected above 0 and up to 1, got 1.5"),
        ("top-k", {"top_k": 0}, "--top-k: expected at least 1, got 0"),
        ("unbiased", {"min_new_tokens": 90}, "--min-new-tokens: expected 0 to 80"),
        ("unbiased", {"seed": -1}, "--seed: expected at least 0, got -1"),
        ("beam", {"num_samples": 2}, "--num-samples: expected 1 with --mode beam, got 2"),
    ],
)
def test_settings_out_of_range(mode, settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding.choose(mode, **settings)


def test_defaults_are_the_mode_s_alone():
    common = {"mode", "max_new_tokens", "min_new_tokens", "num_samples", "seed"}
    for mode in MODES:
        chosen = Decoding.choose(mode).to_json()
        settings = {name: chosen[name] for name in {*chosen} - common}
        assert settings == {k: v for k, v in MODES[mode].items() if v is not None}
    assert Decoding.choose("top-k").to_json()["top_k"] == 50
    assert Decoding.choose("sample").to_json() == {
        **Decoding.choose("temperature").to_json(),
        "mode": "sample",
    }


def test_the_command_offers_every_mode():
    from megatron_emo.evaluation.commands.generate import add_arguments

    parser = ArgumentParser()
    add_arguments(parser)
    (flag,) = (action for action in parser._actions if action.dest == "mode")
    assert flag.choices == list(MODES)


def test_a_batch_size_below_one_is_refused(produce):
    with pytest.raises(ValueError, match="--batch-size: expected at least 1, got 0"):
        produce(Decoding.choose("greedy"), batch_size=0)


# Prompts


def text_of(words: int) -> str:
    return " ".join(f"word{index}" for index in range(words))


def test_prompts_of_the_paper(tmp_path):
    long = " " + text_of(40).replace("word3 ", "word3\n\n") + "  " + text_of(100)
    texts = [
        text_of(109),
        " = = Heading = = ",
        "== " + text_of(200),
        text_of(110),
        long,
        "x " * 110,
    ]
    rows = make_prompts([*texts[:5], "a " * 49], Lengths.choose("wikitext"))
    assert [row["id"] for row in rows] == [3, 4]
    assert rows[0]["prompt"] == text_of(20) and rows[0]["reference"] == text_of(100)
    assert rows[1]["prompt"].startswith("word0 word1 word2 word3\n\nword4")
    assert len(rows[1]["prompt"].split()) == 20 and len(rows[1]["reference"].split()) == 100
    assert long.lstrip().startswith(rows[1]["reference"])
    path = tmp_path / "p.jsonl"
    write_prompts(path, rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_prompt_lengths():
    assert Lengths.choose("ptb") == Lengths(5, 25)
    assert Lengths.choose("ag_news", continuation=7) == Lengths(10, 7)
    assert Lengths.choose("writingprompts", 3) == Lengths(3, 80)
    assert DOMAINS["other"] == DOMAINS["wikitext"] == DOMAINS["webtext"] == (20, 80)
    assert len(make_prompts([text_of(50)] * 9, Lengths(3, 4), limit=2)) == 2
    with pytest.raises(ValueError, match="--prompt-words: expected at least 1, got 0"):
        Lengths.choose("ptb", 0)
    with pytest.raises(ValueError, match="--domain: expected one of wikitext"):
        Lengths.choose("wiki")
    with pytest.raises(ValueError, match="expected texts of 110 words .* found 0 among 2"):
        make_prompts(["", text_of(109)], Lengths(20, 80))
    with pytest.raises(ValueError, match="--limit: expected at least 1, got 0"):
        make_prompts([], Lengths(20, 80), limit=0)
