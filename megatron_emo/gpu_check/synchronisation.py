"""Which lines of the loss make the host wait for the device.

A wait empties the queue of kernels that hides Python's slowness. With targets planned on the host
the loss needs none, but for one: the path `forward` looks at the upstream gradient.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_emo.gpu_check.parity import PATHS, Layer, make_layer
from megatron_emo.gpu_check.record import Record, Settings
from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.statistics import make_shard
from megatron_emo.loss.target_plan import DEVICE_BUCKET, PlannedTargets, plan_targets
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import build_objective

EXPECTED_WAITS = {"vocab_parallel_loss": 0, "logits": 0, "recompute": 0, "forward": 1}
"""In forward and backward together, with planned targets."""


def check_synchronisation(settings: Settings, record: Record) -> None:
    """Lines that make the host wait for the device, with planned targets and without."""
    if settings.device == "cpu":
        record.skip("no CUDA device: nothing to wait for")
    record.note("torch", "its debug mode does not see every synchronisation; a profile does")
    layer = make_layer(settings, torch.bfloat16)
    host_target = layer.target.cpu()
    for objective in ("mle", "emo1"):
        for path in PATHS:
            run_once(layer, objective, path, host_target)  # compiles kernels, fills caches
            with waits() as planned:
                run_once(layer, objective, path, host_target)
            with waits() as unplanned:
                run_once(layer, objective, path, None)
            name = f"{objective} {path}: waits"
            record.bound(f"{name}, planned targets", len(planned), EXPECTED_WAITS[path])
            record.note(f"{name}, planned targets, at", describe_lines(planned))
            record.note(f"{name}, targets on the device, at", describe_lines(unplanned))


def run_once(layer: Layer, objective: str, path: str, host_target: Tensor | None) -> None:
    """Run forward and backward; with `host_target` [N] the targets are planned from it."""
    hidden, weight = (x.detach().requires_grad_() for x in (layer.hidden, layer.weight))
    table = layer.unit_embedding if objective == "emo1" else None
    planned = None
    if host_target is not None:
        plan = plan_targets(host_target, bucket=DEVICE_BUCKET, device=hidden.device)
        planned = PlannedTargets(plan, table, make_shard(len(weight), None))
    call = {
        "target": layer.target,
        "objective": build_objective(objective),
        "cost_embedding": table,
        "cost_embedding_is_normalized": True,
        "check_target": False,
        "planned": planned,
    }
    if path == "vocab_parallel_loss":
        loss = vocab_parallel_loss(F.linear(hidden, weight), **call).loss
    else:
        loss = fused_linear_loss(hidden, weight, path=path, **call).loss
    torch.autograd.grad((loss * layer.upstream["uniform"]).sum(), (hidden, weight))


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect FILE:LINE of every synchronisation that torch notices inside."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
            lines += [
                f"{Path(warning.filename).name}:{warning.lineno}"
                for warning in caught
                if "synchronizing CUDA operation" in str(warning.message)
            ]


def describe_lines(lines: list[str]) -> str:
    """Return "file:line, file:line x 3", "nowhere" for none."""
    counts = Counter(lines).items()
    return ", ".join(f"{line} x {n}" if n > 1 else line for line, n in counts) or "nowhere"
