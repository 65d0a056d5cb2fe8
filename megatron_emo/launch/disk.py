"""Whether the next checkpoint has room, and its folder can be written."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from megatron_emo.launch.environment import format_bytes
from megatron_emo.launch.exit_codes import DiskError

FLAG = "--emo-disk-checkpoints"


def check_save_folder(
    folder: str | Path, *, num_checkpoints: float, estimated_bytes: float
) -> None:
    """Create a run's --save folder, write a small file to it, and look at the space left.

    A checkpoint's size is that of the newest whole one in the folder, or `estimated_bytes` if there
    is none. Quotas are not seen.

    Args:
        num_checkpoints: room for how many is asked for; 0 for none.

    Raises:
        DiskError: naming the folder, what was found and what was expected.
    """
    folder = Path(folder)
    _check_writable(folder)
    newest = newest_checkpoint_bytes(folder)
    size, origin = (
        (newest, "like the newest one there") if newest else (estimated_bytes, "estimated")
    )
    needed, free = num_checkpoints * size, free_bytes(folder)
    if free < needed:
        raise DiskError(
            f"--save {folder}: {format_bytes(free)} free, expected {format_bytes(needed)}: "
            f"room for {num_checkpoints:g} checkpoints of {format_bytes(size)} ({origin}); "
            f"make room, or set {FLAG}"
        )


def free_bytes(folder: str | Path) -> int:
    """Return the bytes that this user may still write to the folder's file system."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight_") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"--save {folder}: cannot be written: {reason}") from error


def newest_checkpoint_bytes(folder: Path) -> int:
    """Return the size of the newest iteration's folder, 0 if there is none with an index.

    The index is written last, so that what has none was cut off.
    """
    for candidate in sorted(folder.glob("iter_*"), reverse=True):
        if (candidate / ".metadata").is_file():
            return sum(file.stat().st_size for file in candidate.rglob("*") if file.is_file())
    return 0


def estimate_checkpoint_bytes(args: argparse.Namespace) -> float:
    """Return about what a checkpoint of the model that Megatron's flags describe takes, in bytes.

    Weights in the run's dtype; with the optimizer also two fp32 moments, and fp32 master weights
    beside 16-bit ones. Norms and biases, well below a percent, are left out.
    """
    is_16_bit = args.bf16 or args.fp16
    per_parameter = 2 if is_16_bit else 4
    if not args.no_save_optim:
        per_parameter += 12 if is_16_bit else 8
    return per_parameter * estimate_num_parameters(args)


def estimate_num_parameters(args: argparse.Namespace) -> float:
    """Return about how many parameters the model has; latent attention and hybrids are taken for
    plain layers."""
    h = args.hidden_size
    heads, channels = args.num_attention_heads, args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else heads
    attention = 2 * h * channels * (heads + groups)
    matrices = 3 if args.swiglu else 2
    dense = matrices * h * args.ffn_hidden_size
    if args.num_experts:
        width = args.moe_ffn_hidden_size or args.ffn_hidden_size
        shared = args.moe_shared_expert_intermediate_size or 0
        expert_layer = matrices * h * (args.num_experts * width + shared) + h * args.num_experts
    else:
        expert_layer = dense
    num_expert_layers = _num_expert_layers(args)
    layers = args.num_layers * attention + num_expert_layers * expert_layer
    layers += (args.num_layers - num_expert_layers) * dense
    embeddings = 2 if args.untie_embeddings_and_output_weights else 1
    positions = args.max_position_embeddings * h
    learned = args.position_embedding_type == "learned_absolute"
    return layers + embeddings * args.padded_vocab_size * h + (positions if learned else 0)


def _num_expert_layers(args: argparse.Namespace) -> int:
    if not args.num_experts:
        return 0
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return len(range(0, args.num_layers, frequency))
    return sum(1 for is_expert in frequency if is_expert)
