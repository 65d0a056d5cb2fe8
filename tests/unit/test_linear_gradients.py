"""Where the output layer's gradient goes: autograd, or straight to Megatron's main_grad."""

from __future__ import annotations

import pytest
import torch

from megatron_emo import build_objective, fused_linear_loss

EMO1 = build_objective("emo1")
PATHS = ("logits", "recompute", "forward")


def example(dtype=torch.float32):
    x = torch.randn(24, 7, dtype=dtype, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(61, 7, dtype=dtype))
    return x, w, torch.randint(0, 61, (24,)), torch.randn(61, 5)


def expected_grads(x, w, target, embedding):
    out = fused_linear_loss(x, w, target, EMO1, embedding, path="recompute")
    return torch.autograd.grad(out.loss.sum() * 0.5, (x, w))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.float64])
def test_gradient_is_added_to_main_grad(path, main_dtype):
    x, w, target, embedding = example()
    grad_x, grad_w = expected_grads(x, w, target, embedding)
    before = torch.randn(61, 7, dtype=main_dtype)
    w.main_grad, w.grad_added_to_main_grad = before.clone(), False
    for _ in range(2):  # two microbatches
        x.grad = w.grad = None
        out = fused_linear_loss(x, w, target, EMO1, embedding, path=path, into_main_grad=True)
        (out.loss.sum() * 0.5).backward()
    torch.testing.assert_close(x.grad, grad_x)
    torch.testing.assert_close(w.main_grad, before + 2 * grad_w.to(main_dtype), check_dtype=False)
    # Megatron's hook must see a gradient of this shape, and that it is not to be added.
    assert w.grad_added_to_main_grad and w.grad.shape == w.shape


@pytest.mark.parametrize("path", PATHS)
def test_a_shared_weight_is_given_zeros(path):
    x, w, target, embedding = example()
    w.main_grad, w.grad_added_to_main_grad, w.zero_out_wgrad = torch.zeros(61, 7), False, True
    out = fused_linear_loss(x, w, target, EMO1, embedding, path=path, into_main_grad=True)
    # The embedding's use of the same weight: autograd adds both before any hook runs.
    (out.loss.sum() * 0.5 + w[3].sum()).backward()
    assert (w.grad[3] == 1).all() and w.grad.sum() == 7


@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_weight_needs_no_main_grad(path):
    x, w, target, embedding = example()
    out = fused_linear_loss(x, w.detach(), target, EMO1, embedding, path=path, into_main_grad=True)
    out.loss.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("path", PATHS)
def test_bf16_chunks_add_up_in_fp32(path):
    x, w, target, embedding = example(torch.bfloat16)
    w.main_grad, w.grad_added_to_main_grad = torch.zeros(61, 7), False
    out = fused_linear_loss(x, w, target, EMO1, embedding, path=path, into_main_grad=True)
    (out.loss.sum() * 0.5).backward()
    rounded = expected_grads(x, w, target, embedding)[1]
    # Not rounded to bf16 on its way.
    assert (w.main_grad != rounded.float()).any()
    torch.testing.assert_close(w.main_grad.bfloat16(), rounded, rtol=1e-2, atol=1e-2)
