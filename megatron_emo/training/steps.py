"""The functions `megatron.training.pretrain` calls: batches, the forward step, the loss, the
datasets.

They follow Megatron-LM's pretrain_gpt.py (core 0.19), which is not part of the wheel, with the loss
of this package in the place of its cross-entropy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_emo.training import finite
from megatron_emo.training.microbatch import Microbatch
from megatron_emo.training.output_processor import emo_output_processor
from megatron_emo.training.state import LossState

_BATCH_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "labels",
    "local_cp_size",
    "loss_mask",
    "max_seqlen",
    "position_ids",
    "tokens",
)
_SPIKE_FACTOR = 10
"""A loss this many times the largest seen so far counts as a spike."""

_straggler_timer = StragglerDetector()


def _has_mtp(args: Any, vp_stage: int | None) -> bool:
    config = core_transformer_config_from_args(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, Any]:
    """Return the microbatch of this rank: read on TP rank 0, broadcast, cut along the sequence for
    CP.

    Keys `_BATCH_KEYS`, None where this pipeline stage does not need an entry, and host_targets: on
    TP rank 0 of GPUs without CP the labels on the host, -1 where the mask is 0.
    """
    args = get_args()
    is_packed = args.sft or args.dataloader_inter_document_masking
    has_mtp = _has_mtp(args, vp_stage)
    is_needed = has_mtp or is_first_or_last_pipeline_stage(vp_stage)
    if not is_needed and not is_packed:
        return dict.fromkeys((*_BATCH_KEYS, "host_targets"))

    batch: dict[str, Any] = {}
    host_targets = None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        batch = next(data_iterator)
        if torch.cuda.is_available():
            check_labels(batch)
            host_targets = torch.where(batch["loss_mask"] != 0, batch["labels"], -1)
        for key in _BATCH_KEYS:
            value = batch.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=is_packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not is_needed:
        kept = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
        batch = {key: batch[key] if key in kept else None for key in _BATCH_KEYS}
        return batch | {"host_targets": None}
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=parallel_state.get_context_parallel_group(),
        hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )
    return batch | {"host_targets": host_targets}


def check_labels(batch: dict[str, Tensor]) -> None:
    """Raise ValueError for counted labels outside the vocabulary, while the batch is on the
    host."""
    labels, vocab_size = batch["labels"], get_tokenizer().vocab_size
    outside = ((labels < 0) | (labels >= vocab_size)) & (batch["loss_mask"] != 0)
    if outside.any():
        raise ValueError(
            f"labels: expected ids in [0, {vocab_size}) where the loss mask is not 0, got "
            f"{int(outside.sum())} outside, the first {int(labels[outside][0])}; is the data "
            "tokenized with this run's tokenizer?"
        )


def _packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    if batch["cu_seqlens"] is None:
        return None
    cu_seqlens, padded = batch["cu_seqlens"].squeeze(0), batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)
    # Attention wants the padded lengths in both places where there are any.
    lengths = cu_seqlens if padded is None else padded
    local_cp_size = batch["local_cp_size"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=int(batch["max_seqlen"].item()),
        max_seqlen_kv=int(batch["max_seqlen"].item()),
        local_cp_size=None if local_cp_size is None else int(local_cp_size.item()),
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=get_args().seq_length,
    )


def forward_step(
    data_iterator: Iterator | None,
    model: Any,
    return_schedule_plan: bool = False,
    *,
    state: LossState,
) -> tuple[Any, partial]:
    """Return (model output, loss function) for one microbatch; `state` is bound by the entry
    point."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_timer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        packed_seq_params = _packed_seq_params(batch)
        has_head = get_attr_wrapped_model(model, "post_process")
        microbatch = Microbatch(state, batch if has_head else None)
    timers("batch-generator").stop()

    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    head = {
        "labels": batch["labels"],
        "loss_mask": batch["loss_mask"],
        "output_processor": emo_output_processor,
        "output_processor_context": microbatch,
    }
    finish = partial(loss_func, batch["loss_mask"], microbatch=microbatch)
    with _straggler_timer:
        if return_schedule_plan:
            return model.build_schedule_plan(*inputs, **head), finish
        return model(*inputs, packed_seq_params=packed_seq_params, **head), finish


def loss_func(
    loss_mask: Tensor, output_tensor: Tensor, *, microbatch: Microbatch
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, number of tokens, report) of a microbatch.

    The report holds [sum, count] pairs, which Megatron adds over microbatches and data-parallel
    ranks before it divides: 'lm loss' (cross-entropy in nats, so that runs of different objectives
    compare), 'emo loss' (expected cost), 'objective' (what is trained), 'objective weight' (mean of
    the dynamic weight), 'objective weight capped' (share of tokens at the cap), 'entropy' of q in
    nats, and 'objective weight max', the largest weight of each microbatch, averaged over
    microbatches.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    report = {
        name: torch.stack([value.float(), count.float()])
        for name, (value, count) in microbatch.report(loss_mask).items()
    }
    finite.note_losses(report)
    _validate(loss)
    return loss, num_tokens, report


def _validate(loss: Tensor) -> None:
    """Let Megatron's rerun machine judge this rank's loss before it is mixed with the others'."""
    args, machine = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "NaN in the local forward loss", True))
        checks.append((torch.isinf, "infinity in the local forward loss", True))
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss")
        checks.append((is_spike, "spiky loss", False))
    for rejection, message, fatal in checks:
        # The forward pass is deterministic: a rerun must give the same number.
        machine.validate_result(
            result=loss, rejection_func=rejection, message=message, tolerance=0.0, fatal=fatal
        )


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    settings: dict[str, Any] = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "inter_document_masking": args.dataloader_inter_document_masking,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "sequences_per_dataset": sequences_per_dataset,
    }
    same_name = (
        "split multiple_validation_sets full_validation num_dataset_builder_threads mmap_bin_files "
        "reset_position_ids reset_attention_mask eod_mask_loss object_storage_cache_path "
        "mid_level_dataset_surplus allow_ambiguous_pad_tokens context_parallel_size "
        "data_parallel_size hybrid_context_parallel"
    )
    settings.update({name: getattr(args, name) for name in same_name.split()})
    if not args.fim_data:
        return GPTDatasetConfig(**settings)
    fim = "rate spm_rate split_sample fragment_rate no_prefix"
    settings.update({f"fim_{name}": getattr(args, f"fim_{name}") for name in fim.split()})
    tokens = "prefix middle suffix pad eod"
    settings["fim_extra_tokens"] = {t: getattr(args, f"fim_{t}_token") for t in tokens.split()}
    return GPTFIMDatasetConfig(**settings)


def _builds_dataset(vp_stage: int | None, is_packed: bool) -> bool:
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    return is_packed or is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(get_args(), vp_stage)


def train_valid_test_datasets_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple:
    """Return Megatron's (train, validation, test) datasets of the sizes asked for."""
    args = get_args()
    if args.sft:
        dataset_class = SFTDataset
    elif args.mock_data:
        dataset_class = MockGPTDataset
    else:
        dataset_class = GPTFIMDataset if args.fim_data else GPTDataset
    print_rank_0("> building train, validation and test datasets ...")
    is_built_here = partial(_builds_dataset, vp_stage, args.sft)
    return BlendedMegatronDatasetBuilder(
        dataset_class, num_samples, is_built_here, _dataset_config(args)
    ).build()


# Megatron then calls it on every rank and lets the builder divide the work.
train_valid_test_datasets_provider.is_distributed = True


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Return the pipeline ranks that hold the word embedding: the first, a tied last, and MTP's."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)
