"""A real pretrained model, SmolLM2-135M, through every step: import, EMO at TP=3, export, text.

Three ranks and not two: it has 9 heads. The truth is transformers on the folder that
`make smollm2` writes.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / ".venv" / "models" / "smollm2"
WIKITEXT = ROOT.parent / "shared" / "data" / "text" / "wikitext103" / "wiki.test.tokens"
LENGTH, BATCH, ITERATIONS = 48, 4, 5
RUN = f"""
    --tensor-model-parallel-size 3 --seq-length {LENGTH} --micro-batch-size 2
    --global-batch-size {BATCH} --lr 1e-5 --min-lr 1e-5 --clip-grad 1.0 --seed 7
    --eval-iters 0 --eval-interval 100 --log-interval 1 --tensorboard-log-interval 1
    --num-workers 0 --split 100,0,0 --use-checkpoint-args --attention-softmax-in-fp32
    --no-save-optim --no-save-rng
""".split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SMOLLM2 / "config.json").is_file(), reason=f"{SMOLLM2.name}: run `make smollm2`"
    ),
]


def call(tool: str, *argv: object) -> None:
    """A process of its own: a verification leaves CPU stand-ins behind."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / f"{tool}.py"), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[str, torch.Tensor]:
    """(prefix of a data set of one document, our README; its tokens as transformers has them)."""
    folder = tmp_path_factory.mktemp("corpus")
    call(
        *("preprocess_data", "--input", ROOT / "README.md", "--input-format", "text"),
        *("--text-documents", "file", "--output-prefix", folder / "readme", "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", SMOLLM2),
    )
    tokenizer = load_tokenizer(SMOLLM2)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return str(folder / "readme_text_document"), torch.tensor(tokens)


@pytest.fixture(scope="module")
def cost_table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("table") / "cost_embedding.safetensors"
    call("prepare_cost_embedding", "--from-hf", SMOLLM2, "--output", path)
    return path


def data_flags(prefix: str, cache: Path) -> list[str]:
    return ["--data-path", prefix, "--data-cache-path", str(cache)]


def first_batch(cache: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return [4, 49]: the sequences that the order in Megatron's cache puts first.

    One document is read through once at most, so a sequence begins at each multiple of 48.
    """
    (order,) = cache.rglob("*-train-shuffle_index.npy")
    starts = np.load(order)[:BATCH].astype(int) * LENGTH
    return torch.stack([tokens[start : start + LENGTH + 1] for start in starts])


@torch.no_grad()
def logits_and_targets(model, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [tokens, V] in float64 and targets [tokens]."""
    logits = model(sequences[:, :-1]).logits.double().flatten(0, 1)
    return logits, sequences[:, 1:].flatten()


def expected_cost(logits: torch.Tensor, targets: torch.Tensor, table: torch.Tensor) -> float:
    """Return sum_j q_j (1 - cos(e_j, e_t)), mean over tokens, in float64."""
    rows = torch.nn.functional.normalize(table.double(), dim=1)
    mean_rows = logits.softmax(-1) @ rows
    return (1 - (mean_rows * rows[targets]).sum(-1)).mean().item()


def greedy_text(folder: Path, prompt: str) -> str:
    tokenizer, model = load_tokenizer(folder), load(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def test_five_iterations_of_emo(run_pretraining, corpus, cost_table, tmp_path):
    """The first losses are transformers' and the table's; what was trained speaks English."""
    prefix, tokens = corpus
    call("convert_checkpoint", "import", "--hf", SMOLLM2, "--output", tmp_path / "mg")
    logged = run_pretraining(
        3,
        *("--pretrained-checkpoint", str(tmp_path / "mg"), "--train-iters", str(ITERATIONS)),
        *("--save", str(tmp_path / "run"), "--save-interval", str(ITERATIONS)),
        base=[*RUN, *data_flags(prefix, tmp_path)],
        cost=str(cost_table),
    )
    model, sequences = load(SMOLLM2), first_batch(tmp_path, tokens)
    logits, targets = logits_and_targets(model, sequences)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert logged["lm loss"][1] == pytest.approx(expected, abs=1e-4)
    cost = expected_cost(logits, targets, model.lm_head.weight.detach())
    assert logged["emo loss"][1] == pytest.approx(cost, abs=1e-4)
    assert sorted(logged["objective"]) == [1, 2, 3, 4, 5]
    assert all(map(math.isfinite, logged["objective"].values()))

    call("convert_checkpoint", "export", "--megatron", tmp_path / "run", "--output", tmp_path / "o")
    before, after = (load_file(x / "model.safetensors") for x in (SMOLLM2, tmp_path / "o"))
    assert before.keys() == after.keys()
    change = {key: (after[key] - before[key]).abs().max().item() for key in before}
    # Adam moves a weight by the learning rate at most, and by nearly that at the first step.
    assert all(5e-6 < value < 1e-5 * ITERATIONS * 1.5 for value in change.values()), change
    text = greedy_text(tmp_path / "o", "The capital of France is")
    assert text.startswith(" Paris"), text
    print(f"lm loss {logged['lm loss']}, {expected=}, emo loss {logged['emo loss']}, {cost=}")
    print(f"largest change {max(change.values()):.2e}; {text=}")


def test_a_padded_vocabulary(run_pretraining, corpus, tmp_path):
    """Two layers; 60,000 rows for 49,152 tokens. Each further row is the mean one and counts."""
    prefix, tokens = corpus
    model = load(SMOLLM2)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    model.config.layer_types = None
    model.save_pretrained(tmp_path / "hf")
    pad = ("--make-vocab-size-divisible-by", 5000, "--tensor-model-parallel-size", 3)
    call("convert_checkpoint", "import", "--hf", tmp_path / "hf", "--output", tmp_path / "mg", *pad)
    logged = run_pretraining(
        3,
        *("--pretrained-checkpoint", str(tmp_path / "mg"), "--train-iters", "1"),
        *("--lr", "0", "--min-lr", "0", "--save", str(tmp_path / "run"), "--save-interval", "1"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(SMOLLM2)),
        base=[*RUN, *data_flags(prefix, tmp_path)],
        objective="mle",
        cost=None,
    )
    logits, targets = logits_and_targets(model, first_batch(tmp_path, tokens))
    padding = logits.mean(-1, keepdim=True).expand(-1, 60000 - 49152)
    expected = torch.nn.functional.cross_entropy(torch.cat([logits, padding], 1), targets).item()
    assert logged["lm loss"][1] == pytest.approx(expected, abs=1e-4)

    call("convert_checkpoint", "export", "--megatron", tmp_path / "run", "--output", tmp_path / "o")
    before, after = (load_file(tmp_path / end / "model.safetensors") for end in ("hf", "o"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    print(f"lm loss {logged['lm loss']}, {expected=}")


@torch.no_grad()
def test_perplexity_on_wikitext():
    """The unpacked folder is the model that was pretrained: 30.3 in contexts of 512 tokens."""
    if not WIKITEXT.is_file():
        pytest.skip("WikiText-103's test set is absent")
    tokenizer, model = load_tokenizer(SMOLLM2), load(SMOLLM2)
    with open(WIKITEXT, encoding="utf-8") as stream:
        ids = torch.tensor(tokenizer(stream.read(60_000))["input_ids"][:4096])
    losses = [model(part[None], labels=part[None]).loss.item() for part in ids.split(512)]
    assert math.exp(np.mean(losses)) == pytest.approx(30.35, abs=0.1)
    assert greedy_text(SMOLLM2, "The capital of France is").startswith(" Paris")
