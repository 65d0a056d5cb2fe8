"""What others do with an exported folder: transformers' generate, lm-eval, vLLM's loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hf_models import CONFIGS, POSITIONS, VOCAB_SIZE, save_model
from safetensors.torch import load_file

from megatron_emo.conversion.export_hf import ExportOptions, export_hf
from megatron_emo.conversion.import_hf import import_hf

WORDS = [f"w{index}" for index in range(VOCAB_SIZE - 2)]
ITEMS = [
    {"question": "w3 w14 w15 w9", "choices": ["w2", "w6 w5"], "answer": 0},
    {"question": "w27 w18 w28", "choices": ["w18", "w4 w5 w90"], "answer": 1},
    {"question": "w1 w61 w80 w33 w98", "choices": ["w87", "w49"], "answer": 1},
    {"question": "w1 w41 w42", "choices": ["w13", "w56 w2"], "answer": 0},
]
VLLM_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
}
"""By model_type, as vllm/model_executor/models/registry.py lists them."""


def save_tokenizer(folder: Path) -> None:
    """A word for each id, the last two special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate([*WORDS, "<s>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="<s>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


def export(name: str, folder: Path, dtype: torch.dtype | None = None, **changes) -> tuple:
    """Return the folder exported from a model of CONFIGS[name], in two shards or more, and the
    model."""
    changes = {"bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1, **changes}
    model = save_model(name, folder / "hf", **changes)
    save_tokenizer(folder / "hf")
    import_hf(folder / "hf", folder / "megatron", say=lambda line: None)
    options = ExportOptions(dtype=dtype, max_shard_size="100KB")
    export_hf(folder / "megatron", folder / "out", options, say=lambda line: None)
    return folder / "out", model


def test_transformers_generates_what_the_model_did(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rope = {"rope_type": "default", "rope_theta": 50.0}
    folder, model = export("llama-tied", tmp_path, rope_parameters=rope)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    inputs = tokenizer("w5 w77 w120", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[5, 77, 120]]
    settings = {"max_new_tokens": 20, "do_sample": False}
    ids = exported.generate(**inputs, **settings)
    assert torch.equal(ids, model.generate(**inputs, **settings))
    assert len(set(ids[0].tolist())) > 8
    assert tokenizer.decode(ids[0]).startswith("w5 w77 w120 ")


@torch.no_grad()
def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """Return log q(continuation | context) in nats."""
    log_q = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(log_q[at, token].item() for at, token in zip(places, continuation, strict=True))


def write_task(folder: Path) -> None:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    task = {
        "task": "four_items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "four_items.yaml").write_text(yaml.safe_dump(task))


LM_EVAL = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

model, folder = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": model, "dtype": "float32"},
    tasks=["four_items"],
    device="cpu",
    batch_size=2,
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    bootstrap_iters=0,
)
notes = [(note["doc_id"], note["filtered_resps"]) for note in found["samples"]["four_items"]]
with open(f"{folder}/found.json", "w") as stream:
    json.dump([found["results"]["four_items"]["acc,none"], notes], stream)
"""
"""What its command line does, but for reading the thousands of tasks that come with it."""


def run_lm_eval(model: Path, folder: Path) -> tuple[float, list]:
    """Return the accuracy, and of each item its number and (log-likelihood, is greedy) of each
    choice; run without network."""
    caches = {name: str(folder / "cache") for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"), "1")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LM_EVAL, str(model), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | caches | offline,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_lm_eval_sees_the_models_probabilities(tmp_path):
    folder, model = export("llama-tied", tmp_path)
    write_task(tmp_path)
    accuracy, notes = run_lm_eval(folder, tmp_path)
    ids = {word: index for index, word in enumerate(WORDS)}
    num_right = 0
    for number, answers in notes:
        item = ITEMS[number]
        context = [ids[word] for word in item["question"].split()]
        choices = [[ids[word] for word in choice.split()] for choice in item["choices"]]
        expected = [log_likelihood(model, context, choice) for choice in choices]
        found = [float(log_q) for log_q, is_greedy in answers]
        assert found == pytest.approx(expected, abs=1e-4)
        num_right += expected.index(max(expected)) == item["answer"]
    assert len(notes) == len(ITEMS) and 0 < num_right < len(ITEMS)
    assert accuracy == num_right / len(ITEMS)


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_finds_what_its_loader_asks_for(name, tmp_path):
    """In the place of vLLM, which needs a GPU build: what it reads before a kernel runs.

    Its loader takes `architectures` to its registry, config.json and tokenizer through
    transformers, the length from max_position_embeddings or n_positions, every *.safetensors that
    the index names, and the names of transformers' own files. Versions with transformers 4 read
    rope_theta, rope_scaling and torch_dtype from the top of config.json. Not shown: that it runs.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder, model = export(name, tmp_path, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert config.architectures == [VLLM_CLASSES[config.model_type]] == [type(model).__name__]
    assert config.dtype == torch.bfloat16 and not hasattr(config, "quantization_config")
    assert config.max_position_embeddings == POSITIONS
    assert getattr(config, "rope_parameters", 0) == getattr(model.config, "rope_parameters", 0)
    assert not list(folder.glob("*.py")) and "auto_map" not in config.to_dict()
    plain = json.loads((folder / "config.json").read_text())
    assert plain["torch_dtype"] == "bfloat16"
    if rope := getattr(model.config, "rope_parameters", None):
        assert plain["rope_theta"] == rope["rope_theta"]
        scaling = plain["rope_scaling"] or {"rope_type": "default"}
        assert scaling | {"rope_theta": plain["rope_theta"]} == rope

    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(stored) > 1 and sorted(stored) == sorted(set(weight_map.values()))
    assert weight_map == {key: file for file, tensors in stored.items() for key in tensors}
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    for key, tensor in saved.items():
        assert torch.equal(stored[weight_map.pop(key)][key], tensor.bfloat16()), key
    assert not weight_map

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == config.vocab_size == VOCAB_SIZE
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    assert generation.eos_token_id == tokenizer.eos_token_id == VOCAB_SIZE - 1
