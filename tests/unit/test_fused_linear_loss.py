"""The fused output layer and loss: every path against the reference, value and both gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_emo import build_objective, fused_linear_loss
from megatron_emo.loss import fused_linear, kernels
from megatron_emo.reference import reference_loss

PATHS = ("logits", "recompute", "forward")
EMO1 = build_objective("emo1")


def example(dtype=torch.float64, tokens=24, hidden=7, vocab=61, width=5):
    x = torch.randn(4, tokens // 4, hidden, dtype=torch.float64).to(dtype).requires_grad_()
    # Logits of standard deviation 2: fp32 logits themselves carry an error in proportion to them.
    w = torch.randn(vocab, hidden, dtype=torch.float64) * (2 / hidden**0.5)
    w = w.to(dtype).requires_grad_()
    target = torch.randint(0, vocab // 2, (4, tokens // 4))
    return x, w, target, torch.randn(vocab, width, dtype=torch.float64).to(dtype)


def expected_of(x, w, target, name, embedding, upstream, mask=None, **settings):
    x, w = (v.detach().double().requires_grad_() for v in (x, w))
    out = reference_loss(x @ w.T, target, name, embedding.double(), loss_mask=mask, **settings)
    return out, *torch.autograd.grad((out.loss * upstream).sum(), (x, w))


def chunks_of(monkeypatch, rows, vocab=61, itemsize=8, has_cost=True):
    row_bytes = vocab * itemsize * (2 if has_cost else 1)
    monkeypatch.setitem(fused_linear._CHUNK_BYTES, "cpu", rows * row_bytes)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["mle", "emo1", "emo2", "mixce", "focal"])
@pytest.mark.parametrize("upstream", ["uniform", "per token"])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_reference(path, name, upstream, masked):
    x, w, target, embedding = example()
    mask = torch.randint(0, 2, target.shape).double() if masked else None
    weights = torch.full(target.shape, 0.3, dtype=torch.float64)
    weights = weights if upstream == "uniform" else torch.rand_like(weights)
    weights = weights if mask is None else weights * mask
    out = fused_linear_loss(
        x, w, target, build_objective(name), embedding, mask, path=path, return_entropy=True
    )
    grads = torch.autograd.grad((out.loss * weights).sum(), (x, w))
    expected, *expected_grads = expected_of(x, w, target, name, embedding, weights, mask)
    for field in ("loss", "mle_loss", "emo_loss", "entropy"):
        torch.testing.assert_close(
            getattr(out, field), getattr(expected, field), rtol=0, atol=1e-12, msg=field
        )
    for grad, exact in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 5, 23, 24])
def test_chunk_size_does_not_matter(monkeypatch, path, rows):
    x, w, target, embedding = example(torch.float32)
    weights = torch.rand(target.shape, dtype=torch.float64)
    chunks_of(monkeypatch, rows, itemsize=4)
    out = fused_linear_loss(x, w, target, EMO1, embedding, path=path)
    grads = torch.autograd.grad((out.loss * weights).sum(), (x, w))
    _, *expected = expected_of(x, w, target, "emo1", embedding, weights)
    for grad, exact in zip(grads, expected, strict=True):
        error = (grad.double() - exact).norm() / exact.norm()
        assert error <= 1e-6


def test_fractional_mask_is_the_callers_weight():
    x, w, target, embedding = example()
    mask = torch.rand(target.shape, dtype=torch.float64) + 0.1
    mask[0] = 0
    expected = expected_of(x, w, target, "emo1", embedding, mask * 0.7, mask)[1:]
    for path in PATHS:
        out = fused_linear_loss(x, w, target, EMO1, embedding, mask, path=path)
        grads = torch.autograd.grad((out.loss * mask).sum() * 0.7, (x, w))
        for grad, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_frozen_inputs_get_no_gradient(path):
    x, w, target, embedding = example()
    weights = torch.ones(target.shape, dtype=torch.float64)
    _, grad_x, grad_w = expected_of(x, w, target, "emo1", embedding, weights)
    out = fused_linear_loss(x, w.detach(), target, EMO1, embedding, path=path)
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), x)[0], grad_x)
    out = fused_linear_loss(x.detach(), w, target, EMO1, embedding, path=path)
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), w)[0], grad_w)


def test_second_backward_is_refused_where_the_logits_are_gone():
    x, w, target, embedding = example()
    loss = fused_linear_loss(x, w, target, EMO1, embedding, path="logits").loss.sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward on the path logits.*recompute"):
        torch.autograd.grad(loss, x)
    for path in ("recompute", "forward"):
        loss = fused_linear_loss(x, w, target, EMO1, embedding, path=path).loss.sum()
        first = torch.autograd.grad(loss, w, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, w)[0])


@pytest.mark.parametrize("path", ["recompute", "forward"])
def test_second_backward_is_the_first_whatever_the_scale(path):
    x, w, target, embedding = example()
    loss = fused_linear_loss(x, w, target, EMO1, embedding, path=path).loss.sum() * 0.37
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, (x, w))
    upstream = torch.full(target.shape, 0.37, dtype=torch.float64)
    _, *expected = expected_of(x, w, target, "emo1", embedding, upstream)
    for grads in (first, second):
        for grad, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, exact, rtol=0, atol=1e-12)
    assert all(torch.equal(grad, copy) for grad, copy in zip(first, kept, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_all_masked_is_zero(path):
    x, w, target, embedding = example()
    out = fused_linear_loss(
        x, w, torch.full_like(target, -100), EMO1, embedding, torch.zeros(target.shape), path=path
    )
    grads = torch.autograd.grad(out.loss.sum(), (x, w))
    assert (out.loss == 0).all() and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("path", PATHS)
def test_bf16_rounds_once(monkeypatch, path):
    # Against the plain bf16 computation's own error: logits rounded to bf16, then exact.
    x, w, target, embedding = example(torch.bfloat16, tokens=400, hidden=64)
    chunks_of(monkeypatch, 7, itemsize=4)
    upstream = torch.full(target.shape, 0.37, dtype=torch.float64)  # no power of two
    out = fused_linear_loss(x, w, target, EMO1, embedding.float(), path=path)
    grads = torch.autograd.grad(out.loss.sum() * 0.37, (x, w))
    _, *exact = expected_of(x, w, target, "emo1", embedding.float(), upstream)
    plain_x, plain_w = (v.detach().requires_grad_() for v in (x, w))
    plain = reference_loss((plain_x @ plain_w.T).double(), target, "emo1", embedding.double())
    plain = torch.autograd.grad(plain.loss.sum() * 0.37, (plain_x, plain_w))
    for ours, theirs, true in zip(grads, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        error, bound = ((v.double() - true).norm() / true.norm() for v in (ours, theirs))
        assert error <= 1.1 * bound


def test_auto_follows_the_byte_budget():
    # 100 logits rows in bf16 and 30 cost rows in fp32 of 10,000 columns: 3.2e6 bytes, 3.05 MiB.
    assert fused_linear.auto_path(100, 30, 10_000, 2, 4) == ("logits", 3_200_000)
    assert fused_linear.auto_path(100, 30, 10_000, 2, 3) == ("recompute", 3_200_000)


def test_nothing_is_kept_without_gradients():
    x, w, target, embedding = example()
    with torch.no_grad():
        out = fused_linear_loss(x, w, target, EMO1, embedding, path="forward")
    expected = reference_loss((x @ w.T).detach(), target, "emo1", embedding)
    torch.testing.assert_close(out.loss, expected.loss)
    assert not out.loss.requires_grad


def test_quantized_hidden_states_are_widened():
    # Like Transformer Engine's: a tensor subclass that keeps a scale and knows how to undo it.
    class Quantized(torch.Tensor):
        _quantizer = None

        def dequantize(self):
            return self.as_subclass(torch.Tensor) * 0.5

    x, w, target, embedding = example()
    out = fused_linear_loss((x.detach() * 2).as_subclass(Quantized), w, target, EMO1, embedding)
    expected = fused_linear_loss(x.detach(), w, target, EMO1, embedding)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "fast"}, "path: expected one of auto, logits.*got 'fast'"),
        ({"workspace_mb": 0}, "workspace_mb: expected > 0, got 0"),
        ({"weight": torch.ones(61, 8).double()}, r"weight: expected \[V/tp, 7\]"),
        ({"weight": torch.ones(61, 7)}, "weight: expected .*float64.*float32"),
        ({"target": torch.full((4, 6), 61)}, "got 24 outside, the first 61"),
    ],
)
def test_bad_input_is_named(change, message):
    x, w, target, embedding = example()
    call = {"weight": w, "target": target, "cost_embedding": embedding, **change}
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(x, objective=EMO1, **call)


def test_a_workspace_below_one_row_is_named():
    x, w = torch.zeros(3, 2), torch.zeros(150_000, 2)
    with pytest.raises(ValueError, match="workspace_mb: expected at least 2 MiB.*got 1"):
        fused_linear_loss(x, w, torch.zeros(3).long(), EMO1, torch.ones(150_000, 1), workspace_mb=1)


@pytest.mark.parametrize("path", ["recompute", "forward"])
@pytest.mark.parametrize("chunks", [4, 16])
def test_peak_beside_the_gradients_is_one_chunk(monkeypatch, path, chunks):
    from megatron_emo.benchmark.memory import LiveStorage

    tokens, vocab, hidden = 512, 4000, 8
    rows = tokens // chunks
    chunks_of(monkeypatch, rows, vocab=vocab, itemsize=4)
    monkeypatch.setitem(kernels._BLOCK_BYTES, "cpu", 4 * vocab)
    x, w, target, embedding = example(torch.float32, tokens, hidden, vocab)
    embedding = torch.nn.functional.normalize(embedding, dim=1)
    with LiveStorage() as live:
        out = fused_linear_loss(
            x, w, target, EMO1, embedding, path=path, cost_embedding_is_normalized=True
        )
        torch.autograd.grad(out.loss.sum(), (x, w))
    # Logits of a chunk and at worst as many cost rows; a few numbers a token, and dX's chunk.
    chunk = 2 * rows * vocab * 4
    gradients = (tokens + vocab) * hidden * 4
    assert live.peak_bytes <= chunk + gradients + tokens * (8 * 40 + hidden * 4 * 3) + 20 * vocab
