"""The seam into `GPTModel.forward(output_processor=...)`: from hidden states to per-token
losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.training.state import LossState


def emo_output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    scale_logits: Callable[[Tensor], Tensor],
    runtime_gather_output: bool | None,
    context: LossState,
    **_: Any,
) -> Tensor:
    """Return the objective per token [b, s], or logits [b, s, V] where there are no labels.

    Mirrors the end of `GPTModel._postprocess` (megatron-core 0.19.2) with our loss in the place of
    `compute_language_model_loss`. On the path logits they come from the output layer module itself,
    so that its hooks, sequence parallelism and tied weights stay Megatron's; the other paths take
    its weight.

    Args:
        hidden_states: [s, b, h], [s/tp, b, h] under sequence parallelism.
        output_weight: the embedding's weight [V/tp, h] when tied, else None.
        labels: [b, s] global ids.
        loss_mask: [b, s].
    """

    def form_logits() -> Tensor:
        logits, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return scale_logits(logits)

    if labels is None:
        return form_logits().transpose(0, 1).contiguous()
    weight = output_layer.weight if output_weight is None else output_weight
    call = {
        "target": labels.transpose(0, 1),
        "objective": context.objective(),
        "cost_embedding": context.cost_embedding(weight.detach(), output_layer.training),
        "loss_mask": None if loss_mask is None else loss_mask.transpose(0, 1),
        "tp_group": context.tp_group,
        "vocab_size": context.vocab_size,
        "cost_embedding_is_normalized": True,
        # On a GPU the data loader has looked at the labels while they were on the host.
        "check_target": not labels.is_cuda,
        "return_entropy": True,
    }
    path = context.loss_path(labels.numel(), weight.shape[0], hidden_states.element_size())
    if path == "logits":
        out = vocab_parallel_loss(form_logits(), **call)
    else:
        is_sharded = output_layer.sequence_parallel
        if is_sharded:
            # Its backward reduce-scatters, so the loss leaves the sum over ranks to it.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, group=context.tp_group
            )
        out = fused_linear_loss(
            scale_logits(hidden_states),  # (k x) W^T = k (x W^T)
            weight,
            path=path,
            workspace_mb=context.config.loss_path.workspace_mb,
            reduce_hidden_grad=not is_sharded,
            **call,
        )
    context.last_output = out._replace(loss=out.loss.detach())
    return out.loss.transpose(0, 1).contiguous()
