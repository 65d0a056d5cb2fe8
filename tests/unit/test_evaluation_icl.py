"""Few-shot classification: readers against the real files, scores against one forward each."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from icl_models import save_with_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_emo.evaluation.icl import (
    Answer,
    IclSettings,
    build_prompt,
    classify,
    fit_prompts,
    macro_f1,
    open_answers,
    read_answers,
    summarize,
)
from megatron_emo.evaluation.icl_data import Example, TaskData, read_task_data, take_questions
from megatron_emo.evaluation.icl_scoring import PromptScorer, tokenize
from megatron_emo.evaluation.icl_tasks import (
    TaskError,
    built_in_names,
    find_data_dir,
    load_task,
    parse_task,
)
from megatron_emo.evaluation.lm_eval_tasks import to_jinja, write_lm_eval
from megatron_emo.evaluation.retrieval import choose_shots, encoder_of

CLS = Path(__file__).resolve().parents[3] / "shared" / "data" / "cls"
needs_data = pytest.mark.skipif(not CLS.is_dir(), reason="the data sets are not at ../shared/data")

FIELDS = {
    "name": "mine",
    "format": "jsonl",
    "files": {"train": "train.jsonl", "test": "test.jsonl"},
    "labels": {"0": "bad", "1": "very good"},
    "template": 'Review: "{text}" It is {label}.',
}


def example(text: str, label: int = 0, words=("bad", "very good"), **columns: str) -> Example:
    return Example({"text": text, "group": "", **columns}, label, words)


def some_data(num_train: int = 6, num_test: int = 5) -> TaskData:
    kinds = ("good film so good", "bad it is bad", "sports of the world", "so so")
    texts = [f"{kinds[i % 4]} {i * 37 % 11}" for i in range(num_train + num_test)]
    rows = [example(text, i % 2) for i, text in enumerate(texts)]
    return TaskData(rows[:num_train], rows[num_train:], {"a": "0"}, "train and test")


# --- what the files hold


@needs_data
@pytest.mark.parametrize(
    ("name", "num_train", "num_test"),
    [
        ("sst2", 6920, 1821),
        ("trec", 5452, 500),
        ("mr", 8530, 2132),
        ("ag_news", 2280, 5320),
        ("tweet_emotion", 3257, 1421),
        ("mmlu", 285, 14042),
        ("mmlu_text", 285, 14042),
    ],
)
def test_the_real_files_have_the_published_rows(name, num_train, num_test):
    data = read_task_data(load_task(name), CLS)
    assert (len(data.train), len(data.test)) == (num_train, num_test)
    assert all(row.text == row.text.strip() and row.text for row in data.test)


@needs_data
def test_trec_read_by_name_agrees_with_the_files_of_numbers():
    """In TREC.*.all 0 is DESC, 1 ENTY, 2 ABBR, 3 HUM, 4 LOC, 5 NUM."""
    by_number = ["description and abstract concept", "entity", "abbreviation"]
    by_number += ["human being", "location", "numeric value"]
    data = read_task_data(load_task("trec"), CLS)
    for rows, split in ((data.train, "train"), (data.test, "test")):
        numbers = (CLS / f"trec/TREC.{split}.all").read_bytes().split(b"\n")[:-1]
        assert [row.words[row.label] for row in rows] == [by_number[int(n[:1])] for n in numbers]


@needs_data
def test_sst2_and_mr_know_what_is_positive():
    sst2 = read_task_data(load_task("sst2"), CLS)
    first = sst2.train[0]
    assert first.text.startswith("a stirring , funny and finally transporting")
    assert first.words[first.label] == "positive"
    mr = read_task_data(load_task("mr"), CLS)
    rows = mr.train + mr.test
    assert Counter(row.words[row.label] for row in rows) == {"positive": 5331, "negative": 5331}
    bad = next(row for row in rows if row.text == "simplistic , silly and tedious .")
    assert bad.words[bad.label] == "negative"
    assert any("\x85" in row.text for row in rows)


@needs_data
def test_ag_news_is_cut_without_overlap_and_the_same_each_time():
    task = load_task("ag_news")
    data, again = read_task_data(task, CLS), read_task_data(task, CLS)
    assert data == again
    with open(CLS / "ag_news/test.csv", encoding="utf-8", newline="") as file:
        rows = [
            (f"{title} {text}".strip(), int(label) - 1) for label, title, text in csv.reader(file)
        ]
    assert Counter((row.text, row.label) for row in data.train + data.test) == Counter(rows)
    assert read_task_data(replace(task, split_seed=1), CLS).test != data.test


@needs_data
def test_mmlu_has_57_subjects_with_five_shots_and_answers_as_letters():
    data = read_task_data(load_task("mmlu"), CLS)
    assert Counter(Counter(row.group for row in data.train).values()) == {5: 57}
    row = next(row for row in data.test if row.group == "anatomy")
    prompt = row.render(load_task("mmlu"), row.label)
    assert prompt.startswith("A lesion causing compression of the facial nerve")
    assert "\nA. paralysis of the facial muscles.\nB. paralysis of the facial muscles and" in prompt
    assert prompt.endswith("\nAnswer: A")
    by_text = load_task("mmlu_text")
    row = next(r for r in read_task_data(by_text, CLS).test if r.group == "anatomy")
    assert row.render(by_text, 1).endswith(
        "Answer: paralysis of the facial muscles and loss of taste."
    )


@pytest.mark.parametrize(
    ("name", "prompts"),
    {
        "sst2": ['Review: "X" It is positive.', 'Review: "X" It is negative.'],
        "cr": ["Review: X It is positive.", "Review: X It is negative."],
        "mr": ["Review: X It is positive", "Review: X It is negative"],
        "subj": ["X It is objective.", "X It is subjective."],
        "tweet_emotion": [f"X It is {w}." for w in ("anger", "joy", "optimism", "sadness")],
        "ag_news": [
            *('"X" It is about world.', '"X" It is about sports.', '"X" It is about business.'),
            '"X" It is about science and technology.',
        ],
        "trec": [
            *('"X" It is about abbreviation.', '"X" It is about entity.'),
            '"X" It is about description and abstract concept.',
            *('"X" It is about human being.', '"X" It is about location.'),
            '"X" It is about numeric value.',
        ],
    }.items(),
)
def test_templates_are_the_papers(name, prompts):
    task = load_task(name)
    question = example("X", words=task.words)
    assert [question.render(task, label) for label in range(len(task.words))] == prompts
    assert (task.shots, task.retriever, task.separator) == (8, "topk", "\n")


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_seventh_task_is_a_small_file(tmp_path):
    rows = [{"title": "T", "body": f"b{i} é", "stars": i % 2, "id": i} for i in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows[:3])
    write_jsonl(tmp_path / "test.jsonl", rows[3:])
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nformat: jsonl\nfiles: {train: train.jsonl, test: test.jsonl}\n"
        "columns: {text: [title, body], label: stars}\nlabels: {0: bad, 1: good}\n"
        "template: '{id}. {text}: {{{label}}}'\n"
    )
    name = str(tmp_path / "mine.yaml")
    task = load_task(name)
    data = read_task_data(task, find_data_dir(name, None))
    question = data.test[0]
    assert question.render(task, question.label) == "3. T b3 é: {good}"
    assert question.render_question(task) == "3. T b3 é: {"
    assert [row.label for row in data.train] == [0, 1, 0]


def test_csv_by_position_with_letters_and_two_parallel_files(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b'B\t"two\nlines"\r\nA\tone\r\n')
    task = parse_task(
        FIELDS
        | {"format": "csv", "header": False, "delimiter": "\t", "files": {"test": "t.tsv"}}
        | {"columns": {"label": 0, "text": 1}, "labels": {"A": "bad", "B": "good"}}
    )
    rows = read_task_data(task, tmp_path).test
    assert [(row.text, row.label) for row in rows] == [("two\nlines", 1), ("one", 0)]
    (tmp_path / "x").write_bytes(b"caf\xe9 \x85 one\n\ntwo\n")
    (tmp_path / "y").write_bytes(b"1\n0\n1\n")
    pair = {"format": "parallel", "files": {"test": {"text": "x", "label": "y"}}}
    rows = read_task_data(parse_task(FIELDS | pair | {"encoding": "latin-1"}), tmp_path).test
    assert [(row.text, row.label) for row in rows] == [("café \x85 one", 1), ("", 0), ("two", 1)]


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "It is {label}."}, r"template: expected \{text\} once, found 0"),
        ({"template": "{text} it is"}, r"template: expected \{label\} once, found 0"),
        ({"template": "{label}: {text}"}, r"words or \{text\} before \{label\}"),
        ({"template": "{text} {label!r}"}, "names of columns alone"),
        ({"template": "{text.x} {label}"}, "names of columns alone"),
        ({"template": "{text} {label"}, "a brace itself is written twice"),
        ({"labels": {}}, "labels, choices: expected one of the two"),
        ({"choices": ["a", "b"]}, "labels, choices: expected one of the two"),
        ({"labels": {"0": "bad", "1": "bad"}}, "at least two different answers"),
        ({"format": "xml"}, "format: expected one of label-text"),
        ({"files": {"train": "a"}}, "files: expected train and test, test, or all"),
        ({"files": {"all": "a"}}, "train_share: expected between 0 and 1"),
        ({"train_share": 0.5}, "train_share: expected between 0 and 1"),
        ({"format": "parallel"}, "expected a map of text and label"),
        ({"shots": -1}, "shots: expected at least 0, got -1"),
        ({"shots": "4"}, "shots: expected a whole number, got '4'"),
        ({"columns": {"text": "a"}}, r"columns: expected text and label, \['label'\] not given"),
        ({"tempalte": "a"}, "unknown tempalte; known: name, template"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_by_field(changes, message):
    with pytest.raises(TaskError, match=message):
        parse_task(FIELDS | changes)


def test_a_field_that_is_missing_and_a_name_that_is_unknown(tmp_path, monkeypatch):
    with pytest.raises(TaskError, match="missing template, labels|missing template"):
        parse_task({key: value for key, value in FIELDS.items() if key != "template"})
    with pytest.raises(TaskError, match=r"--task: expected a \.yaml file or one of ag_news, cr"):
        load_task("sst3")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(TaskError, match=r"bad\.yaml: while parsing"):
        load_task(str(tmp_path / "bad.yaml"))
    monkeypatch.delenv("MEGATRON_EMO_EVAL_DATA", raising=False)
    with pytest.raises(TaskError, match="--data: expected the folder of the data of sst2"):
        find_data_dir("sst2", None)
    monkeypatch.setenv("MEGATRON_EMO_EVAL_DATA", str(tmp_path))
    assert find_data_dir("sst2", None) == tmp_path
    with pytest.raises(FileNotFoundError, match="--data: .*nowhere: no such folder"):
        find_data_dir("sst2", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("fields", "content", "message"),
    [
        ({}, b'{"text": "a", "label": 2}\n', r"t:1: label: expected one of 0, 1, got '2'"),
        ({}, b'{"text": "a"}\n', r"t:1: columns: expected \['label'\] among \['text'\]"),
        ({}, b"\n{\n", "t:2: expected JSON"),
        ({}, b"[1]\n", "t:1: expected an object, got list"),
        ({}, b"\n", "mine: test: expected questions, found none in t"),
        ({}, b"\xff\n", "t: encoding: expected utf-8"),
        ({"encoding": "latin-0"}, b"a", "t: encoding: expected latin-0: unknown encoding"),
        ({"format": "csv"}, b"text,label\na,1,2\n", "t:2: expected 2 columns, got 3"),
        ({"format": "label-text"}, b"1 a\n\n7 b\n", "t:3: label: expected one of 0, 1, got '7'"),
        ({"template": "{text} {n} {label}"}, b'{"text": "a", "label": 1}\n', "template: 'n' is no"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, fields, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_task_data(parse_task(FIELDS | {"files": {"test": "t"}} | fields), tmp_path)


def test_files_that_are_missing_or_differ_in_length(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl: no such file; --data is"):
        read_task_data(parse_task(FIELDS), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\*\.x: no such file"):
        read_task_data(parse_task(FIELDS | {"files": {"test": "*.x"}}), tmp_path)
    (tmp_path / "x").write_text("a\nb\n")
    (tmp_path / "y").write_text("1\n")
    pair = {"format": "parallel", "files": {"test": {"text": "x", "label": "y"}}}
    with pytest.raises(ValueError, match="y: expected a line for each of the 2 of x, got 1"):
        read_task_data(parse_task(FIELDS | pair), tmp_path)
    few = {"format": "label-text", "files": {"all": "z"}, "train_share": 0.1}
    (tmp_path / "z").write_text("1 a\n0 b\n")
    with pytest.raises(ValueError, match=r"train_share 0\.1: 2 rows are too few to cut"):
        read_task_data(parse_task(FIELDS | few), tmp_path)


# --- shots


def test_topk_is_the_nearest_by_tf_idf_worked_out_by_hand():
    train = [example(t) for t in ("a b b c", "c d", "a a d e", "c d")]
    words = sorted({word for row in train for word in row.text.split()})
    counts = {word: sum(word in row.text.split() for row in train) for word in words}
    idf = np.array([math.log((1 + len(train)) / (1 + counts[word])) + 1 for word in words])

    def unit(text: str) -> np.ndarray:
        row = np.array([text.split().count(word) for word in words]) * idf
        return row / (np.linalg.norm(row) or 1)

    questions = [example(t) for t in ("a e", "c", "d zzz", "b c c d", "zzz")]
    for question, found in zip(questions, choose_shots(questions, train, 3), strict=True):
        cosines = [unit(question.text) @ unit(row.text) for row in train]
        assert found == sorted(range(4), key=lambda i: (-cosines[i].round(12), i))[:3]


def test_random_first_and_none():
    train = [example(str(i), group=f"g{i % 2}") for i in range(8)]
    questions = [example("q", group="g1") for _ in range(20)]
    first = choose_shots(questions, train, 3, "first", within_group=True)
    assert first == [[1, 3, 5]] * 20
    drawn = choose_shots(questions, train, 4, "random", seed=3)
    assert drawn == choose_shots(questions, train, 4, "random", seed=3)
    assert drawn != choose_shots(questions, train, 4, "random", seed=4)
    assert all(len(set(shots)) == 4 for shots in drawn) and len(set(map(tuple, drawn))) > 10
    own = choose_shots(questions, train, 4, "random", within_group=True)
    assert {shot for shots in own for shot in shots} == {1, 3, 5, 7}
    near = choose_shots([example("3 5 4", group="g1")], train, 2, within_group=True)
    assert near == [[3, 5]]
    assert choose_shots(questions, [], 0) == [[]] * 20
    assert choose_shots(questions, train, 3, "none") == [[]] * 20


def test_too_few_training_examples_are_named():
    train = [example("a", group="g0"), example("b", group="g1")]
    with pytest.raises(
        ValueError, match="--shots: expected at most 2, the training examples, got 3"
    ):
        choose_shots([example("a")], train, 3)
    with pytest.raises(ValueError, match="at most 1, the training examples of g1, got 2"):
        choose_shots([example("a", group="g1")], train, 2, "first", within_group=True)
    with pytest.raises(ValueError, match="--retriever: expected one of topk"):
        choose_shots([example("a")], train, 1, "bm25")
    with pytest.raises(ValueError, match="no word in 2 training texts"):
        choose_shots([example("a")], [example("!"), example("")], 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_encoder_averages_the_last_hidden_states(tmp_path, name):
    folder = str(save_with_tokenizer(name, tmp_path / "m"))
    texts = ["the film", "", "so good and so bad é", "a"]
    features = encoder_of(folder, "cpu", batch_size=2)(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    for text, feature in zip(texts, features, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = torch.zeros(64, dtype=torch.float64)
        if ids:
            with torch.no_grad():
                expected = model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(feature, expected, atol=2e-5)


# --- prompts


def test_prompts_are_laid_out_as_openicl_does():
    task = parse_task(FIELDS)
    shots = [example("near", 1), example("far", 0)]
    bare, answered = build_prompt(task, example("why"), shots)
    head = 'Review: "near" It is very good.\nReview: "far" It is bad.\n'
    assert bare == head + 'Review: "why" It is'
    assert answered == [head + f'Review: "why" It is {word}.' for word in ("bad", "very good")]
    mmlu = load_task("mmlu")
    columns = {f"choice{i}": "wxyz"[i] for i in range(4)} | {"group": "high school physics"}
    question = example("Q?", 2, mmlu.words, **columns)
    bare, answered = build_prompt(mmlu, question, [question])
    asked = "Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    head = "The following are multiple choice questions (with answers) about high school physics."
    assert bare == f"{head}\n\n{asked} C\n\n{asked}"
    assert answered[3] == f"{bare} D"


class MergingTokenizer:
    """Letters are tokens, but "ab" is one."""

    def __call__(self, text: str) -> dict:
        return {"input_ids": [ord(c) for c in text.replace("ab", "z")]}


def test_an_answer_that_merges_with_the_question_begins_with_the_merged_token():
    prompt = tokenize(MergingTokenizer(), "xa", "xab")
    assert (prompt.ids, prompt.answer_start) == ([ord("x"), ord("z")], 1)
    assert tokenize(MergingTokenizer(), "x", "xab").answer_start == 1


def test_answers_that_the_tokenizer_does_not_know_are_refused():
    class Deaf:
        def __call__(self, text: str) -> dict:
            return {"input_ids": [ord(c) for c in text if c.isascii()]}

    task = parse_task(FIELDS | {"template": "{text} {label}", "labels": {"0": "é", "1": "à"}})
    with pytest.raises(ValueError, match="labels: the tokenizer has no token for the end of 'q é'"):
        tokenize(Deaf(), "q ", "q é")
    with pytest.raises(
        ValueError, match=r"labels: the tokenizer tells not all apart of \('é', 'à'\)"
    ):
        fit_prompts(task, example("q", 0, task.words), [], Deaf(), IclSettings())


@pytest.mark.parametrize("order", ["nearest-first", "nearest-last"])
def test_the_farthest_shots_go_first_then_the_beginning(order):
    task = parse_task(FIELDS | {"template": "{text}={label}", "labels": {"0": "A", "1": "BB"}})
    shots = [example(c * 4, 0, task.words) for c in "nmf"]
    question = example("q" * 4, 0, task.words)
    settings = IclSettings(order=order, max_length=7 + 2 * 7 + 6)
    prompts, num_kept, cut = fit_prompts(task, question, shots, MergingTokenizer(), settings)
    assert (num_kept, cut) == (2, 0)
    placed = "nnnn=A\nmmmm=A\n" if order == "nearest-first" else "mmmm=A\nnnnn=A\n"
    assert "".join(map(chr, prompts[1].ids)) == placed + "qqqq=BB"
    assert prompts[1].answer_start == len(placed) + 5
    prompts, num_kept, cut = fit_prompts(
        task, question, shots, MergingTokenizer(), replace(settings, max_length=4)
    )
    assert (num_kept, cut) == (0, 3)
    assert ["".join(map(chr, prompt.ids)) for prompt in prompts] == ["q=A", "q=BB"]
    with pytest.raises(ValueError, match="--max-length: 2 tokens leave no room before an answer"):
        fit_prompts(task, question, [], MergingTokenizer(), replace(settings, max_length=2))


# --- scores


def brute_force(model, tokenizer, bare: str, answered: list[str]):
    """(nats per token, log p of the answer, the same per token) by one forward for each answer."""
    found = []
    for text in answered:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [float(-log_probs[i - 1, ids[i]]) for i in range(1, len(ids))]
        size = len(ids) - len(tokenizer(bare)["input_ids"])
        found.append((sum(each) / len(ids), -sum(each[-size:]), -sum(each[-size:]) / size))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt", "mistral"])
def loaded(request, tmp_path_factory):
    """Models in float64; mistral with windows of 8 tokens, whose cache cannot be cut."""
    changes = {"sliding_window": 8} if request.param == "mistral" else {}
    folder = tmp_path_factory.mktemp(request.param)
    save_with_tokenizer(request.param, folder, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("retriever", ["topk", "first"])
def test_scores_equal_one_forward_for_each_answer(loaded, retriever):
    name, model, tokenizer = loaded
    task, data = parse_task(FIELDS), some_data()
    scorer = PromptScorer(model)
    settings = IclSettings(shots=2, retriever=retriever, max_length=256)
    answers = classify(task, data, scorer, tokenizer, settings)
    assert len({tuple(answer.shots) for answer in answers}) == (1 if retriever == "first" else 4)
    for answer in answers:
        shots = [data.train[shot] for shot in answer.shots]
        prompt = build_prompt(task, data.test[answer.question], shots)
        expected = brute_force(model, tokenizer, *prompt)
        found = (answer.ppl, answer.label, answer.label_mean)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert answer.predict("ppl") == np.argmin(expected[0])
        assert answer.predict("label") == np.argmax(expected[1])
        assert answer.predict("label-mean") == np.argmax(expected[2])
    assert scorer.can_reuse == (name != "mistral")


def test_what_questions_share_is_run_once(loaded):
    name, model, tokenizer = loaded
    if name == "mistral":
        pytest.skip("its cache cannot be cut")
    widths = []
    forward = model.forward

    def count(input_ids, **kwargs):
        widths.append(tuple(input_ids.shape))
        return forward(input_ids, **kwargs)

    model.forward = count
    try:
        settings = IclSettings(shots=4, retriever="first", max_length=256)
        classify(parse_task(FIELDS), some_data(), PromptScorer(model), tokenizer, settings)
    finally:
        del model.forward
    starts = [width for rows, width in widths if rows == 1]
    assert len(starts) == 5 and max(starts[1:]) < starts[0] / 2
    assert all(rows == 2 for rows, _ in widths[1::2])


def test_long_prompts_are_run_in_pieces(loaded, monkeypatch):
    name, model, tokenizer = loaded
    monkeypatch.setattr("megatron_emo.evaluation.icl_scoring._CHUNK", 7)
    settings = IclSettings(shots=2, max_length=256)
    task, data = parse_task(FIELDS), some_data()
    pieces = classify(task, data, PromptScorer(model), tokenizer, settings)
    whole = classify(task, data, PromptScorer(model, reuse=False), tokenizer, settings)
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(a.ppl + a.label, b.ppl + b.label, rtol=1e-10)


def test_a_model_that_gives_nan_is_not_scored(tmp_path):
    folder = save_with_tokenizer("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5] = float("nan")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="finite log-probabilities"):
        classify(parse_task(FIELDS), some_data(), PromptScorer(model), tokenizer, IclSettings(2))


# --- what it adds up to


def answers_of(gold, best) -> list[Answer]:
    rows = []
    for i, (g, b) in enumerate(zip(gold, best, strict=True)):
        good = [float(j == b) for j in range(2)]
        rows.append(Answer(i, g, [-x for x in good], good, good, [], 1, 0, 0.5))
    return rows


def test_records_say_accuracy_interval_and_baselines():
    gold, best = [0, 1, 0, 0, 1], [0, 1, 1, 0, 0]
    data = TaskData([], [example("t", g) for g in gold], {"a": "0"}, "test")
    common = {"settings": {"shots": 1}, "seed": 0, "labels": {"task": "mine"}, "model": "m"}
    records = summarize(parse_task(FIELDS), data, answers_of(gold, best), ["ppl", "label"], common)
    by_name = {(r.metric, r.labels.get("scoring")): r for r in records}
    accuracy = by_name["accuracy", "ppl"]
    assert (accuracy.value, accuracy.n, accuracy.interval.method) == (0.6, 5, "wilson")
    assert accuracy.settings["gold_counts"] == {"bad": 3, "very good": 2}
    assert accuracy.settings["num_shots_dropped"] == 5
    assert accuracy.seconds == 2.5
    assert by_name["accuracy_majority", None].value == 0.6
    assert by_name["accuracy_random", None].value == 0.5
    assert by_name["macro_f1", "label"].value == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert "OpenICL" in accuracy.definition


def test_groups_have_their_mean():
    gold, best = [0, 0, 0, 0], [0, 0, 0, 1]
    groups = ["a", "a", "a", "b"]
    data = TaskData([], [example("t", 0, group=g) for g in groups], {}, "test")
    common = {"settings": {}, "seed": 0, "labels": {}}
    records = summarize(parse_task(FIELDS), data, answers_of(gold, best), ["label"], common)
    assert {r.metric: r.value for r in records}["accuracy_group_mean"] == 0.5
    assert {r.metric: r.value for r in records}["accuracy"] == 0.75


def test_macro_f1_equals_scikit_learns():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        gold, predicted = rng.integers(0, 4, 9).tolist(), rng.integers(0, 5, 9).tolist()
        expected = f1_score(gold, predicted, average="macro", zero_division=0)
        assert macro_f1(gold, predicted) == pytest.approx(expected, abs=1e-12)


def test_a_limit_draws_by_the_seed():
    data = some_data(num_test=50)
    few = take_questions(data, 7, seed=1)
    assert few == sorted(set(few)) and len(few) == 7
    assert few == take_questions(data, 7, seed=1) != take_questions(data, 7, seed=2)
    assert take_questions(data, 50, 1) == take_questions(data, None, 1) == list(range(50))
    with pytest.raises(ValueError, match="--limit: expected at least 1, got 0"):
        take_questions(data, 0, 1)


def test_a_run_that_was_cut_off_goes_on(loaded, tmp_path):
    name, model, tokenizer = loaded
    path, about = tmp_path / "p" / "x.jsonl", {"task": "mine", "shots": 2}
    task, data, settings = parse_task(FIELDS), some_data(), IclSettings(shots=2, max_length=256)

    def ask(about, **how):
        file = open_answers(path, about, 5, **how)
        scorer = PromptScorer(model)
        answers = classify(task, data, scorer, tokenizer, settings, predictions=file)
        file.finish()
        return answers

    whole = ask(about)
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert len({row.pop("settings") for row in rows}) == 1
    assert rows == [asdict(answer) for answer in whole] and len(rows) == 5
    assert read_answers(path) == whole
    part = path.with_name("x.jsonl.part")
    path.rename(part)
    part.write_text("".join(lines[:2]) + lines[2][:20])
    again = ask(about, resume=True)
    assert again[:2] == whole[:2]
    for a, b in zip(again, whole, strict=True):
        np.testing.assert_allclose(a.ppl, b.ppl, rtol=1e-10)
    assert len(path.read_text().splitlines()) == 5 and not part.exists()
    with pytest.raises(FileExistsError, match=r"--predictions .*x\.jsonl: exists; --resume goes"):
        ask(about)
    with pytest.raises(ValueError, match=r"--predictions .*x\.jsonl:1: has shots 2, expected 3; "):
        ask(about | {"shots": 3}, resume=True)
    path.write_text("hello\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected JSON"):
        ask(about, resume=True)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"--predictions .*x\.jsonl:1: expected gold, found none"):
        read_answers(path)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="--order: expected one of nearest-first"):
        IclSettings(order="far")
    with pytest.raises(ValueError, match="--max-length: expected at least 2 tokens, got 1"):
        IclSettings(max_length=1)


# --- for lm-eval


def test_templates_become_jinja():
    import jinja2

    for template in ("{text} is", "{{{text}}} {{{{", "a {{% b %}} {text} {{# {{{{text}}}}"):
        rendered = jinja2.Template(to_jinja(template)).render(text="T")
        assert rendered == template.format(text="T")


@needs_data
def test_mmlu_becomes_a_task_for_each_subject(tmp_path):
    import yaml

    task = load_task("mmlu")
    data = read_task_data(task, CLS)
    settings = IclSettings(shots=5, retriever="first", limit=300)
    first, *subjects = write_lm_eval(task, data, settings, tmp_path)
    group = yaml.safe_load(first.read_text())
    assert group["group"] == "megatron_emo_mmlu"
    assert group["task"] == [path.stem for path in subjects]
    content = yaml.safe_load((tmp_path / "megatron_emo_mmlu_virology.yaml").read_text())
    assert content["description"].endswith("about virology.\n\n")
    assert content["fewshot_config"] == {"sampler": "first_n"}
    assert content["num_fewshot"] == 5
    rows = (tmp_path / "megatron_emo_mmlu_virology_train.jsonl").read_text().split("\n")[:-1]
    assert len(rows) == 5
    total = sum(len(path.read_text().split("\n")) - 1 for path in tmp_path.glob("*_test.jsonl"))
    assert total == 300


def test_built_in_tasks_are_all_readable():
    assert len(built_in_names()) == 9
    for name in built_in_names():
        assert load_task(name).name == name and load_task(name).source
