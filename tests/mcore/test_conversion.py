"""Imported checkpoints through Megatron's real pretrain(), without a flag of the model's.

The truth is transformers' own loss on the same tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import CONFIGS, save_model
from safetensors.torch import load_file

from megatron_emo.conversion.export_hf import export_hf
from megatron_emo.conversion.import_hf import ImportOptions, import_hf
from megatron_emo.data.files import IndexedDatasetWriter

SEQUENCES, LENGTH = 8, 32
VOCAB_SIZE = 132
"""Even: divided by two ranks without padding, which Megatron's softmax would count in."""
RUN = f"""
    --seq-length {LENGTH} --micro-batch-size 2 --global-batch-size {SEQUENCES} --train-iters 1
    --lr 1e-3 --min-lr 1e-3 --eval-iters 0 --eval-interval 1 --seed 7
    --log-interval 1 --tensorboard-log-interval 1
    --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --num-workers 0 --split 100,0,0
    --use-checkpoint-args --attention-softmax-in-fp32
""".split()
UNPADDED = ImportOptions(make_vocab_size_divisible_by=2, max_shard_size="100KB")
LAYOUTS = {
    "tp1": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """(flags of a data set that one batch reads once, its sequences [8, 33])."""
    prefix = str(tmp_path_factory.mktemp("data") / "epoch_document")
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE, SEQUENCES * LENGTH + 1)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    writer.add_document(tokens.astype(np.uint16))
    writer.finish()
    writer.publish()
    sequences = np.stack([tokens[i * LENGTH :][: LENGTH + 1] for i in range(SEQUENCES)])
    return ["--data-path", prefix], torch.from_numpy(sequences)


@torch.no_grad()
def transformers_loss(model, sequences) -> float:
    logits = model(sequences[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "tp2"),
        ("gpt2", "tp1"),
        ("qwen3", "tp1"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "tp1"),
                ("llama", "pp2"),
                ("llama3-rope", "tp1"),
                ("gpt2", "tp2"),
                ("opt", "tp1"),
                ("mixtral", "tp1"),
            )
        ),
    ],
)
def test_first_loss_is_that_of_transformers(run_pretraining, one_epoch, tmp_path, name, layout):
    data, sequences = one_epoch
    model = save_model(name, tmp_path / "hf", vocab_size=VOCAB_SIZE)
    import_hf(tmp_path / "hf", tmp_path / "megatron", UNPADDED)
    world_size, flags = LAYOUTS[layout]
    start = ["--pretrained-checkpoint", str(tmp_path / "megatron")]
    logged = run_pretraining(
        world_size, *flags, *start, base=[*RUN, *data], objective="mle", cost=None
    )
    expected = transformers_loss(model, sequences).item()
    assert logged["lm loss"][1] == pytest.approx(expected, abs=1e-4)


def check_logits(folders: list[str]) -> None:
    from megatron_emo.conversion.convert import verify_logits

    for folder in map(Path, folders):
        verify_logits(folder / "mg", folder / "hf", None)


def test_logits_are_those_of_transformers(run_distributed, tmp_path):
    """Of all architectures, within what rounding explains: a loss hides small mistakes."""
    for name in CONFIGS:
        save_model(name, tmp_path / name / "hf")
        import_hf(tmp_path / name / "hf", tmp_path / name / "mg")
    run_distributed(1)(check_logits, folders=[str(tmp_path / name) for name in CONFIGS])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", "tp2"),
        pytest.param("llama", "tp2", marks=pytest.mark.slow),
        pytest.param("gpt2", "pp2", marks=pytest.mark.slow),
        pytest.param("mixtral", "tp1", marks=pytest.mark.slow),
    ],
)
def test_saved_weights_come_back(run_pretraining, one_epoch, tmp_path, name, layout):
    """Imported, saved by Megatron after a step of length 0, exported: the same weights."""
    data, _ = one_epoch
    save_model(name, tmp_path / "hf", vocab_size=VOCAB_SIZE)
    import_hf(tmp_path / "hf", tmp_path / "mg")  # padded to 256 rows
    still = ["--lr", "0", "--min-lr", "0", "--save", str(tmp_path / "run"), "--save-interval", "1"]
    world_size, flags = LAYOUTS[layout]
    start = ["--load", str(tmp_path / "mg"), *flags]
    run_pretraining(world_size, *start, base=[*RUN, *data, *still], objective="mle", cost=None)
    export_hf(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(tmp_path / end / "model.safetensors") for end in ("hf", "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def test_padding_takes_hardly_any_probability(run_pretraining, one_epoch, tmp_path):
    """As in GPT-2 all logits are far below 0, where a row of zeros would have the only logit."""
    data, sequences = one_epoch
    model = save_model("gpt2-untied", tmp_path / "hf", vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(3.0)
        model.lm_head.weight.sub_(0.2)
    model.save_pretrained(tmp_path / "hf")
    import_hf(
        tmp_path / "hf", tmp_path / "megatron", ImportOptions(make_vocab_size_divisible_by=20)
    )
    start = ["--pretrained-checkpoint", str(tmp_path / "megatron")]
    logged = run_pretraining(1, *start, base=[*RUN, *data], objective="mle", cost=None)
    expected = transformers_loss(model, sequences).item()
    assert expected <= logged["lm loss"][1] <= expected + np.log(140 / 132)
