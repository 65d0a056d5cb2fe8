"""What to measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_emo.benchmark.problem import Problem, make_problem
from megatron_emo.benchmark.variants import DEFAULT_VARIANTS, check_variants

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure; the sizes default to the output layer of GPT-2 small."""

    num_tokens: int = 2048
    vocab_size: int = 50257
    hidden_size: int = 768
    cost_dim: int = 768
    dtype: str = "fp32"
    """Of hidden states, weight and cost table."""
    device: str = "cpu"
    rounds: int = 5
    warmup: int = 1
    """Rounds that are run and not counted."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """Names in VARIANTS, or "all" for all that can run here."""
    seed: int = 1234
    workspace_mb: int = 512
    """What a chunk of this package's own may take, in MiB."""
    tensor_parallel: int = 1
    """Ranks over which collectives are counted; 1 counts none."""

    def __post_init__(self) -> None:
        positive = ("num_tokens", "vocab_size", "hidden_size", "cost_dim", "rounds")
        positive += ("workspace_mb", "tensor_parallel")
        for name, least in {**dict.fromkeys(positive, 1), "warmup": 0}.items():
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: expected at least {least}, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        object.__setattr__(self, "variants", check_variants(self.variants, self.device))

    def make_problem(self, target: Tensor) -> Problem:
        """Return random tensors of these sizes on the device."""
        sizes = (self.vocab_size, self.hidden_size, self.cost_dim)
        problem = make_problem(target, *sizes, self.seed)
        problem = replace(problem, workspace_mb=self.workspace_mb)
        return problem.to(self.device, DTYPES[self.dtype])
