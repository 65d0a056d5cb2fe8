"""What other packages offer for the same layer; each is imported where it is built."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_emo.benchmark.problem import MeanLoss, Problem


def is_importable(name: str) -> bool:
    """Whether a module would be found; its parents are imported to see."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def torch_cross_entropy(problem: Problem) -> MeanLoss:
    return lambda: F.cross_entropy(F.linear(problem.hidden, problem.weight), problem.target)


def torch_linear_cross_entropy(problem: Problem) -> MeanLoss:
    """Its options ask for chunks; without them it is `torch_cross_entropy`."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(
        problem.hidden, problem.weight, problem.target, options=options
    )


def megatron_cross_entropy(problem: Problem) -> MeanLoss:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    group = _group_of_one(problem.hidden.device.type)
    return lambda: vocab_parallel_cross_entropy(
        F.linear(problem.hidden, problem.weight), problem.target, tp_group=group
    ).mean()


def megatron_fused_cross_entropy(problem: Problem) -> MeanLoss:
    """Compiled on a GPU; see `variants.compile_stance` for a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    group = _group_of_one(problem.hidden.device.type)
    return lambda: fused_vocab_parallel_cross_entropy(
        F.linear(problem.hidden, problem.weight), problem.target, group
    ).mean()


@cache
def _group_of_one(device_type: str) -> dist.ProcessGroup:
    """A group of this process alone, beside whatever torch.distributed has been set up for."""
    backend = dist.ProcessGroupNCCL if device_type == "cuda" else dist.ProcessGroupGloo
    return backend(dist.HashStore(), 0, 1)


def liger_linear_cross_entropy(problem: Problem) -> MeanLoss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(problem.weight, problem.hidden, problem.target)


def released_path() -> Path:
    """The wheel that `make env` puts beside the environment."""
    return Path(sys.prefix) / "oracles" / "EMOLoss-0.0.3" / "emo" / "loss.py"


def released_emo_loss(problem: Problem) -> MeanLoss:
    """EMOLoss 0.0.3; one more position makes up for its shift of logits against labels."""
    spec = importlib.util.spec_from_file_location("emo_0_0_3", released_path())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    labels = F.pad(problem.target, (1, 0))[None]

    def loss() -> Tensor:
        logits = F.linear(F.pad(problem.hidden, (0, 0, 0, 1)), problem.weight)
        return module.EMOLoss(logits[None], labels, problem.cost_embedding)

    return loss
