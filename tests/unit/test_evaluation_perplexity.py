"""Perplexity against single-token probabilities in float64 and against lm-eval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from icl_models import save_with_tokenizer

from megatron_emo.evaluation.models import (
    LanguageModel,
    Window,
    check_same_tokenizer,
    hash_files,
    load_model,
    logit_blocks,
)
from megatron_emo.evaluation.perplexity import (
    METRICS,
    Strides,
    Sums,
    compare_documents,
    cut_windows,
    open_documents,
    perplexity_records,
    score_documents,
    score_stream,
    sum_nats,
)

TEXTS = [
    "the film is so good and so bad it is about world. sports. good",
    "",
    "it",
    "naïve café 中文 \U0001f600",
    "Review: the film is so bad\n\nand so it is. " * 3,
]
STRIDES = Strides(16, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_with_tokenizer("llama-tied", tmp_path_factory.mktemp("m") / "llama", positions=128)


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    return load_model(folder, dtype="float64")


def nats_one_by_one(model: LanguageModel, ids, prefix, window: int, stride: int) -> list[float]:
    """-log q of each token, each by a forward pass of its own over what stands in its window."""
    sequence = ids if prefix is None else [prefix, *ids]
    last = len(sequence) - 1
    nats = []
    for position in range(1, len(sequence)):
        steps = max(0, math.ceil((position - window) / stride))
        begin = max(0, min(window + steps * stride, last) - window)
        with torch.no_grad():
            logits = model.model(torch.tensor([sequence[begin:position]])).logits[0, -1]
        weights = np.exp(logits.double().numpy() - logits.double().numpy().max())
        nats.append(-math.log(weights[sequence[position]] / weights.sum()))
    return nats


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 23])
@pytest.mark.parametrize("window, stride", [(8, 8), (8, 3), (8, 1), (1, 1)])
@pytest.mark.parametrize("prefix", [None, 99])
def test_each_token_is_scored_once_with_its_context(length, window, stride, prefix):
    ids = list(range(length))
    sequence = ids if prefix is None else [prefix, *ids]
    targets = []
    for number, part in enumerate(cut_windows(ids, prefix, Strides(window, stride))):
        assert len(part.tokens) <= window and len(part.targets) == len(part.tokens) - part.first
        begin = sequence.index(part.tokens[0])
        assert part.tokens == sequence[begin : begin + len(part.tokens)]
        assert part.targets == sequence[begin + part.first + 1 : begin + len(part.tokens) + 1]
        assert part.first >= (window - stride if number else 0)
        targets += part.targets
    assert targets == sequence[1:]


@pytest.mark.parametrize("window, stride, batch_tokens", [(8, 8, 64), (8, 3, 20), (16, 5, 3)])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_documents_equal_single_token_probabilities(
    model, window, stride, batch_tokens, with_prefix
):
    prefix = model.prefix_id if with_prefix else None
    sums = score_documents(
        model, TEXTS, Strides(window, stride), prefix_id=prefix, batch_tokens=batch_tokens
    )
    for index, text in enumerate(TEXTS):
        nats = nats_one_by_one(model, model.encode(text), prefix, window, stride)
        assert sums.nats[index] == pytest.approx(sum(nats), rel=1e-10, abs=1e-10)
        assert sums.tokens[index] == len(nats)
    assert sums.words.tolist() == [14, 0, 1, 4, 30]
    assert sums.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert sums.unscored == (0 if with_prefix else 4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3"])
def test_pieces_of_a_long_window_equal_one_pass(name, tmp_path):
    model = load_model(save_with_tokenizer(name, tmp_path), dtype="float64")
    windows = [
        Window(list(range(5, 45)), list(range(6, 46))),
        Window([7, 8, 9, 10], [9, 10, 11], 1),
        Window([3, 4, 5], [6], 2),
    ]
    whole = sum_nats(model, windows, batch_tokens=10_000)
    for batch_tokens in (1, 7, 39, 41):
        pieces = sum_nats(model, windows, batch_tokens=batch_tokens)
        np.testing.assert_allclose(pieces, whole, rtol=1e-10)


def test_blocks_are_bounded(model):
    windows = [Window([1] * 20, [1] * 20) for _ in range(30)]
    seen = {"rows": 0}
    forward = model.model.forward

    def watch(input_ids, **options):
        seen["rows"] = max(seen["rows"], input_ids.numel())
        return forward(input_ids=input_ids, **options)

    model.model.forward = watch
    try:
        blocks = list(logit_blocks(model, windows, batch_tokens=50))
    finally:
        del model.model.forward
    assert seen["rows"] == 40
    assert sum(len(block.window) for block in blocks) == 600


def test_lm_eval_agrees(folder, model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    instance = pytest.importorskip("lm_eval.api.instance")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    oracle = huggingface.HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, max_length=16, batch_size=1
    )
    texts = [text for text in TEXTS if text]
    requests = [instance.Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = [-value for value in oracle.loglikelihood_rolling(requests, disable_tqdm=True)]
    sums = score_documents(model, texts, Strides(16, 16), prefix_id=model.prefix_id)
    # lm-eval's log-softmax is fp32 whatever the model's type.
    np.testing.assert_allclose(sums.nats, expected, rtol=1e-6)


def test_fp32_is_near_fp64(folder, model):
    low = score_documents(load_model(folder), TEXTS, Strides(16, 8), prefix_id=0)
    high = score_documents(model, TEXTS, Strides(16, 8), prefix_id=0)
    np.testing.assert_allclose(low.nats, high.nats, rtol=1e-5)


def test_a_stream_is_one_document(model):
    strides = Strides(16, 5)
    stream = score_stream(model, TEXTS, strides, separator="\n", prefix_id=0)
    alone = score_documents(model, ["\n".join(TEXTS)], strides, prefix_id=0)
    assert len(stream.nats) > 5 and stream.part == "windows"
    for key in ("nats", "tokens", "words", "bytes"):
        assert getattr(stream, key).sum() == pytest.approx(getattr(alone, key).sum(), rel=1e-12)


def test_temperature_divides_logits(model):
    windows = [Window([1, 2, 3], [2, 3, 4])]
    with torch.no_grad():
        logits = model.model(torch.tensor([[1, 2, 3]])).logits[0].double() / 1.7
    expected = -logits.log_softmax(-1)[[0, 1, 2], [2, 3, 4]].sum()
    found = sum_nats(model, windows, temperature=1.7)
    assert found[0] == pytest.approx(float(expected), rel=1e-12)


# Records


def test_metrics_by_hand():
    sums = Sums(
        np.array([3.0, 5.0]), np.array([2.0, 2.0]), np.array([1.0, 3.0]), np.array([4.0, 12.0]), "d"
    )
    values = {record.metric: record for record in perplexity_records(sums, {})}
    assert values["cross_entropy"].value == 2.0
    assert values["token_perplexity"].value == pytest.approx(math.exp(2.0))
    assert values["word_perplexity"].value == pytest.approx(math.exp(2.0))
    assert values["byte_perplexity"].value == pytest.approx(math.exp(0.5))
    assert values["bits_per_byte"].value == pytest.approx(0.5 / math.log(2))
    assert [record.n for record in values.values()] == [4, 4, 4, 16, 16]
    # Of two documents resamples are (1,1), (1,2), (2,2): 1.5, 2 and 2.5 nats a token.
    assert (values["cross_entropy"].interval.low, values["cross_entropy"].interval.high) == (
        1.5,
        2.5,
    )
    assert values["token_perplexity"].interval.high == pytest.approx(math.exp(2.5))


def test_undefined_metrics_are_errors(model):
    blank = Sums(np.array([9.0]), np.array([3.0]), np.array([0.0]), np.array([4.0]), "documents")
    with pytest.raises(ValueError, match="word_perplexity: expected at least 1 of words, found 0"):
        perplexity_records(blank, {})
    records = perplexity_records(blank, {}, metrics=["bits_per_byte"])
    assert records[0].interval is None
    long = Sums(np.array([9e3]), np.array([3.0]), np.array([1.0]), np.array([4e3]), "documents")
    with pytest.raises(ValueError, match="word_perplexity: 9000 nats over 1 words are beyond"):
        perplexity_records(long, {}, metrics=["cross_entropy", "word_perplexity"])
    empty = score_documents(model, [""], Strides(8, 8), prefix_id=0)
    with pytest.raises(ValueError, match="cross_entropy: expected at least 1 of tokens"):
        perplexity_records(empty, {})
    with pytest.raises(ValueError, match="--metrics: expected some of cross_entropy"):
        perplexity_records(blank, {}, metrics=["ppl"])


# Documents in a file, and two of them


def write_documents(path, model, texts, strides=STRIDES, **options):
    rows = open_documents(path, {"made": "by a test"}, len(texts), **options)
    sums = score_documents(model, texts, strides, prefix_id=0, rows=rows)
    rows.finish()
    return sums


def test_resuming_scores_what_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_emo.evaluation.perplexity._GROUP", 2)
    path = tmp_path / "sums.jsonl"
    sums = write_documents(path, model, TEXTS)
    whole = path.read_bytes()
    assert json.loads(whole.splitlines()[0])["nats"] == sums.nats[0]
    path.write_bytes(whole[: whole.index(b'"id": 3') + 3])
    again = write_documents(path, model, TEXTS, resume=True)
    assert path.read_bytes() == whole and np.array_equal(again.nats, sums.nats)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"sums.jsonl", "sums.jsonl.recipe.json"}
    # The two first were not scored again.
    changed = json.loads(whole.splitlines()[1]) | {"nats": 5.0}
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + json.dumps(changed).encode() + b"\n" + lines[2])
    assert write_documents(path, model, TEXTS, resume=True).nats[1] == 5.0


def test_a_file_of_other_settings_is_not_gone_on_with(model, tmp_path):
    path = tmp_path / "sums.jsonl"
    write_documents(path, model, TEXTS[:2])
    with pytest.raises(FileExistsError, match="--resume goes on"):
        write_documents(path, model, TEXTS[:2])
    with pytest.raises(ValueError, match="sums.jsonl:1: has made 'by a test', expected 'oth"):
        open_documents(path, {"made": "otherwise"}, 2, resume=True)
    assert len(path.read_text().splitlines()) == 2


def test_compared_documents_by_hand(tmp_path):
    def write(name, nats, tokens):
        rows = [
            {"id": i, "nats": n, "tokens": t, "words": 1, "bytes": 10, "sha256": str(i)}
            for i, (n, t) in enumerate(zip(nats, tokens, strict=True))
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    a = write("a.jsonl", [4.0, 6.0, 2.0], [2, 2, 2])
    b = write("b.jsonl", [3.0, 3.0, 3.0], [2, 2, 2])
    values = {record.metric: record for record in compare_documents(a, b)}
    assert values["cross_entropy_difference"].value == pytest.approx(3 / 6)
    assert values["bits_per_byte_difference"].value == pytest.approx(3 / 30 / math.log(2))
    assert values["share_better_under_b"].value == pytest.approx(2 / 3)
    interval = values["cross_entropy_difference"].interval
    # The least and the greatest of the 27 resamples have a probability of 1/27 > 2.5% each.
    assert (interval.low, interval.high) == pytest.approx((-0.5, 1.5))
    other_tokens = write("c.jsonl", [3.0, 3.0, 3.0], [2, 2, 4])
    metrics = [record.metric for record in compare_documents(a, other_tokens)]
    assert metrics == ["bits_per_byte_difference", "share_better_under_b"]
    with pytest.raises(ValueError, match="got 3 in .*a.jsonl, 2 in .*d.jsonl, 2 alike"):
        compare_documents(a, write("d.jsonl", [1.0, 1.0], [2, 2]))


def test_a_paired_interval_is_narrower_than_the_two(model, tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["so", "good", "bad", "film"], size=n)) for n in range(3, 40)]
    first = write_documents(tmp_path / "a.jsonl", model, texts, Strides(16, 8))
    second = write_documents(tmp_path / "b.jsonl", model, texts, Strides(16, 16))
    difference = compare_documents(tmp_path / "a.jsonl", tmp_path / "b.jsonl")[1]
    assert difference.metric == "cross_entropy_difference"
    each = [perplexity_records(sums, {}, metrics=["cross_entropy"])[0] for sums in (first, second)]
    assert difference.value == pytest.approx(each[0].value - each[1].value, rel=1e-9)
    width = difference.interval.high - difference.interval.low
    assert width < each[0].interval.high - each[0].interval.low


# What is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((128, 200), "--window: expected 1 to 128"),
        ((128, 0), "--window: expected 1 to 128"),
        ((128, 64, 65), "--stride: expected 1 to 64"),
        ((128, 64, 0), "--stride: expected 1 to 64"),
    ],
)
def test_lengths_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Strides.choose(*arguments)


def test_default_lengths():
    assert Strides.choose(128) == Strides(128, 64)
    assert Strides.choose(8192) == Strides(1024, 512)
    assert Strides.choose(None, 4096) == Strides(4096, 2048)
    assert Strides.choose(1) == Strides(1, 1)


def test_folders_that_cannot_be_loaded(folder, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="--reference .*: expected a folder with config"):
        load_model(tmp_path, flag="--reference")
    with pytest.raises(ValueError, match="--dtype: expected one of float32"):
        load_model(folder, dtype="int8")
    with pytest.raises(ValueError, match="--device: expected a device of this machine, got abacus"):
        load_model(folder, device="abacus")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match="--model .*: transformers cannot load it"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"text 'a\\ud800': expected UTF-8"):
        model.encode("a\ud800")
    with pytest.raises(ValueError, match="--batch-tokens: expected at least 1, got 0"):
        next(logit_blocks(model, [], batch_tokens=0))


def test_missing_weights_are_an_error(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing: model.norm.weight"):
        load_model(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="--model .*: transformers cannot load it"):
        load_model(tmp_path)


def test_the_dtype_of_the_folder(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path, dtype="auto").model.dtype == torch.bfloat16
    assert load_model(tmp_path).model.dtype == torch.float32


def test_another_tokenizer_is_named(model, tmp_path):
    from transformers import AutoTokenizer

    folder = save_with_tokenizer("llama-tied", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    other = load_model(folder)
    with pytest.raises(
        ValueError, match="--reference other: expected the tokenizer of llama .*new"
    ):
        check_same_tokenizer(model, other, "--reference")


def test_files_of_one_name_keep_their_folders(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(name)
    (tmp_path / "b").write_text("b")
    files = [tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl", tmp_path / "b"]
    assert list(hash_files(files)) == ["x/a.jsonl", "y/a.jsonl", "b"]


def test_every_metric_has_a_definition():
    assert all(len(definition) > 20 for *_, definition in METRICS.values())
