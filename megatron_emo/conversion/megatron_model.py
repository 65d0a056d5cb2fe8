"""A GPTModel in memory, in one process: built from saved arguments, filled, run and saved.

Megatron's own builder and checkpoint functions, on the CPU where torch finds no CUDA device. No
kernel fusion, no Transformer Engine: what is computed is what any training run of the same
arguments computes, up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.torch_dist import TRACKER, TensorReader, resolve_checkpoint_dir
from megatron_emo.training import compat, cpu
from megatron_emo.training.model_arguments import add_model_arguments, model_config_from_args

_PLAIN = (bool, int, float, str, torch.dtype, type(None))
_ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""Set by every model that is built; the next one, with another backend, refuses them."""

# The layout and the kernels of a run; none of them changes what the model computes.
_ONE_RANK = {
    **dict.fromkeys(
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
        "expert_model_parallel_size expert_tensor_parallel_size "
        "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards".split(),
        1,
    ),
    **dict.fromkeys(
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
        "virtual_pipeline_model_parallel_size pipeline_model_parallel_layout "
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
        "recompute_granularity recompute_method recompute_num_layers fp8 fp4 yaml_cfg spec "
        "te_precision_config_file hierarchical_context_parallel_sizes".split(),
        None,
    ),
    **dict.fromkeys(
        "sequence_parallel account_for_embedding_in_pipeline_split perform_initialization "
        "account_for_loss_in_pipeline_split gradient_accumulation_fusion masked_softmax_fusion "
        "bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion "
        "cross_entropy_loss_fusion moe_permute_fusion moe_grouped_gemm moe_router_fusion "
        "fp8_param_gather fp4_param_gather tp_comm_overlap enable_cuda_graph external_cuda_graph "
        "fine_grained_activation_offloading use_te_activation_func overlap_p2p_comm "
        "use_transformer_engine_op_fuser moe_shared_expert_overlap "
        "overlap_moe_expert_parallel_comm bf16 fp16".split(),
        False,
    ),
    "cp_comm_type": ["p2p"],
    "cuda_graph_impl": "none",
    "moe_token_dispatcher_type": "allgather",
    "no_persist_layer_norm": True,
    "transformer_impl": "local",
}

# Names in the arguments of older versions, and those of 0.19.
_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}

# Parts of a Megatron model that no Hugging Face architecture named here has.
_REFUSED = {
    "mtp_num_layers": "--mtp-num-layers",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
    "heterogeneous_layers_config_path": "--heterogeneous-layers-config-path",
}


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Make this process one rank of Megatron's, as long as the block lasts.

    Wraps every call of the functions below. Uses a gloo group of one rank, the default one if there
    is one; needs no torchrun and no port. Afterwards the groups that were made here are gone, and
    the environment and the generators are as before. What `training.cpu` puts in the place of
    `torch.cuda`, where there is no CUDA, stays for the life of the process. Blocks may follow each
    other and lie within each other.

    Raises:
        RuntimeError: the process is one of several ranks.
    """
    from torch.distributed import (
        HashStore,
        destroy_process_group,
        get_world_size,
        init_process_group,
        is_initialized,
    )

    world_size = get_world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise RuntimeError(f"WORLD_SIZE {world_size}: expected 1, conversion runs in one process")
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(_restore_environment, dict(os.environ))
        for name in _ATTENTION:
            os.environ.pop(name, None)
        if not is_initialized():
            backend = "gloo" if cpu.is_needed() else "cpu:gloo,cuda:nccl"
            init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            at_exit.callback(destroy_process_group)
        cpu.enable([])
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        compat.apply_repairs()
        at_exit.enter_context(
            torch.random.fork_rng([] if cpu.is_needed() else [torch.cuda.current_device()])
        )
        if not parallel_state.model_parallel_is_initialized():
            at_exit.callback(compat.reset_megatron_state)
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(0)  # layers ask for its states, dropout or not
        yield


def build_model(args: argparse.Namespace, vocab_size: int | None = None) -> torch.nn.Module:
    """Return a GPTModel of Megatron's local layers for a run's arguments, its weights unset.

    Inside `one_process()`. Parameters are in `args.params_dtype`, or what its bf16 and fp16 say.

    Args:
        args: a checkpoint's arguments, also of other versions: what is missing has Megatron's
            default, and of what is no number, string or list of them the default is taken.
        vocab_size: rows of the embedding; by default `args.padded_vocab_size`.

    Raises:
        ConversionError: a part that cannot be converted, or no vocabulary size; names the flag.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    for name, flag in _REFUSED.items():
        if getattr(args, name, None):
            raise ConversionError(
                f"{flag} {getattr(args, name)}: expected none, it cannot be converted"
            )
    filled = _one_rank_arguments(args)
    filled.padded_vocab_size = vocab_size or filled.padded_vocab_size
    if not filled.padded_vocab_size:
        raise ConversionError(
            "--padded-vocab-size: not among the arguments, expected the rows to build"
        )
    config = model_config_from_args(filled)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    # As Megatron's mixed-precision wrapper does: torch's norms are built in fp32.
    return model.to(filled.params_dtype).eval()


