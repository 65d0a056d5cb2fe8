"""Master weights of real runs: found in the default buckets, against the same run's by name."""

from __future__ import annotations

import pytest
import torch
from pretraining import DATA, MODEL, TRAINING
from safetensors.torch import load_file

from megatron_emo.conversion.export_hf import ExportOptions, export_hf

RUN = [*MODEL, *TRAINING, *DATA, "--bf16", "--train-iters", "3", "--eval-iters", "0"]
SIDES = {
    "buckets": ["--use-distributed-optimizer"],
    "names": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, []),
        pytest.param(2, ["--tensor-model-parallel-size", "2"], marks=pytest.mark.slow),
        pytest.param(2, ["--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow),
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_masters_in_buckets_are_those_with_names(run_pretraining, tmp_path, world_size, layout):
    exported = {}
    for side, flags in SIDES.items():
        save = ["--save", str(tmp_path / side), "--save-interval", "3"]
        base = [*RUN, *layout, *flags, *save]
        run_pretraining(world_size, base=base, objective="mle", cost=None)
        said: list[str] = []
        for name, dtype in (("wide", torch.float32), ("stored", None)):
            output, options = tmp_path / f"{side}_{name}", ExportOptions(dtype=dtype)
            export_hf(tmp_path / side, output, options, say=said.append)
            exported[side, name] = load_file(output / "model.safetensors")
        assert "27 of 27 tensors from the optimizer's fp32 master weights" in said
    for key, tensor in exported["names", "wide"].items():
        assert torch.equal(exported["buckets", "wide"][key], tensor), key
        assert torch.equal(exported["buckets", "stored"][key], tensor.bfloat16()), key
        assert not torch.equal(tensor, tensor.bfloat16().float()), key
