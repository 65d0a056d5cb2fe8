"""`TrainerLoss`: an objective as `transformers.Trainer` calls it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_emo.config import LossPathConfig
from megatron_emo.cost_embedding import (
    CostEmbeddingInfo,
    CostEmbeddingWarning,
    adaptive_cost_embedding,
    fingerprint_tokenizer,
    load_cost_embedding_shard,
    unit_rows,
)
from megatron_emo.hf.output_layer import (
    LayerInput,
    logits_of,
    num_rows,
    output_layer,
    whole_weight,
    why_needs_logits,
)
from megatron_emo.loss.fused_linear import auto_path, fused_linear_loss
from megatron_emo.loss.statistics import LossOutput
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.objectives import Objective, build_objective

LIVE = "live"
"""The cost embedding that is the output layer itself, detached and normalised at every call."""

_IGNORED = -100
"""The label Trainer does not count."""


class TrainerLoss:
    """What `Trainer(compute_loss_func=...)` expects: (outputs, labels, num_items_in_batch) -> loss.

    Labels are those of a causal language model: position i is scored against label i + 1, and -100
    is left out. The loss is the sum over tokens by num_items_in_batch, which Trainer counts over
    gradient accumulation and devices, or without it the mean over the batch's own tokens.

    The hidden states need the output layer's whole weight on each process: DDP has it; under FSDP
    take path="logits", under ZeRO-3 a file as cost embedding, too. Context and sequence parallelism
    cut sequences apart before the loss, and are not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: str | Objective = "emo1",
        *,
        cost_embedding: str | os.PathLike[str] | Tensor | None = None,
        tokenizer: object = None,
        path: str = "auto",
        workspace_mb: int = 512,
        **settings: Any,
    ) -> None:
        """Copy the cost table, and with any path but logits run the model once, on one token.

        Args:
            model: as given to Trainer.
            objective: a name of `megatron_emo.objectives.OBJECTIVES`, with its settings as further
                arguments, such as weight_max=3.0; or what `build_objective` returned.
            cost_embedding: None for a copy of the model's output layer as it is now; "live" for the
                output layer as it trains; a file of tools/prepare_cost_embedding.py, which a run
                that is to be resumed needs; or a table [at most V, D]. Rows the table lacks cost 1.
            tokenizer: compared with the one the file was made for.
            path: logits takes the logits the model forms. recompute and forward (see
                `fused_linear_loss`) take hidden states: in training steps, logits in the model's
                output are then empty, which a subclass of Trainer that reads them does not expect.
                auto takes logits where these and cost rows fit workspace_mb, else recompute; and
                always logits where the model does not allow the others (see `why_logits`).
            workspace_mb: MiB that logits, or chunks of them, may take.

        Raises:
            ValueError: settings as in `build_objective`; a model without a usable output layer, or
                with router losses, which would be lost; a table that does not fit; a path other
                than logits and auto with a model that changes logits after its output layer.
        """
        self.objective = _objective(objective, settings)
        self._head = output_layer(model)
        self._table = None
        if self.objective.uses_cost:
            self._table = _frozen_table(cost_embedding, self._head, tokenizer)
        LossPathConfig(path, workspace_mb)  # checks both
        self._workspace_mb = workspace_mb
        LayerInput.remove_from(self._head)  # this loss takes over from a former one
        self.why_logits = "asked for" if path == "logits" else why_needs_logits(model, self._head)
        """Why hidden states are not used; empty where they are."""
        if self.why_logits and path in ("recompute", "forward"):
            raise ValueError(
                f"path: {path} needs the model's hidden states, but {self.why_logits}; expected "
                "logits or auto"
            )
        self.path = "logits" if self.why_logits else path
        """logits, auto, recompute or forward: what is in use."""
        self._input = None if self.why_logits else LayerInput(self._head, self.withholds)
        self._sums: dict[str, Tensor] = {}
        self._num_tokens: Tensor | int = 0

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the scalar loss of a batch, fp32 (fp64 for fp64).

        Args:
            outputs: what the model returned, called without labels.
            labels: [batch, seq] token ids, or -100.
            num_items_in_batch: from Trainer. Under DataParallel, where it repeats the count for
                each GPU and multiplies the loss by their number, the product comes out right.

        Raises:
            ValueError: no labels, labels outside the vocabulary, other shapes than the logits'.
        """
        if labels is None:
            raise ValueError(
                "labels: expected token ids, got None; the data collator must give labels "
                "(DataCollatorForLanguageModeling with mlm=False does)"
            )
        states = None if self._input is None else self._input.take()
        scores = logits_of(outputs) if states is None else states
        if scores.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: expected one for each of the model's {tuple(scores.shape[:-1])} "
                f"positions, got {tuple(labels.shape)}"
            )
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED).to(scores.device)
        counted = target != _IGNORED
        # The model has chosen its precision; inside autocast fp32 states would lose theirs.
        with torch.autocast(scores.device.type, enabled=False):
            out = self._losses(scores, target, counted, are_states=states is not None)
        if torch.is_grad_enabled():
            self._add_means(out, counted)
        return _by_count(out.loss.sum(), counted, num_items_in_batch)

    def pop_means(self) -> dict[str, float]:
        """Return 'lm loss' (m, nats), 'emo loss' (d), 'objective' and 'objective weight', means
        over the tokens trained on since the last call, of this process; empty without any."""
        count = int(self._num_tokens)
        means = {name: float(total) / count for name, total in self._sums.items()} if count else {}
        self._sums, self._num_tokens = {}, 0
        return means

    def release(self) -> None:
        """Take the hook off the model: it forms logits as before, and this loss reads them."""
        if self._input is not None:
            self._input.remove()
            self._input, self.path, self.why_logits = None, "logits", "released"

    def withholds(self, states: Tensor) -> bool:
        """Return whether logits of hidden states [..., h] are to be left to the loss."""
        if self.path != "auto":
            return True
        num_tokens, rows = states[..., 0].numel(), num_rows(self._head)
        num_distinct = min(num_tokens, rows) if self.objective.uses_cost else 0
        sizes = (num_tokens, num_distinct, rows, states.element_size())
        return auto_path(*sizes, self._workspace_mb)[0] != "logits"

    def _losses(
        self, scores: Tensor, target: Tensor, counted: Tensor, *, are_states: bool
    ) -> LossOutput:
        inputs = target, self.objective, self._cost_embedding(scores.device), counted
        if not are_states:
            return vocab_parallel_loss(scores, *inputs, cost_embedding_is_normalized=True)
        return fused_linear_loss(
            scores,
            whole_weight(self._head, "path='logits'").to(scores.dtype),
            *inputs,
            path="recompute" if self.path == "auto" else self.path,
            workspace_mb=self._workspace_mb,
            cost_embedding_is_normalized=True,
        )

    def _cost_embedding(self, device: torch.device) -> Tensor | None:
        if not self.objective.uses_cost:
            return None
        if self._table is None:
            weight = whole_weight(self._head, "a file as cost_embedding").detach().to(device)
            return adaptive_cost_embedding(weight, vocab_start_index=0, vocab_size=len(weight))
        # Trainer moves the model after the table was made.
        self._table = self._table.to(device)
        return self._table

    def _add_means(self, out: LossOutput, counted: Tensor) -> None:
        values = {
            "lm loss": out.mle_loss,
            "emo loss": out.emo_loss,
            "objective": out.loss,
            "objective weight": out.weight,
        }
        if not self.objective.uses_cost:
            del values["emo loss"]
        for name, value in values.items():
            self._sums[name] = value.detach().sum() + self._sums.get(name, 0)
        self._num_tokens = counted.sum() + self._num_tokens


def _objective(objective: str | Objective, settings: Mapping[str, Any]) -> Objective:
    if not isinstance(objective, Objective):
        return build_objective(objective, **settings)
    if settings:
        raise ValueError(
            f"{', '.join(settings)}: expected no settings beside an Objective, which has its own"
        )
    return objective


def _frozen_table(
    source: str | os.PathLike[str] | Tensor | None, head: nn.Module, tokenizer: object
) -> Tensor | None:
    """Return unit rows [V, D] of what was asked for; None for the live output layer."""
    if isinstance(source, str) and source == LIVE:
        return None
    if source is None:
        return unit_rows(whole_weight(head, "a file as cost_embedding"))
    if isinstance(source, Tensor):
        table = unit_rows(source)
    else:
        info = CostEmbeddingInfo.from_file(source)
        table = load_cost_embedding_shard(
            source,
            vocab_start_index=0,
            vocab_end_index=info.vocab_size,
            vocab_size=info.vocab_size,
            tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        )
    rows = num_rows(head)
    missing = rows - len(table)
    if missing < 0:
        raise ValueError(
            f"cost_embedding: expected at most {rows} rows, the model's output layer, got "
            f"{len(table)}"
        )
    if missing:
        warnings.warn(
            f"cost_embedding: it has {len(table)} rows, the model's output layer {rows}; the last "
            f"{missing} tokens cost 1 against every other",
            CostEmbeddingWarning,
            stacklevel=3,
        )
    return nn.functional.pad(table, (0, 0, 0, missing))


def _by_count(total: Tensor, counted: Tensor, num_items: Tensor | int | None) -> Tensor:
    if num_items is None:
        return total / counted.sum().clamp(min=1)
    if torch.is_tensor(num_items):
        num_items = num_items.to(total.device).sum()
    # A batch without a counted token has loss 0, not 0/0.
    return total / (num_items + (num_items == 0))
