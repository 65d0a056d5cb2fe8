"""Gradients against differences, in float64.

Of m and d alone: every objective's gradient is these two with weights that count as constants.
"""

from __future__ import annotations

import pytest
import torch

from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss


@pytest.fixture(params=[11, 24, 37])
def case(request):
    vocab, generator = request.param, torch.Generator().manual_seed(request.param)
    draw = {"dtype": torch.float64, "generator": generator}
    target = torch.randint(vocab, (5,), generator=generator)
    mask = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    return vocab, target, mask, torch.randn(vocab, 4, **draw), draw


@pytest.mark.parametrize("name", ["mle", "emo"])
def test_of_logits(case, name):
    vocab, target, mask, table, draw = case
    logits = (3 * torch.randn(5, vocab, **draw)).requires_grad_()

    def loss(z):
        return vocab_parallel_loss(z, target, build_objective(name), table, loss_mask=mask).loss

    assert torch.autograd.gradcheck(loss, logits, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mle", "emo"])
def test_of_hidden_states_and_weight(case, name):
    vocab, target, mask, table, draw = case
    hidden = torch.randn(5, 3, **draw).requires_grad_()
    weight = torch.randn(vocab, 3, **draw).requires_grad_()

    def loss(x, w):
        # The path that can be taken back more than once, as is done here for every output.
        how = {"loss_mask": mask, "path": "recompute"}
        return fused_linear_loss(x, w, target, build_objective(name), table, **how).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-6, atol=1e-7)
