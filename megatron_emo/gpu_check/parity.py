"""Loss and gradients of every path on the device, against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_emo.cost_embedding import unit_rows
from megatron_emo.gpu_check.dense import dense_loss
from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import build_objective
from megatron_emo.reference import reference_loss

FP32_BOUND = 1e-6
"""Of the norm of the error over the norm of the true value."""
BF16_BOUND = 1.1
"""Of our error over that of the plain computation from the same bf16 inputs."""
OBJECTIVES = ("mle", "emo1")
PATHS = ("vocab_parallel_loss", "logits", "recompute", "forward")
UPSTREAM = ("uniform", "per token")


class Layer(NamedTuple):
    """One output layer with its batch, on the device."""

    hidden: Tensor
    """[N, h]"""
    weight: Tensor
    """[V, h]"""
    target: Tensor
    """[N]"""
    unit_embedding: Tensor
    """[V, D] in hidden's dtype."""
    upstream: dict[str, Tensor]
    """By name, [N] fp32."""


Results = dict[str, Tensor]
"""The loss [N] and the gradients that were asked for, by name."""


def check_loss_parity(settings: Settings, record: Record) -> None:
    """Every path in fp32 and bf16, uniform and per-token upstream gradients, frozen inputs."""
    record.note("float32 products", torch.get_float32_matmul_precision())
    for dtype, objective in product((torch.float32, torch.bfloat16), OBJECTIVES):
        layer = make_layer(settings, dtype)
        if dtype == torch.float32:
            compare_in_fp32(record, layer, objective)
        else:
            # In small gradients it matters more which numbers happen to round well.
            compare_in_bf16(record, layer, objective, applies=not settings.small)
    check_frozen_inputs(record, make_layer(settings, torch.float32))


def make_layer(settings: Settings, dtype: torch.dtype) -> Layer:
    """Return random tensors, the same on every device: an odd vocabulary, repeated targets.

    The uniform upstream gradient is no power of two, so that scaling by it rounds.
    """
    num_tokens, vocab_size, hidden, dim = (
        (48, 301, 24, 20) if settings.small else (400, 4099, 256, 96)
    )
    generator = torch.Generator().manual_seed(9)
    shapes = ((num_tokens, hidden), (vocab_size, hidden), (vocab_size, dim))
    x, w, table = (torch.randn(*shape, generator=generator) for shape in shapes)
    target = torch.randint(0, vocab_size // 3, (num_tokens,), generator=generator)
    upstream = {
        "uniform": torch.full((num_tokens,), 1 / num_tokens),
        "per token": torch.rand(num_tokens, generator=generator),
    }
    return Layer(
        x.to(settings.device, dtype),
        (w * (2 / hidden**0.5)).to(settings.device, dtype),
        target.to(settings.device),
        unit_rows(table).to(settings.device, dtype),
        {name: values.to(settings.device) for name, values in upstream.items()},
    )


def run_path(layer: Layer, objective: str, path: str, upstream: str, frozen: str = "") -> Results:
    """Return loss and gradients of one path; `frozen` names the input that asks for none."""
    inputs = {"dX": layer.hidden.detach(), "dW": layer.weight.detach()}
    leaves = {name: x.requires_grad_(name != frozen) for name, x in inputs.items()}
    call = {
        "target": layer.target,
        "objective": build_objective(objective),
        "cost_embedding": layer.unit_embedding if objective == "emo1" else None,
        "cost_embedding_is_normalized": True,
    }
    if path == "vocab_parallel_loss":
        loss = vocab_parallel_loss(F.linear(leaves["dX"], leaves["dW"]), **call).loss
    else:
        loss = fused_linear_loss(leaves["dX"], leaves["dW"], path=path, **call).loss
    return _with_gradients(loss, layer.upstream[upstream], leaves)


def run_plain(layer: Layer, objective: str, upstream: str) -> Results:
    """Return loss and gradients of the dense computation in the layer's own dtype."""
    leaves = {"dX": layer.hidden.detach().requires_grad_()}
    leaves["dW"] = layer.weight.detach().requires_grad_()
    logits = F.linear(leaves["dX"], leaves["dW"])
    loss = dense_loss(logits, layer.target, layer.unit_embedding, objective)
    return _with_gradients(loss, layer.upstream[upstream], leaves)


def run_exact(layer: Layer, objective: str, upstream: str) -> Results:
    """Return loss and gradients of the reference in float64 on the CPU."""
    leaves = {"dX": layer.hidden.detach().double().cpu().requires_grad_()}
    leaves["dW"] = layer.weight.detach().double().cpu().requires_grad_()
    loss = reference_loss(
        F.linear(leaves["dX"], leaves["dW"]),
        layer.target.cpu(),
        objective,
        layer.unit_embedding.double().cpu(),
    ).loss
    return _with_gradients(loss, layer.upstream[upstream].cpu(), leaves)


def compare_in_fp32(record: Record, layer: Layer, objective: str) -> None:
    """Bound each path's worst error over loss, dX, dW and upstream gradients."""
    exact = {name: run_exact(layer, objective, name) for name in UPSTREAM}
    for path in PATHS:
        errors = [
            error
            for name in UPSTREAM
            for error in relative_errors(run_path(layer, objective, path, name), exact[name])
        ]
        record.bound(f"fp32 {objective} {path}: worst error", _worst(errors), FP32_BOUND)


def compare_in_bf16(record: Record, layer: Layer, objective: str, *, applies: bool) -> None:
    """Bound each path's errors by those of the plain computation in bf16."""
    exact = {name: run_exact(layer, objective, name) for name in UPSTREAM}
    plain = {
        name: list(relative_errors(run_plain(layer, objective, name), exact[name]))
        for name in UPSTREAM
    }
    worst = _worst(plain["uniform"] + plain["per token"])
    record.note(f"bf16 {objective} plain: worst error", worst)
    for path in PATHS:
        ratios = []
        for name in UPSTREAM:
            ours = relative_errors(run_path(layer, objective, path, name), exact[name])
            ratios += [a / b for a, b in zip(ours, plain[name], strict=True)]
        name = f"bf16 {objective} {path}: worst error over plain's"
        record.bound(name, _worst(ratios), BF16_BOUND, applies=applies)


def check_frozen_inputs(record: Record, layer: Layer) -> None:
    """With weight or hidden states frozen, the other gradient must be as it was."""
    exact = run_exact(layer, "emo1", "per token")
    for path in PATHS:
        errors = []
        for frozen in ("dX", "dW"):
            results = run_path(layer, "emo1", path, "per token", frozen)
            kept = {name: exact[name] for name in results}
            errors += relative_errors(results, kept)
        record.bound(f"fp32 emo1 {path}, one input frozen: worst error", _worst(errors), FP32_BOUND)


def relative_errors(results: Results, exact: Results) -> Iterator[float]:
    """Yield the norm of each error over the norm of the exact value."""
    for name, value in results.items():
        true = exact[name]
        yield ((value.double().cpu() - true).norm() / true.norm()).item()


def _with_gradients(loss: Tensor, upstream: Tensor, leaves: dict[str, Tensor]) -> Results:
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad((loss * upstream).sum(), list(asked.values()))
    return {"loss": loss.detach(), **dict(zip(asked, gradients, strict=True))}


def _worst(errors: list[float]) -> float:
    """Return the largest; NaN if there is one, which max() might pass over."""
    return torch.tensor(errors, dtype=torch.float64).max().item()
