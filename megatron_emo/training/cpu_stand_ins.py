"""Stand-ins for `torch.cuda`, and for the few Megatron functions that insist on CUDA.

`install()` puts them in place once a process. Each has its reason beside it; all were needed by
megatron-core 0.19.2. Single-threaded semantics hold: on a CPU every operation has finished when its
call returns, so streams and events have nothing to wait for.
"""

import contextlib
import copy
import logging
import os
import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Install every stand-in for the life of the process; a second call does nothing."""
    global _installed
    if _installed:
        return
    # Megatron compiles dozens of small functions at import; here each would need a C++ compiler.
    # First of all, since the compiler, when loaded, makes an inventory of torch.cuda's functions.
    torch.compiler.set_stance("force_eager")
    _stand_in_for_torch_cuda()
    _stand_in_for_collectives()
    _stand_in_for_data_loader()
    CudaToCpu().__enter__()
    _stand_in_for_megatron()
    _installed = True


class CudaToCpu(TorchFunctionMode):
    """Place on the CPU what a torch call asks to place on a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.record_stream):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping and the optimizers compare this name with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return func(*(_on_cpu(argument) for argument in args), **kwargs)


def _on_cpu(value):
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class _Stream:
    """A CUDA stream on which everything has already happened."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def _nothing_to_do(self, *args, **kwargs):
        return None

    synchronize = wait_stream = wait_event = _nothing_to_do

    def record_event(self, event=None):
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True


class _Event:
    """A CUDA event: complete at once, with the wall clock for `elapsed_time` (milliseconds)."""

    def __init__(self, *args, **kwargs):
        self._recorded_at = 0.0

    def record(self, stream=None):
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return (later._recorded_at - self._recorded_at) * 1000.0

    def query(self) -> bool:
        return True

    def wait(self, stream=None):
        return None

    def synchronize(self):
        return None


class _MemoryStats(dict):
    """Memory figures by name, all zero: there is no device memory to report."""

    def __missing__(self, name):
        return 0


def _stand_in_for_torch_cuda() -> None:
    stream = _Stream()

    # Makers, not functions: the compiler lists torch.cuda's functions by identity, anew whenever
    # something clears its cache, and stops at one object under two names with different rules.
    def nothing():
        return lambda *args, **kwargs: None

    def zero():
        return lambda *args, **kwargs: 0

    stand_ins = {
        # Model parallel groups and CUDA seeds are set up only where this is above zero.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        # Given to `device=` all over Megatron; a device, not an index, so that it needs no mode.
        "current_device": lambda: _CPU,
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "device": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "set_stream": nothing(),
        "is_current_stream_capturing": lambda: False,
        # Compute capability 8.0 is the least that Megatron accepts everywhere.
        "get_device_properties": lambda *args: SimpleNamespace(
            name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1
        ),
        "get_device_capability": lambda *args: (8, 0),
        "get_device_name": lambda *args: "cpu",
        # One generator serves both names: CPU tensors draw from the CPU generator.
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "memory_allocated": zero(),
        "max_memory_allocated": zero(),
        "memory_reserved": zero(),
        "max_memory_reserved": zero(),
        "device_memory_used": zero(),
        "reset_peak_memory_stats": nothing(),
        "memory_stats": lambda *args, **kwargs: _MemoryStats(),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.random.get_rng_state = stand_ins["get_rng_state"]
    torch.cuda.random.set_rng_state = stand_ins["set_rng_state"]


def _stand_in_for_collectives() -> None:
    """Give gloo the AVG reduction, which NCCL alone has, as a sum and a division."""
    distributed = torch.distributed
    all_reduce = distributed.all_reduce

    def all_reduce_with_average(tensor, op=distributed.ReduceOp.SUM, group=None, async_op=False):
        if op != distributed.ReduceOp.AVG:
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        all_reduce(tensor, op=distributed.ReduceOp.SUM, group=group)
        tensor /= distributed.get_world_size(group)
        return None

    distributed.all_reduce = all_reduce_with_average


def _stand_in_for_data_loader() -> None:
    """Keep DataLoader from drawing on the generator that dropout uses, and from pinning memory.

    A loader draws its workers' seed from the CPU generator, which here is the CUDA one too. Only
    tensor rank 0 has a loader, and a resumed run builds it after it has restored the generator:
    ranks would drop different elements, and a resumed run others than the run it continues.
    """
    data_loader = torch.utils.data.DataLoader
    iterate = data_loader.__iter__

    def iterate_apart(self):
        self.pin_memory = False
        with torch.random.fork_rng(devices=[]):
            return iterate(self)

    data_loader.__iter__ = iterate_apart


def _stand_in_for_megatron() -> None:
    """Replace the Megatron functions that assert CUDA or reach below `torch.cuda`."""
    import megatron.training.training as training_loop
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer import dot_product_attention, torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    initialize_megatron = training_loop.initialize_megatron

    def initialize_without_cuda(*args, **kwargs):
        return initialize_megatron(*args, **{**kwargs, "allow_no_cuda": True})

    # pretrain() does not pass allow_no_cuda on.
    training_loop.initialize_megatron = initialize_without_cuda
    # It warms up the fused functions that the CPU flags turn off.
    training_loop.set_jit_fusion_options = lambda *args, **kwargs: None

    # The tracker sets its states on torch.cuda.default_generators.
    tensor_parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(
        state
    )

    # It warns, at every fork, that the CPU generator moved: there it is the one that was forked.
    logging.getLogger(tensor_parallel_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    _allow_torch_norm_under_sequence_parallelism(torch_norm)
    _allow_packed_sequences(dot_product_attention.DotProductAttention)

    to_cpu = moe_utils.maybe_move_tensor_to_cpu

    def to_cpu_from_cpu(tensor, as_numpy=False, record_stream=False):
        # Upstream converts to numpy only what it moved, and here nothing moves.
        tensor = to_cpu(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_cpu_from_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu_from_cpu


def _allow_torch_norm_under_sequence_parallelism(torch_norm) -> None:
    """Let `WrappedTorchNorm`, the local implementation's norm, be built under sequence parallelism.

    Upstream refuses because torch's norms do not mark their parameters; marked, their gradients are
    summed over the tensor parallel ranks like those of the fused norms.
    """
    wrapped = torch_norm.WrappedTorchNorm
    build = wrapped.__new__

    def build_marked(cls, config, hidden_size, *args, **kwargs):
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = build(cls, unsharded, hidden_size, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    wrapped.__new__ = staticmethod(build_marked)


def _allow_packed_sequences(attention) -> None:
    """Let `DotProductAttention` take packed sequences, which upstream leaves to Transformer Engine.

    All documents of the microbatch lie behind each other; a mask keeps each token to earlier tokens
    of its own document. Quadratic in the packed length, as the local attention is anyway.
    """
    forward = attention.forward

    def forward_packed(self, query, key, value, attention_mask, *args, **kwargs):
        packed = kwargs.pop("packed_seq_params", None)
        if packed is not None:
            # [t, heads, dim] -> [t, 1, heads, dim]; the caller reshapes [t, 1, h] itself.
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            attention_mask = _mask_other_documents(packed.cu_seqlens_q, query.shape[0])
        return forward(self, query, key, value, attention_mask, *args, **kwargs)

    attention.forward = forward_packed


def _mask_other_documents(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return [1, 1, t, t], True where a token must not look."""
    positions = torch.arange(num_tokens)
    document = torch.searchsorted(cu_seqlens, positions.to(cu_seqlens.dtype), right=True)
    is_visible = (document[:, None] == document) & (positions[:, None] >= positions)
    return ~is_visible[None, None]
