"""What the loss needs through a run besides logits and labels: objective, cost embedding, process
group."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import get_args, get_tokenizer, print_rank_last
from torch import Tensor

from megatron_emo.config import OUTPUT_LAYER
from megatron_emo.cost_embedding import (
    adaptive_cost_embedding,
    load_cost_embedding_shard,
)
from megatron_emo.cost_embedding.narrow import DTYPES, narrow_rows, narrow_rows_checked
from megatron_emo.loss.fused_linear import bytes_kept_with_logits
from megatron_emo.loss.statistics import LossOutput
from megatron_emo.objectives import Objective, blend_with_mle
from megatron_emo.training.arguments import EmoConfig, fused_path_obstacle


class LossState:
    """One per process and run; handed to `GPTModel.forward` as `output_processor_context`.

    The table lies here and not in the model: Float16Module would cast a buffer, and a
    vocabulary-sharded buffer in a checkpoint comes back as rank 0's shard on every rank.
    """

    def __init__(self, config: EmoConfig) -> None:
        self.config = config
        self.vocab_size: int = get_tokenizer().vocab_size
        """Without padding."""
        self.last_output: LossOutput | None = None
        """The results of the newest forward on this rank; [s, b] each."""
        self._objective = config.build_objective()
        self._table: Tensor | None = None
        self._table_key: Any = None
        self._auto_path: str | None = None

    @property
    def tp_group(self) -> torch.distributed.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def objective(self) -> Objective:
        """Return the objective with its share at the current iteration."""
        # Megatron counts finished iterations; the one under way is the next.
        return blend_with_mle(
            self._objective, self.config.schedule.share(_finished_iterations() + 1)
        )

    def cost_embedding(self, output_weight: Tensor, is_training: bool) -> Tensor | None:
        """Return this rank's unit rows [V/tp, D], None without a cost embedding.

        A file is read once, at the first call; the live head is normalised once per optimizer step,
        which all microbatches of the step share.

        Args:
            output_weight: the head's shard [V/tp, h].
            is_training: a step's weights differ from those evaluated after it.
        """
        if self.config.cost_embedding is None:
            return None
        source = self.config.cost_embedding.source
        live = source == OUTPUT_LAYER
        key = (_finished_iterations(), is_training) if live else source
        if key != self._table_key:
            self._table = None  # free the old one first
            start = self.tp_group.rank() * output_weight.shape[0]
            if live:
                rows = adaptive_cost_embedding(
                    output_weight, vocab_start_index=start, vocab_size=self.vocab_size
                )
            else:
                rows = load_cost_embedding_shard(
                    source,
                    vocab_start_index=start,
                    vocab_end_index=start + output_weight.shape[0],
                    vocab_size=self.vocab_size,
                    device=output_weight.device,
                )
            self._table = self._narrowed(rows, is_first=self._table_key is None)
            self._table_key = key
        return self._table

    def _narrowed(self, rows: Tensor, is_first: bool) -> Tensor:
        """Return rows in the dtype asked for; its error is measured at the first table alone."""
        name = self.config.cost_embedding.dtype
        if name == "fp32" or not is_first:
            return narrow_rows(rows, DTYPES[name])
        narrow, error = narrow_rows_checked(rows, DTYPES[name], "--emo-cost-dtype")
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
            kept = bytes_kept_with_logits(num_tokens, num_distinct, partition_vocab_size, itemsize)
            obstacle = fused_path_obstacle(get_args())
            fits = kept <= workspace_mb << 20
            self._auto_path = "logits" if fits or obstacle else "recompute"
            reason = f"logits and cost rows take up to {kept / 2**20:.0f} MiB of {workspace_mb}"
            reason += f", and {obstacle} needs the output layer" if obstacle and not fits else ""
            print_rank_last(f"> loss path {self._auto_path}: {reason}")
        return self._auto_path

    def statistics(self, loss_mask: Tensor) -> dict[str, Tensor]:
        """Return name -> [sum over counted tokens] of the newest forward, for the log.

        Args:
            loss_mask: [b, s] as the data loader gave it.
        """
        out = self.last_output
        mask = loss_mask.transpose(0, 1)
        counted = mask != 0
        sums = {"lm loss": (out.mle_loss * mask).sum()}
        if self.config.cost_embedding is not None:
            sums["emo loss"] = (out.emo_loss * mask).sum()
        sums["objective"] = (out.loss.detach() * mask).sum()
        sums["objective weight"] = (out.weight * mask).sum()
        capped = (out.weight >= self._objective.weight_max) & counted
        sums["objective weight capped"] = (capped * mask).sum()
        sums["entropy"] = (out.entropy * mask).sum()
        return sums

    def weight_max(self) -> Tensor:
        """Return the largest dynamic weight of the newest forward; masked tokens hold 0."""
        return self.last_output.weight.amax()


def _finished_iterations() -> int:
    args = get_args()
    # curr_iteration is set by the training loop alone; a run that only evaluates has iteration.
    return max(getattr(args, "curr_iteration", 0), args.iteration)
