"""Peak memory of one repetition, by what is alive and not by what the process holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from megatron_emo.benchmark.problem import MeanLoss, Problem


def peak_bytes(loss: MeanLoss, problem: Problem) -> int:
    """Return the most bytes alive beside the inputs, dX and dW included, in one repetition."""
    if problem.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.gradients(loss())
        return torch.cuda.max_memory_allocated() - before
    with LiveStorage() as live:
        problem.gradients(loss())
    return live.peak_bytes


class LiveStorage(TorchDispatchMode):
    """Records the peak, in bytes, of the storages that operators inside returned and are alive.

    Unlike the process's resident size it knows nothing of an allocator's habits. Tensors made
    before are not counted, nor is what an operator of torch's own allocates and frees inside
    itself. Operators written in Python are looked into.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes = WeakIdKeyDictionary()
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace not in ("aten", "prim", "prims", "profiler"):
            with self:
                return function.redispatch(_CPU_KERNEL, *args, **kwargs)
        given = {s.data_ptr() for s in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        # A view, and what is written in place, has the storage of an argument.
        for storage in _storages(result):
            if storage.data_ptr() not in given:
                self._sizes[storage] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes.values()))
        return result


_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Below autograd and this mode, whose part is done."""


def _storages(tree) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_iter(tree) if isinstance(x, Tensor)]
