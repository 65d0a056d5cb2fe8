"""What one microbatch's forward step, output processor and loss function share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_emo.loss.statistics import LossOutput
from megatron_emo.loss.target_plan import (
    DEVICE_BUCKET,
    PlannedTargets,
    TargetPlan,
    plan_targets,
    share_targets,
)
from megatron_emo.training.state import LossState


class Microbatch:
    """The plan of its targets, made before the transformer runs, and the loss's results after it.

    Handed to `GPTModel.forward` as `output_processor_context`.
    """

    def __init__(self, state: LossState, batch: dict[str, Any] | None = None) -> None:
        """Plan a batch's targets and start fetching their rows of a table that is a file.

        Collectives over the tensor-parallel group: the all-reduce of `PlannedTargets`, under way
        when this returns, and on GPUs one broadcast between hosts.

        Args:
            batch: from `get_batch`; None where the head is on another pipeline stage.
        """
        self.state = state
        self.output: LossOutput | None = None
        """[s, b] each, once the loss was computed."""
        self._plan: TargetPlan | None = None
        self._planned: PlannedTargets | None = None
        if batch is not None and batch["labels"] is not None:
            self._plan = _plan(state, batch)
            table = state.file_table(batch["labels"].device)
            if table is not None:
                self._planned = PlannedTargets(self._plan, table, state.shard(), wait=False)

    def planned(self, cost_embedding: Tensor | None) -> PlannedTargets | None:
        """Return the targets with their rows of the table; None where nothing was planned."""
        if self._planned is None and self._plan is not None:
            # The live head: its rows were not there before the forward.
            self._planned = PlannedTargets(self._plan, cost_embedding, self.state.shard())
        return self._planned

    def report(self, loss_mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return name -> (sum, count) for the log, counted tokens weighed by their mask.

        Args:
            loss_mask: [b, s] as the data loader gave it.
        """
        config, out = self.state.config, self.output
        mask = loss_mask.transpose(0, 1)
        sums = {"lm loss": (out.mle_loss * mask).sum()}
        if config.cost_embedding is not None:
            sums["emo loss"] = (out.emo_loss * mask).sum()
        sums["objective"] = (out.loss * mask).sum()
        sums["objective weight"] = (out.weight * mask).sum()
        capped = (out.weight >= self.state.weight_cap) & (mask != 0)
        sums["objective weight capped"] = (capped * mask).sum()
        sums["entropy"] = (out.entropy * mask).sum()
        count = mask.float().sum().to(torch.int)
        report = {name: (value, count) for name, value in sums.items()}
        report["objective weight max"] = (out.weight.amax(), torch.ones_like(count))
        return report


def _plan(state: LossState, batch: dict[str, Any]) -> TargetPlan:
    """Return the plan of [s, b] tokens; from the host's labels where a GPU has the batch's."""
    labels, loss_mask = batch["labels"], batch["loss_mask"]
    bucket = DEVICE_BUCKET if labels.is_cuda else 1
    if not (labels.is_cuda and state.shares_host_targets):
        return plan_targets(labels.transpose(0, 1), loss_mask.transpose(0, 1), bucket=bucket)
    targets = batch["host_targets"]
    if state.host_group is not None:
        targets = share_targets(targets, labels.numel(), state.host_group)
    targets = targets.view(labels.shape).transpose(0, 1).reshape(-1)
    return plan_targets(targets, targets >= 0, bucket=bucket, device=labels.device)
