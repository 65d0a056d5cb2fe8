"""What a variant asks of torch.distributed: counted over gloo ranks, beside the formula."""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_emo.benchmark.problem import Problem, make_problem
from megatron_emo.benchmark.variants import VARIANTS, Variant

_SENT = {
    "all_reduce": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_object": None,
    "all_to_all_single": "input",
    "barrier": None,
    "broadcast": "tensor",
    "recv": "tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "send": "tensor",
}
"""Functions of torch.distributed, and their parameter that this rank hands in."""


class Collective(NamedTuple):
    """One request of this rank."""

    name: str
    numel: int
    """Elements this rank hands in, not what a ring then moves."""
    group: dist.ProcessGroup | None
    num_bytes: int


class CollectiveCounter:
    """Records, as `calls`, the collectives asked of torch.distributed while its context lasts.

    It stands in for the functions as attributes of `torch.distributed`; what was imported from
    there by name before is not seen.
    """

    def __enter__(self):
        self.calls: list[Collective] = []
        self._originals = {name: getattr(dist, name) for name in _SENT}
        for name, original in self._originals.items():
            setattr(dist, name, self._recorder(name, original))
        return self

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _recorder(self, name: str, original: Callable) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def record(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            sent = given.get(_SENT[name])
            tensors = [sent] if isinstance(sent, Tensor) else sent or []
            numel = sum(x.numel() for x in tensors)
            num_bytes = sum(x.numel() * x.element_size() for x in tensors)
            self.calls.append(Collective(name, numel, given.get("group"), num_bytes))
            return original(*args, **kwargs)

        return record


@dataclass(frozen=True)
class Traffic:
    """One rank's collectives in one repetition, (name, bytes handed in) in their order."""

    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]
    formula_forward_bytes: int
    """Cost rows of the distinct targets, and 4 fp32 a token; 3 without a cost."""
    formula_backward_bytes: int
    """dX; 0 where the loss starts from logits, whose layer reduces it."""


def count_collectives(
    names: Sequence[str],
    target: Tensor,
    *,
    hidden_size: int,
    cost_dim: int,
    dtype: torch.dtype,
    tp_size: int,
) -> dict[str, Traffic]:
    """Return the traffic of this package's variants among `names`, over `tp_size` gloo ranks.

    Tokens, widths and repetitions among the ids are as given. The vocabulary is reduced to the
    distinct ids: no byte depends on it, but the number of chunks does, and with it the number of
    all-gathers of the path forward, which here has as many as its chunks of this vocabulary.

    Raises:
        ValueError: fewer than 2 ranks.
        RuntimeError: a rank failed.
    """
    if tp_size < 2:
        raise ValueError(f"--tensor-parallel: expected at least 2 ranks, got {tp_size}")
    names = [name for name in names if VARIANTS[name].path]
    with tempfile.TemporaryDirectory() as folder:
        args = (tp_size, folder, names, target, hidden_size, cost_dim, dtype)
        try:
            torch.multiprocessing.spawn(_rank, args, nprocs=tp_size)
        except torch.multiprocessing.ProcessException as error:
            raise RuntimeError(f"--tensor-parallel {tp_size}: {error}") from error
        found = json.loads((Path(folder) / "rank0.json").read_text(encoding="utf-8"))
    return {name: Traffic(**traffic) for name, traffic in found.items()}


def _rank(
    rank: int,
    tp_size: int,
    folder: str,
    names: Sequence[str],
    target: Tensor,
    hidden_size: int,
    cost_dim: int,
    dtype: torch.dtype,
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", tp_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp_size)
    try:
        counted = count_on_this_rank(names, target, hidden_size, cost_dim, dtype, dist.group.WORLD)
        if rank == 0:
            content = {name: asdict(traffic) for name, traffic in counted.items()}
            (Path(folder) / "rank0.json").write_text(json.dumps(content), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def count_on_this_rank(
    names: Sequence[str],
    target: Tensor,
    hidden_size: int,
    cost_dim: int,
    dtype: torch.dtype,
    tp_group: dist.ProcessGroup,
) -> Mapping[str, Traffic]:
    """Return each variant's traffic; every rank of tp_group calls it with the same arguments."""
    distinct, target = torch.unique(target, return_inverse=True)
    tp_size = dist.get_world_size(tp_group)
    vocab_size = -(-len(distinct) // tp_size) * tp_size
    problem = make_problem(target, vocab_size, hidden_size, cost_dim, seed=0)
    problem = problem.to("cpu", dtype).shard(tp_group)
    return {name: _count_one(VARIANTS[name], problem, num_distinct=len(distinct)) for name in names}


def _count_one(variant: Variant, problem: Problem, num_distinct: int) -> Traffic:
    loss = variant.build(problem)
    with CollectiveCounter() as forward:
        value = loss()
    with CollectiveCounter() as backward:
        problem.gradients(value)
    has_cost = variant.objective != "mle"
    table = problem.fp8_cost_embedding if variant.table == "fp8" else problem.cost_embedding
    statistics = (3 + has_cost) * 4 * len(problem.target)
    row_bytes = has_cost * table.shape[1] * table.element_size()
    return Traffic(
        [(call.name, call.num_bytes) for call in forward.calls],
        [(call.name, call.num_bytes) for call in backward.calls],
        formula_forward_bytes=num_distinct * row_bytes + statistics,
        formula_backward_bytes=variant.is_fused
        * problem.hidden.numel()
        * problem.hidden.element_size(),
    )
