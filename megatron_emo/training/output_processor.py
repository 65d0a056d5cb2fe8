"""The seam into `GPTModel.forward(output_processor=...)`: from hidden states to per-token
losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_emo.loss.fused_linear import fused_linear_loss
from megatron_emo.loss.vocab_parallel import vocab_parallel_loss
from megatron_emo.training.microbatch import Microbatch


def emo_output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    scale_logits: Callable[[Tensor], Tensor],
    runtime_gather_output: bool | None,
    context: Microbatch,
    **_: Any,
) -> Tensor:
    """Return the objective per token [b, s], or logits [b, s, V] where there are no labels.

    Mirrors the end of `GPTModel._postprocess` (megatron-core 0.19.2) with our loss in the place of
    the output layer and `compute_language_model_loss`. The loss runs inside the output layer's own
    call, so that the hooks that fetch its weight run too; where a flag needs the layer's own
    product, its logits are taken.

    Args:
        hidden_states: [s, b, h], [s/tp, b, h] under sequence parallelism.
        output_weight: the embedding's weight [V/tp, h] when tied, else None.
        labels: [b, s] global ids.
        loss_mask: [b, s].
    """
    state = context.state

    def form_logits() -> Tensor:
        logits, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return scale_logits(logits)

    if labels is None:
        return form_logits().transpose(0, 1).contiguous()

    def loss_of(compute: Callable[..., Any], *inputs: Tensor, **settings: Any) -> Any:
        weight = output_layer.weight if output_weight is None else output_weight
        table = state.cost_embedding(weight.detach(), output_layer.training)
        return compute(
            *inputs,
            target=labels.transpose(0, 1),
            objective=state.objective(),
            cost_embedding=table,
            loss_mask=None if loss_mask is None else loss_mask.transpose(0, 1),
            tp_group=state.tp_group,
            vocab_size=state.vocab_size,
            cost_embedding_is_normalized=True,
            # On a GPU the data loader has looked at the labels while they were on the host.
            check_target=not labels.is_cuda,
            return_entropy=True,
            planned=context.planned(table),
            **settings,
        )

    def fused_loss() -> Any:
        weight = output_layer.weight if output_weight is None else output_weight
        return loss_of(
            fused_linear_loss,
            scale_logits(hidden_states),  # (k x) W^T = k (x W^T)
            weight,
            path=state.loss_path(labels.numel(), len(weight), hidden_states.element_size()),
            workspace_mb=state.config.loss_path.workspace_mb,
            deterministic_blocks=state.config.loss_path.deterministic_blocks,
            sequence_parallel=output_layer.sequence_parallel,
            into_main_grad=output_layer.gradient_accumulation_fusion,
        )

    if state.needs_output_layer:
        out = loss_of(vocab_parallel_loss, form_logits())
    else:
        out = _call_with_hooks(output_layer, fused_loss)
    context.output = out._replace(loss=out.loss.detach())
    return out.loss.transpose(0, 1).contiguous()


def _call_with_hooks(module: torch.nn.Module, function: Callable[[], Any]) -> Any:
    """Return function(), run as the module's forward: between its forward hooks, which is where
    the distributed optimizer waits for the weight it is gathering."""
    module.forward = function  # hides the class's
    try:
        return module()
    finally:
        del module.forward
