"""The output layer of a transformers model: what is asked of it, and a hook on what goes in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def output_layer(model: nn.Module) -> nn.Module:
    """Return a causal language model's output layer.

    Raises:
        ValueError: another kind of model, or one whose own loss has a part that would be lost.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if getattr(head, "weight", None) is None:
        raise ValueError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}, "
            "which shows no output layer (get_output_embeddings)"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a causal language model, {type(model).__name__} is an "
            "encoder-decoder, whose labels are not shifted"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "model.config.output_router_logits: expected False, got True; the router loss that it "
            "adds to the model's own loss would be lost"
        )
    return head


def num_rows(head: nn.Module) -> int:
    """Return V, also of a layer whose weight is sharded."""
    return getattr(head, "out_features", head.weight.shape[0])


def whole_weight(head: nn.Module, remedy: str) -> Tensor:
    """Return the output layer's weight [V, h]; ValueError where this process holds a part."""
    weight, rows = head.weight, num_rows(head)
    if weight.dim() != 2 or weight.shape[0] != rows or hasattr(weight, "full_tensor"):
        raise ValueError(
            f"model: expected an output layer with its whole weight [{rows}, h], got a "
            f"{type(weight).__name__} {tuple(weight.shape)}, which looks sharded; use {remedy}"
        )
    return weight


def why_needs_logits(model: nn.Module, head: nn.Module) -> str:
    """Return why the loss cannot be formed from the output layer's input; empty if it can."""
    if type(head) is not nn.Linear:
        return f"its output layer is a {type(head).__name__}, not a torch.nn.Linear"
    if head.bias is not None:
        return "its output layer has a bias"
    try:
        whole_weight(head, "path='logits'")
        returns_them = _returns_logits_unchanged(model, head)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"a trial on one token failed: {error}"
    return "" if returns_them else "it changes the logits after its output layer (cap or scale)"


@torch.no_grad()
def _returns_logits_unchanged(model: nn.Module, head: nn.Module) -> bool:
    """Whether logits put in the output layer's place come out of the model as they are."""
    planted = []

    def plant(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        logits = torch.linspace(-100.0, 100.0, output.numel(), device=output.device)
        planted.append(logits.view_as(output).to(output.dtype))
        return planted[-1].clone()

    in_training = [module for module in model.modules() if module.training]
    handle = head.register_forward_hook(plant)
    try:
        # Dropout would use up random numbers of the run.
        model.eval()
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = logits_of(model(input_ids=token, use_cache=False))
    finally:
        handle.remove()
        for module in in_training:
            module.training = True
    return len(planted) == 1 and torch.equal(logits.float(), planted[0].float())


def logits_of(outputs: Any) -> Tensor:
    """What a model returned without labels: a mapping with "logits", or a tuple they lead."""
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


class LayerInput:
    """A pre-hook that keeps what goes into an output layer, and hands on none of its positions.

    The layer then gives logits [batch, 0, V], which still hang on weight and hidden states, so
    that DDP finds every parameter used. Outside training steps (evaluation, generation), in copies
    of the layer and when its loss is gone, logits are formed as ever.
    """

    _handles: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
    """One hook a layer."""

    def __init__(self, head: nn.Module, withholds: Callable[[Tensor], bool]) -> None:
        """Hook on to `head`; `withholds`, a bound method, decides about hidden states [..., h]."""
        self._head, self._withholds = weakref.ref(head), weakref.WeakMethod(withholds)
        self._states: Tensor | None = None
        self._handle = self._handles[head] = head.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if module is not self._head():
            return None
        self._states = None
        withholds = self._withholds()
        is_step = module.training and torch.is_grad_enabled()
        if withholds is None or not is_step or not withholds(args[0]):
            return None
        states, device = args[0], args[0].device.type
        if torch.is_autocast_enabled(device):
            states = states.to(torch.get_autocast_dtype(device))
        self._states = states
        return (args[0][..., :0, :],)

    @classmethod
    def remove_from(cls, head: nn.Module) -> None:
        """Take a former loss's hook off a layer, if there is one."""
        handle = cls._handles.pop(head, None)
        if handle is not None:
            handle.remove()

    def __deepcopy__(self, memo: dict) -> LayerInput:
        return self  # in a copy of the model it does nothing

    def take(self) -> Tensor | None:
        """Return the hidden states of the last forward, once; None where logits were formed."""
        states, self._states = self._states, None
        return states

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
