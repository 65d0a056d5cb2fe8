"""Megatron's own `pretrain()` on a machine without CUDA: what entry points call before they parse.

`enable(argv)` is all of it. Nothing here acts on import, nor where CUDA is available. The stand-ins
themselves are in `cpu_stand_ins.py`.
"""

import itertools
import os

import torch

# Flags without a value: each turns off a kernel that exists for CUDA only, and none of them changes
# what is computed.
_CPU_SWITCHES = (
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--disable-jit-fuser",
)

# Flags with a value: the CPU value computes the same mathematics as any other value does on a GPU,
# so a command line written for GPUs is overridden rather than refused.
_CPU_VALUES = {
    "--distributed-backend": "gloo",
    "--transformer-impl": "local",
    "--attention-backend": "unfused",
}

# Flags whose effect cannot be had without CUDA: to pass over them would run something else.
_CUDA_ONLY = {
    "--context-parallel-size": "the local attention has none",
    "--cuda-graph-impl": "there are no CUDA graphs",
    "--enable-cuda-graph": "there are no CUDA graphs",
    "--fp4-format": "FP4 products need Transformer Engine",
    "--fp8-format": "FP8 products need Transformer Engine",
    "--moe-grouped-gemm": "the grouped product is a CUDA kernel",
    "--moe-permute-fusion": "the permutation kernel is in Transformer Engine",
    "--tp-comm-overlap": "user buffers need Transformer Engine",
    "--use-flash-attn": "flash attention is a CUDA kernel",
    "--use-megatron-fsdp": "it drives CUDA streams",
    "--use-persistent-ckpt-worker": "its process looks for a device of its own",
    "--use-torch-fsdp2": "it drives CUDA streams",
}

# Values by which a flag above asks for nothing.
_OFF = {"--context-parallel-size": "1", "--cuda-graph-impl": "none"}

_announced = False


def is_needed() -> bool:
    """True where torch finds no CUDA device."""
    return not torch.cuda.is_available()


def enable(argv: list[str]) -> list[str]:
    """Make Megatron run on CPU in this process and return `argv` with the flags that takes.

    Call it before `parse_and_validate_args`, and parse the list it returns. Where CUDA is available
    `argv` comes back as it is and nothing is installed. May be called again, for another run in the
    same process. Installs for the life of the process: stand-ins for `torch.cuda`, a torch function
    mode that places `cuda` tensors on the CPU, and RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT where
    neither torchrun nor an initialised process group gave them. No collective.

    Raises:
        ValueError: a flag in `argv` asks for something that only CUDA can do.
    """
    if not is_needed():
        return argv
    cpu_argv, overridden = cpu_arguments(argv)
    set_launch_environment()

    from megatron_emo.training import cpu_stand_ins

    cpu_stand_ins.install()
    _announce(overridden)
    return cpu_argv


def cpu_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return `argv` followed by the CPU flags, and the flags whose typed value is overridden."""
    typed = _typed_values(argv)
    for flag, reason in _CUDA_ONLY.items():
        if flag in typed and typed[flag] != _OFF.get(flag):
            raise ValueError(f"{flag} cannot be used without CUDA: {reason}; remove the flag")
    overridden = [
        f"{flag} {typed[flag]} -> {value}"
        for flag, value in _CPU_VALUES.items()
        if typed.get(flag, value) != value
    ]
    # argparse keeps the last of a repeated flag, so what is appended wins.
    values = [word for pair in _CPU_VALUES.items() for word in pair]
    return [*argv, *values, *_CPU_SWITCHES], overridden


def _typed_values(argv: list[str]) -> dict[str, str]:
    """Return flag -> value for `--flag v` and `--flag=v`, and "" for a flag without a value."""
    typed = {}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            typed[flag] = value if equals else "" if following.startswith("--") else following
    return typed


def set_launch_environment() -> None:
    """Fill in the variables torchrun would set, from the process group or else for one process.

    Megatron takes its rank and world size from the environment alone. MASTER_PORT 0 lets the store
    of a one-process run pick a free port itself, so that runs side by side cannot collide.
    """
    # Tensor parallel runs are refused without it, for the sake of CUDA's order of kernels.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        for name, value in local.items():
            os.environ.setdefault(name, str(value))
        return
    one_process = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(one_process)


def _announce(overridden: list[str]) -> None:
    """Say on rank 0, once a process, that there is no CUDA; say what is overridden at each run."""
    global _announced
    if os.environ["RANK"] != "0":
        return
    if not _announced:
        print("running without CUDA: Megatron on CPU tensors over gloo", flush=True)
        _announced = True
    if overridden:
        print(f"running without CUDA: overridden {', '.join(overridden)}", flush=True)
