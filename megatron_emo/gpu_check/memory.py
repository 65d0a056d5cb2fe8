"""Peak memory of the output layer with its loss, beyond inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_emo.benchmark.memory import LiveStorage
from megatron_emo.benchmark.tokens import zipf_token_ids
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.gpu_check.parity import PATHS, Layer
from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import build_objective

WORKSPACE_MB = 512
WORKSPACE_SLACK_MB = 64
PEAK_RATIO_BOUND = 1.5
VOCAB_SIZES = (131072, 16384)
"""A whole vocabulary, and one rank's shard of it at tensor parallel size 8."""
_MIB = 1 << 20


def check_memory(settings: Settings, record: Record) -> None:
    """Peak beyond inputs, dX and dW of every path: emo1 over mle; recompute over the workspace."""
    for vocab_size in VOCAB_SIZES if settings.is_full else (509,):
        layer = make_layer(settings, vocab_size)
        sizes = f"V={vocab_size}"
        for path in PATHS:
            beyond = {
                name: beyond_gradients(layer, partial(run_layer, layer, name, path))
                for name in ("mle", "emo1")
            }
            for name, value in beyond.items():
                record.note(f"{sizes} {name} {path}: beyond dX, dW, MiB", value)
            record.bound(
                f"{sizes} {path}: emo1 over mle",
                beyond["emo1"] / beyond["mle"],
                PEAK_RATIO_BOUND,
                applies=settings.is_full,
            )
        record.note(f"{sizes} of each fused peak, dW summed in fp32, MiB", 2 * _size(layer.weight))
        check_recompute_into_main_grad(settings, record, layer, sizes)
        del layer


def check_recompute_into_main_grad(
    settings: Settings, record: Record, layer: Layer, sizes: str
) -> None:
    """Recompute with dW added to an fp32 main_grad, as Megatron trains, within the workspace.

    Autograd is still handed an empty dW, which Megatron drops: the larger of that and the workspace
    is the bound.
    """
    layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    run = partial(run_layer, layer, "emo1", "recompute", into_main_grad=True)
    peak = peak_bytes(settings.device, run) / _MIB - _size(layer.hidden)
    bound = max(WORKSPACE_MB + WORKSPACE_SLACK_MB, _size(layer.weight))
    record.bound(f"{sizes} emo1 recompute into main_grad: beyond dX, MiB", peak, bound)


def make_layer(settings: Settings, vocab_size: int) -> Layer:
    """Return random bf16 tensors made on the device: N=8192, h=d=4096 where it is not `small`."""
    num_tokens, width = (8192, 4096) if settings.is_full else (64, 16)
    normal = partial(
        torch.randn,
        device=settings.device,
        dtype=torch.bfloat16,
        generator=torch.Generator(settings.device).manual_seed(5),
    )
    return Layer(
        normal(num_tokens, width).requires_grad_(),
        normal(vocab_size, width).mul_(2 / width**0.5).requires_grad_(),
        zipf_token_ids(num_tokens, vocab_size, seed=5).to(settings.device),
        unit_rows(normal(vocab_size, width)).bfloat16(),
        {"uniform": torch.full((num_tokens,), 1 / num_tokens, device=settings.device)},
    )


def run_layer(layer: Layer, objective: str, path: str, *, into_main_grad: bool = False) -> None:
    """Form the loss, dX and dW once."""
    call = {
        "target": layer.target,
        "objective": build_objective(objective),
        "cost_embedding": layer.unit_embedding if objective == "emo1" else None,
        "cost_embedding_is_normalized": True,
    }
    if path == "vocab_parallel_loss":
        loss = vocab_parallel_loss(F.linear(layer.hidden, layer.weight), **call).loss
    else:
        loss = fused_linear_loss(
            layer.hidden,
            layer.weight,
            path=path,
            workspace_mb=WORKSPACE_MB,
            into_main_grad=into_main_grad,
            **call,
        ).loss
    total = (loss * layer.upstream["uniform"]).sum()
    torch.autograd.grad(total, (layer.hidden, layer.weight))


def beyond_gradients(layer: Layer, run: Callable[[], None]) -> float:
    """Return the peak of a run in MiB, less dX and dW in the inputs' dtype."""
    peak = peak_bytes(layer.hidden.device.type, run) / _MIB
    return peak - _size(layer.hidden) - _size(layer.weight)


def peak_bytes(device: str, run: Callable[[], None]) -> int:
    """Return the most bytes alive during the second of two runs, less those alive before it."""
    run()  # compiles kernels and lets libraries take their own workspace
    if device == "cpu":
        with LiveStorage() as live:
            run()
        return live.peak_bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _size(x: Tensor) -> float:
    """MiB of a tensor."""
    return x.numel() * x.element_size() / _MIB
