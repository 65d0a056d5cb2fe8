"""A short real pretraining run on one device, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.training_curves import read_scalars

SCRIPT = Path(__file__).resolve().parents[2] / "pretrain_gpt_emo.py"
ITERATIONS = 10
_SECONDS = 540
_LAST_LINES = 15

_MODEL = {
    "small": """--num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64
        --seq-length 32 --max-position-embeddings 32 --vocab-size 250""",
    "full": """--num-layers 4 --hidden-size 512 --num-attention-heads 8 --ffn-hidden-size 1408
        --seq-length 512 --max-position-embeddings 512 --vocab-size 32000""",
}
_COMMON = f"""
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16
    --micro-batch-size 2 --global-batch-size 4 --train-iters {ITERATIONS} --lr 1e-3 --min-lr 1e-4
    --lr-decay-style cosine --clip-grad 1.0 --seed 7 --mock-data --split 1,0,0 --num-workers 0
    --tokenizer-type NullTokenizer --eval-iters 0 --eval-interval {ITERATIONS} --log-interval 1
    --tensorboard-log-interval 1
"""
# Megatron's own layers without the kernels that Transformer Engine and Apex bring.
_LOCAL = """--transformer-impl local --attention-backend unfused --no-rope-fusion
    --no-persist-layer-norm --no-masked-softmax-fusion --no-gradient-accumulation-fusion"""
_ENGINE = "--transformer-impl transformer_engine --no-gradient-accumulation-fusion"
_FP8 = f"{_ENGINE} --fp8-format hybrid --fp8-recipe delayed"


def check_training(settings: Settings, record: Record) -> None:
    """Ten iterations of pretrain(), mle and emo1, in FP8 where it can be; losses must fall."""
    if importlib.util.find_spec("megatron") is None:
        record.skip("megatron-core is not installed")
    if not SCRIPT.is_file():
        record.skip("pretrain_gpt_emo.py is not beside the package")
    losses = {}
    for name, flags in planned_runs(settings, record).items():
        losses[name] = run_pretraining(settings, flags.split())
        first, last = losses[name][1], losses[name][ITERATIONS]
        record.note(f"{name}: first lm loss", first)
        record.note(f"{name}: last lm loss", last)
        record.expect(f"{name}: lm loss falls", last < first)
    # One model, one batch and bf16 logits: before the first update the paths differ by rounding.
    for path in ("recompute", "forward"):
        if f"emo1 {path}" in losses:
            difference = abs(losses[f"emo1 {path}"][1] - losses["emo1"][1])
            record.bound(f"emo1 {path}: first lm loss less that of logits", difference, 1e-3)


def planned_runs(settings: Settings, record: Record) -> dict[str, str]:
    """Return name -> flags of the runs that can be made here; says why others cannot."""
    runs = {
        "mle": f"{_LOCAL} --objective mle",
        "emo1": f"{_LOCAL} --objective emo1 --emo-loss-path logits",
    }
    if settings.device == "cpu":
        return runs
    for path in ("recompute", "forward"):
        runs[f"emo1 {path}"] = f"{_LOCAL} --objective emo1 --emo-loss-path {path}"
    reason = transformer_engine_obstacle()
    if reason:
        record.note("transformer engine runs", f"not made: {reason}")
        return runs
    runs["emo1 transformer engine"] = f"{_ENGINE} --objective emo1"
    if torch.cuda.get_device_capability() >= (8, 9):
        runs["emo1 transformer engine fp8"] = f"{_FP8} --objective emo1"
        runs["mle transformer engine fp8"] = f"{_FP8} --objective mle"
    else:
        record.note("fp8 runs", "not made: they need compute capability 8.9")
    return runs


def transformer_engine_obstacle() -> str:
    """Return why Transformer Engine cannot be imported, "" where it can; asked in a process of its
    own, which a broken library may take down."""
    command = [sys.executable, "-W", "ignore", "-c", "import transformer_engine.pytorch"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return "" if result.returncode == 0 else lines[-1]


def run_pretraining(settings: Settings, flags: list[str]) -> dict[int, float]:
    """Return 'lm loss' by iteration of one run, from its TensorBoard file.

    Raises:
        RuntimeError: the run failed; with the last lines it printed.
    """
    model = _MODEL["full" if settings.is_full else "small"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*_launcher(settings), str(SCRIPT), *model.split(), *_COMMON.split(), *flags]
        command += ["--tensorboard-dir", folder]
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            cwd=folder,
            env=_environment(settings),
        )
        if result.returncode != 0:
            lines = result.stdout.strip().splitlines()[-_LAST_LINES:]
            raise RuntimeError("\n".join([lines[-1], f"after: {' '.join(flags)}", *lines]))
        return read_scalars(folder)["lm loss"]


def _launcher(settings: Settings) -> list[str]:
    if settings.device == "cpu":
        return [sys.executable]
    # --standalone takes a free port.
    launch = "-m torch.distributed.run --standalone --nproc-per-node 1"
    return [sys.executable, *launch.split()]


def _environment(settings: Settings) -> dict[str, str]:
    """This process's, without a launch it may be part of."""
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launch}
    root = str(SCRIPT.parent)
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{path}" if path else root
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return environment
