"""What every variant is given: one output layer with its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import narrow_rows

MeanLoss = Callable[[], Tensor]
"""Called once per repetition; what is not to be timed was done when it was made."""


@dataclass(frozen=True, eq=False)
class Problem:
    """An output layer, or one rank's shard of it, with its batch."""

    hidden: Tensor
    """[N, h]"""
    weight: Tensor
    """[V/tp, h]"""
    target: Tensor
    """[N]"""
    cost_embedding: Tensor
    """[V/tp, D], rows at unit length."""
    workspace_mb: int = 512
    """What a chunk may take, on the paths that work in chunks."""
    tp_group: dist.ProcessGroup | None = None
    """None for one rank."""

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """Return a copy whose hidden states and weight are leaves that ask for gradient."""
        tensors = (self.hidden, self.weight, self.target, self.cost_embedding)
        hidden, weight, target, cost = (x.detach().to(device) for x in tensors)
        return replace(
            self,
            hidden=hidden.to(dtype).requires_grad_(),
            weight=weight.to(dtype).requires_grad_(),
            target=target,
            cost_embedding=cost.to(dtype),
        )

    def shard(self, tp_group: dist.ProcessGroup) -> Problem:
        """Return this rank's equal part of the vocabulary; the number of ranks divides V."""
        rank, size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
        per_rank = len(self.weight) // size
        rows = slice(rank * per_rank, (rank + 1) * per_rank)
        weight = self.weight.detach()[rows].clone().requires_grad_()
        cost_embedding = self.cost_embedding[rows].clone()
        return replace(self, weight=weight, cost_embedding=cost_embedding, tp_group=tp_group)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return (dX, dW)."""
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    @cached_property
    def fp8_cost_embedding(self) -> Tensor:
        """[V/tp, D or wider], the table as `--emo-cost-dtype fp8` holds it."""
        return narrow_rows(self.cost_embedding.float(), torch.float8_e4m3fn)


def make_problem(target: Tensor, vocab_size: int, hidden: int, cost_dim: int, seed: int) -> Problem:
    """Return random fp32 tensors on the CPU: logits of standard deviation 2, a random table."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    weight = normal(vocab_size, hidden) * (2 / hidden**0.5)
    return Problem(
        normal(len(target), hidden), weight, target, unit_rows(normal(vocab_size, cost_dim))
    )
