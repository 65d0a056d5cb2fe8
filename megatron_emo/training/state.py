"""What the loss needs through a run besides logits and labels: objective, cost embedding, process
group."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training import get_args, get_tokenizer, print_rank_0, print_rank_last
from torch import Tensor

from megatron_emo.config import OUTPUT_LAYER
from megatron_emo.cost_embedding import (
    adaptive_cost_embedding,
    load_cost_embedding_shard,
)
from megatron_emo.cost_embedding.narrow import DTYPES, narrow_rows, narrow_rows_checked
from megatron_emo.cost_embedding.reduce import reduce_rows
from megatron_emo.loss.fused_linear import auto_path
from megatron_emo.loss.statistics import Shard, make_shard
from megatron_emo.objectives import Objective, blend_with_mle
from megatron_emo.training.arguments import EmoConfig, output_layer_obstacle


class LossState:
    """One per process and run.

    The table lies here and not in the model: Float16Module would cast a buffer, and a
    vocabulary-sharded buffer in a checkpoint comes back as rank 0's shard on every rank.
    """

    def __init__(self, config: EmoConfig) -> None:
        self.config = config
        args = get_args()
        self.vocab_size: int = get_tokenizer().vocab_size
        """Without padding."""
        self.needs_output_layer = bool(output_layer_obstacle(args))
        """Whether the layer's own product has to be taken."""
        self.shares_host_targets: bool = args.context_parallel_size == 1
        """Whether labels on the host are those of the batch; CP cuts them on the device."""
        self._objective = config.build_objective()
        self._table: Tensor | None = None
        self._table_key: Any = None
        self._auto_path: str | None = None
        if config.loss_path.deterministic_blocks is not None:
            _check_padded_vocabulary(args, config.loss_path.deterministic_blocks)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @functools.cached_property
    def host_group(self) -> dist.ProcessGroup | None:
        """The ranks of tp_group, for tensors on the host; None for one rank."""
        if self.tp_group.size() == 1:
            return None
        ranks = dist.get_process_group_ranks(self.tp_group)
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    @property
    def weight_cap(self) -> float:
        """Cap of the objective's dynamic weight."""
        return self._objective.weight_max

    def shard(self) -> Shard:
        """Return where this rank's rows of the vocabulary lie."""
        return make_shard(get_args().padded_vocab_size // self.tp_group.size(), self.tp_group)

    def objective(self) -> Objective:
        """Return the objective with its share at the current iteration."""
        # Megatron counts finished iterations; the one under way is the next.
        return blend_with_mle(
            self._objective, self.config.schedule.share(_finished_iterations() + 1)
        )

    def cost_embedding(self, output_weight: Tensor, is_training: bool) -> Tensor | None:
        """Return this rank's unit rows [V/tp, D], None without a cost embedding.

        The live head is normalised once per optimizer step, which all microbatches of the step
        share.

        Args:
            output_weight: the head's shard [V/tp, h].
            is_training: a step's weights differ from those evaluated after it.
        """
        config = self.config.cost_embedding
        if config is None or config.source != OUTPUT_LAYER:
            return self.file_table(output_weight.device)
        key = (_finished_iterations(), is_training)
        if key != self._table_key:
            self._table = None  # free the old one first
            rows = adaptive_cost_embedding(
                output_weight,
                vocab_start_index=self.shard().vocab_start_index,
                vocab_size=self.vocab_size,
            )
            self._table = self._narrowed(rows, is_first=self._table_key is None)
            self._table_key = key
        return self._table

    def file_table(self, device: torch.device) -> Tensor | None:
        """Return this rank's unit rows [V/tp, D] of a table that is a file, read at the first call;
        None for the live head, or without a cost embedding."""
        config = self.config.cost_embedding
        if config is None or config.source == OUTPUT_LAYER:
            return None
        if self._table is None:
            start, num_rows = self.shard()[:2]
            rows = load_cost_embedding_shard(
                config.source,
                vocab_start_index=start,
                vocab_end_index=start + num_rows,
                vocab_size=self.vocab_size,
                device=device,
            )
            self._table = self._narrowed(self._reduced(rows), is_first=True)
        return self._table

    def _reduced(self, rows: Tensor) -> Tensor:
        """Return rows with the columns asked for; collective over the tensor-parallel group."""
        dim, found = self.config.cost_embedding.dim, rows.shape[1]
        if dim is None or dim == found:
            return rows
        rows, error = reduce_rows(rows, dim, self.tp_group, flag="--emo-cost-dim")
        print_rank_last(
            f"> cost table reduced to {dim} of {found} columns: over {error.num_pairs} pairs of "
            f"rows cosines are off by {error.rms:.2e} (root mean square), at most {error.max:.2e}"
        )
        return rows

    def _narrowed(self, rows: Tensor, is_first: bool) -> Tensor:
        """Return rows in the dtype asked for; its error is measured at the first table alone."""
        name = self.config.cost_embedding.dtype
        if name == "fp32" or not is_first:
            return narrow_rows(rows, DTYPES[name])
        narrow, error = narrow_rows_checked(rows, DTYPES[name], "--emo-cost-dtype", self.tp_group)
        print_rank_last(f"> cost table in {name}: costs are off by {error:.2%} (root mean square)")
        return narrow

    def loss_path(self, num_tokens: int, partition_vocab_size: int, itemsize: int) -> str:
        """Return logits, recompute or forward; auto is decided at the first call, and printed."""
        path, workspace_mb = self.config.loss_path.path, self.config.loss_path.workspace_mb
        if path != "auto":
            return path
        if self._auto_path is None:
            # At worst all targets of a microbatch differ.
            num_distinct = num_tokens if self.config.cost_embedding is not None else 0
            if self.config.loss_path.deterministic_blocks is not None:
                # One path at any tensor-parallel size: by what one rank would keep.
                partition_vocab_size *= self.tp_group.size()
            self._auto_path, kept = auto_path(
                num_tokens, num_distinct, partition_vocab_size, itemsize, workspace_mb
            )
            print_rank_last(
                f"> loss path {self._auto_path}: logits and cost rows take up to "
                f"{kept / 2**20:.0f} MiB of --emo-workspace-mb {workspace_mb}"
            )
        return self._auto_path


def _check_padded_vocabulary(args: argparse.Namespace, num_blocks: int) -> None:
    """Raise ValueError where the padded vocabulary has no such blocks; print it otherwise, since
    runs with other padding compute another loss."""
    padded, num_ranks = args.padded_vocab_size, args.tensor_model_parallel_size
    divisible_by = args.make_vocab_size_divisible_by
    if padded % num_blocks:
        raise ValueError(
            f"--emo-deterministic-tp: expected a padded vocabulary divisible by "
            f"--emo-deterministic-blocks {num_blocks}, got {padded}, the vocabulary rounded up to "
            f"a multiple of --make-vocab-size-divisible-by {divisible_by} times "
            f"--tensor-model-parallel-size {num_ranks}; it must be the same at every size, so "
            f"keep that product the same, a multiple of {num_blocks}"
        )
    print_rank_0(
        f"> loss over {num_blocks} vocabulary blocks of {padded // num_blocks}: the same bits at "
        f"tensor-parallel sizes that divide {num_blocks}, where the padded vocabulary is {padded} "
        f"(--make-vocab-size-divisible-by {divisible_by} times {num_ranks} ranks)"
    )


def _finished_iterations() -> int:
    args = get_args()
    # curr_iteration is set by the training loop alone; a run that only evaluates has iteration.
    return max(getattr(args, "curr_iteration", 0), args.iteration)
