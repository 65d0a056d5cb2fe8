"""The clock around the output layer with its loss: what lies inside it, and that it changes
nothing."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch

from megatron_emo.training import loss_time


@pytest.fixture
def moments(monkeypatch):
    """A clock that counts its readings, and a list of what happened at which."""
    counter = itertools.count()
    log: list[tuple[str, int]] = []

    def moment():
        log.append(("moment", now := next(counter)))
        return float(now)

    monkeypatch.setattr(loss_time, "_moment", moment)
    monkeypatch.setattr(loss_time, "_timed", argparse.Namespace())
    loss_time._clock.take()
    yield log
    loss_time._clock.take()


class Head(torch.autograd.Function):
    """A head that says when it runs."""

    @staticmethod
    def forward(ctx, hidden, weight, log):
        ctx.save_for_backward(hidden, weight)
        ctx.log = log
        log.append(("forward", 0))
        return hidden @ weight

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append(("backward", 0))
        hidden, weight = ctx.saved_tensors
        return grad @ weight.T, hidden.T @ grad, None


def run(log, hidden, weight, labels=1):
    def processor(*, hidden_states, labels):
        return Head.apply(hidden_states, weight, log)

    before = hidden * 2  # stands for the transformer
    loss = loss_time.timed_processor(processor, hidden_states=before, labels=labels)
    return loss


def test_spans_hold_the_head_and_nothing_else(moments):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    for _ in range(2):
        run(moments, hidden, weight).sum().backward()
    kinds = [kind for kind, _ in moments]
    assert kinds == ["moment", "forward", "moment", "moment", "backward", "moment"] * 2
    found = loss_time._clock.take()
    assert found == {"forward_ms": 2000.0, "backward_ms": 2000.0, "num_microbatches": 2}
    empty = {"forward_ms": None, "backward_ms": None, "num_microbatches": 0}
    assert loss_time._clock.take() == empty


def test_gradients_are_the_same_bits(moments, monkeypatch):
    gradients = []
    for timed in (None, argparse.Namespace()):
        monkeypatch.setattr(loss_time, "_timed", timed)
        torch.manual_seed(1)
        hidden = torch.randn(3, 4, requires_grad=True)
        weight = torch.randn(4, 2, requires_grad=True)
        run(moments, hidden, weight).square().sum().backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(kind == "moment" for kind, _ in moments) == 4


def test_forwards_that_wait_for_their_backwards(moments):
    """As in a pipeline: two microbatches forward, then both backward."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    losses = [run(moments, hidden, weight) for _ in range(2)]
    for loss in losses:
        loss.sum().backward()
    assert loss_time._clock.take()["backward_ms"] == 2000.0


def test_evaluation_and_generation_are_not_timed(moments):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with torch.no_grad():
        run(moments, hidden, weight)
    run(moments, hidden, weight, labels=None).sum().backward()
    assert not [kind for kind, _ in moments if kind == "moment"]


def test_peak_memory_is_the_process_s():
    held = torch.ones(1 << 22)
    assert loss_time.peak_bytes() > held.nbytes
