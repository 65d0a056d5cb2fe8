"""Megatron without CUDA: flags, the launch environment, and runs that leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_emo.training import cpu

if not cpu.is_needed():
    pytest.skip("CUDA is available: nothing to stand in for", allow_module_level=True)

DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
LAYOUTS = {
    "tensor": ("--tensor-model-parallel-size", "2"),
    "optimizer": ("--use-distributed-optimizer",),
}
SHORT = ("--train-iters", "4", "--eval-iters", "0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_with_dropout_is_bit_identical(run_pretraining, tmp_path, layout):
    flags = (*LAYOUTS[layout], *SHORT, *DROPOUT)
    folder = str(tmp_path / "run")
    straight = run_pretraining(2, *flags, "--save", folder, "--save-interval", "2")
    resumed = run_pretraining(2, *flags, "--load", folder, "--ckpt-step", "2")
    for name in ("lm loss", "emo loss", "grad-norm"):
        assert resumed[name] == {step: straight[name][step] for step in (3, 4)}, name


def test_a_run_leaves_nothing_behind_for_the_next(run_pretraining):
    flags = (*LAYOUTS["tensor"], *SHORT, *DROPOUT)
    first = run_pretraining(2, *flags)
    run_pretraining(2, *SHORT, *LAYOUTS["optimizer"], "--seed", "3")
    assert run_pretraining(2, *flags)["lm loss"] == first["lm loss"]


def test_typed_backends_are_overridden_and_named():
    argv, overridden = cpu.cpu_arguments(["--transformer-impl=transformer_engine", "--bf16"])
    assert argv[:2] == ["--transformer-impl=transformer_engine", "--bf16"]
    assert argv[argv.index("--transformer-impl") + 1] == "local"
    assert overridden == ["--transformer-impl transformer_engine -> local"]


@pytest.mark.parametrize(
    "argv",
    [["--fp8-format", "hybrid"], ["--context-parallel-size=2"], ["--tp-comm-overlap", "--bf16"]],
)
def test_what_only_cuda_can_do_is_refused_by_its_flag(argv):
    with pytest.raises(ValueError, match=argv[0].partition("=")[0]):
        cpu.cpu_arguments(argv)


def test_flags_that_ask_for_nothing_pass():
    cpu.cpu_arguments(["--context-parallel-size", "1", "--cuda-graph-impl", "none"])
    cpu.cpu_arguments([])


def test_a_plain_process_is_rank_0_of_1(monkeypatch):
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*launch, "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)
    cpu.set_launch_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert os.environ["MASTER_PORT"] == "0"


def test_importing_the_module_installs_nothing():
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert Path(cpu.__file__).name == "cpu.py"
