"""stories260K, a real language model, from llama2.c's file to Hugging Face, to Megatron and back.

The truth is the story that its author published for it: every word, from each of the three.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_emo.conversion.export_hf import export_hf
from megatron_emo.conversion.import_hf import import_hf
from megatron_emo.conversion.llama2c import convert_llama2c

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260K"
NUM_TOKENS = 256
"""As many as llama2.c's `run` writes."""

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model as `hf`, `megatron` and `exported`."""
    root = tmp_path_factory.mktemp("stories260k")
    found = {name: root / name for name in ("hf", "megatron", "exported")}
    convert_llama2c(STORIES / "stories260K.bin", STORIES / "tok512.bin", found["hf"])
    import_hf(found["hf"], found["megatron"])
    export_hf(found["megatron"], found["exported"])
    return found


@pytest.fixture(scope="module")
def published() -> str:
    """The text under the command with temperature 0."""
    page = (STORIES / "stories260K.md").read_text(encoding="utf-8")
    (story,) = re.findall(r"^\$ \./run .* -t 0\.0\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    return story


def generate_hf(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """The prompt and its continuation by transformers, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def generate_megatron(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """The same by Megatron's GPTModel, as the example does it."""
    path = ROOT / "examples" / "stories260k" / "generate_megatron.py"
    spec = importlib.util.spec_from_file_location("stories260k_generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate(folder, prompt, max_new_tokens)


@pytest.mark.parametrize("name", ["hf", "exported"])
def test_transformers_tells_the_published_story(folders, published, name):
    assert generate_hf(folders[name], "", NUM_TOKENS) == published


def check_story(checkpoint: str, prompt: str, num_tokens: int, expected: str) -> None:
    found = generate_megatron(Path(checkpoint), prompt, num_tokens)
    assert found == expected, found


def test_megatron_tells_the_published_story(run_distributed, folders, published):
    run_distributed(1)(
        check_story,
        checkpoint=str(folders["megatron"]),
        prompt="",
        num_tokens=NUM_TOKENS,
        expected=published,
    )


def test_both_end_a_story_where_the_next_one_begins(run_distributed, folders):
    """Of a prompt, and with room for more than the story."""
    prompt, room = "Tom had a big red ball.", 400
    story = generate_hf(folders["hf"], prompt, room)
    assert story.startswith(prompt) and "\n<s>" not in story
    assert len(AutoTokenizer.from_pretrained(folders["hf"])(story)["input_ids"]) < room
    run_distributed(1)(
        check_story,
        checkpoint=str(folders["megatron"]),
        prompt=prompt,
        num_tokens=room,
        expected=story,
    )


def check_logits(megatron: str, hf: str, text: str) -> None:
    from megatron_emo.conversion.convert import verify_logits

    verify_logits(Path(megatron), Path(hf), [text])


def test_logits_on_the_story_are_those_of_transformers(run_distributed, folders, published):
    run_distributed(1)(
        check_logits, megatron=str(folders["megatron"]), hf=str(folders["hf"]), text=published
    )


def test_the_folder_comes_back(folders):
    before, after = (load_file(folders[x] / "model.safetensors") for x in ("hf", "exported"))
    assert before.keys() == after.keys()
    assert sum(tensor.numel() for tensor in before.values()) == 260_032
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor), name
    first, second = (
        json.loads((folders[x] / "config.json").read_text()) for x in ("hf", "exported")
    )
    # Under the names of transformers 4 too.
    assert second == first | {"torch_dtype": "float32", "rope_theta": 10000.0, "rope_scaling": None}
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (folders["hf"] / file).read_bytes() == (folders["exported"] / file).read_bytes()


def check_room(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="--max-new-tokens 512: expected 1 to 511"):
        generate_megatron(Path(checkpoint), "", 512)


def test_a_text_longer_than_the_context_is_refused(run_distributed, folders):
    run_distributed(1)(check_room, checkpoint=str(folders["megatron"]))