def load_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | Path, iteration: int | None = None
) -> None:
    """Fill a model from a torch_dist checkpoint of any layout; its optimizer is not read.

    Inside `one_process()`. The embedding and the output layer may have fewer or more rows than the
    checkpoint, whose padding is then cut, or filled with zeros. In the model's dtype.

    Tensors alone are read, by `torch_dist`: Megatron's own `dist_checkpointing.load` unpickles the
    index and the common state, and so runs what a checkpoint from elsewhere asks for.

    Raises:
        FileNotFoundError, ValueError: as `torch_dist.resolve_checkpoint_dir` and `TensorReader`.
        ConversionError: a tensor that is missing, left over or of another shape, by name.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensorFactory,
        apply_factories,
        apply_factory_merges,
    )

    reader = TensorReader(resolve_checkpoint_dir(checkpoint_dir, iteration))
    sharded = _sharded_weights(model)
    _check_same_tensors(reader, sharded)
    factories = {k: item for k, item in sharded.items() if isinstance(item, ShardedTensorFactory)}
    apply_factories(sharded)
    loaded = dict_list_map_inplace(
        lambda item: _read_part(reader, item) if isinstance(item, ShardedTensor) else item, sharded
    )
    model.load_state_dict(apply_factory_merges(loaded, factories), strict=False)


def save_checkpoint(
    model: torch.nn.Module,
    checkpoint_dir: str | Path,
    args: argparse.Namespace,
    iteration: int | str = "release",
) -> Path:
    """Write a model's weights and arguments as torch_dist and return the iteration's folder.

    Inside `one_process()`. Readable by `--load` and `--pretrained-checkpoint` at any layout. Not
    atomic: give a folder that nothing reads yet.

    Args:
        iteration: a number, or "release", Megatron's word for weights without an optimizer.

    Raises:
        FileExistsError: the iteration's folder is there and not empty.
    """
    from megatron.core import dist_checkpointing

    name = iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"
    folder = Path(checkpoint_dir, name)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"checkpoint {folder}: expected an empty or no folder")
    folder.mkdir(parents=True, exist_ok=True)
    number = 0 if isinstance(iteration, str) else iteration
    # Of a run that writes digests with each save a checkpoint without them would be a cut one.
    args = copy.copy(args)
    if hasattr(args, "verify_integrity"):
        del args.verify_integrity
    common = {"args": args, "checkpoint_version": 3.0, "iteration": number}
    # With the empty `_extra_state` of each layer, which a run asks for.
    dist_checkpointing.save({"model": model.sharded_state_dict(), **common}, str(folder))
    Path(checkpoint_dir, TRACKER).write_text(str(iteration))
    return folder


@torch.no_grad()
def model_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return logits [b, s, V] in fp32 on the CPU for token ids [b, s], each row from position 0."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    return model(tokens, positions, None).float().cpu()


def params_dtype(args: argparse.Namespace) -> torch.dtype:
    """Return the dtype that a run of these arguments holds its parameters in."""
    dtype = getattr(args, "params_dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if getattr(args, "bf16", False):
        return torch.bfloat16
    return torch.float16 if getattr(args, "fp16", False) else torch.float32


def _one_rank_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Return Megatron's defaults, over them `args`, over them one rank without fused kernels."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    filled = add_model_arguments(parser).parse_args([])
    for name, value in vars(args).items():
        if _is_plain(value):
            setattr(filled, _RENAMED.get(name, name), value)
    if getattr(filled, "disable_bias_linear", False):
        filled.add_bias_linear = False
    if filled.use_rotary_position_embeddings:
        filled.position_embedding_type = "rope"
    has_gelu = not (filled.relu or filled.swiglu or filled.squared_relu or filled.quick_geglu)
    if has_gelu and filled.bias_gelu_fusion and filled.add_bias_linear:
        filled.openai_gelu = True  # the fused function, which is not the unfused one
    vars(filled).update(_ONE_RANK)
    filled.params_dtype = params_dtype(args)
    filled.use_cpu_initialization = cpu.is_needed()
    return filled


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _sharded_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return the model's sharded state dict without Transformer Engine's `_extra_state`."""
    sharded = model.sharded_state_dict()
    return {name: item for name, item in sharded.items() if not name.endswith("_extra_state")}


def _read_part(reader: TensorReader, item: Any) -> Tensor:
    """Return what a ShardedTensor stands for; zeros where a mismatch is allowed and nothing is."""
    depth = item.prepend_axis_num
    whole = reader.read(item.key, tuple(item.global_offset[:depth]))
    starts = item.global_offset[depth:]
    spans = zip(starts, item.local_shape, strict=True)
    part = whole[tuple(slice(start, start + size) for start, size in spans)]
    if part.shape == tuple(item.local_shape):
        return part
    filled = part.new_zeros(item.local_shape)
    filled[tuple(slice(size) for size in part.shape)] = part
    return filled


def _check_same_tensors(reader: TensorReader, sharded: dict[str, Any]) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import apply_factories

    expected = dict(sharded)
    apply_factories(expected)
    wanted = {item.key: item for item in _leaves(expected) if isinstance(item, ShardedTensor)}
    stored, where = reader.shapes, f"checkpoint {reader.folder}"
    missing = sorted(wanted.keys() - stored.keys())
    if missing:
        raise ConversionError(f"{where}: no tensors {missing}, which the model has")
    left = sorted(key for key in stored.keys() - wanted.keys() if _is_of_a_model(key))
    if left:
        raise ConversionError(f"{where}: the model has no parameters {left}")
    for key, item in wanted.items():
        if not item.allow_shape_mismatch and tuple(item.global_shape) != stored[key]:
            raise ConversionError(
                f"{where}: {key} has the shape {stored[key]}, expected "
                f"{tuple(item.global_shape)} from the arguments"
            )


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list):
        for part in item:
            yield from _leaves(part)
    else:
        yield item


def _is_of_a_model(key: str) -> bool:
    first = key.split(".")[0]
    is_other = first.startswith(("optimizer", "chained_", "rng_state", "rerun_state"))
    return not is_other and not key.endswith("_extra_state")


def _restore_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
