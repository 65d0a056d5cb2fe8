"""The loss from logits on one rank: precision, masks, labels, extreme values, and that inputs stay
as they were."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_emo import build_objective, vocab_parallel_loss
from megatron_emo.loss import kernels
from megatron_emo.reference import reference_loss

EMO1 = build_objective("emo1")


def example(tokens=23, vocab=61, width=9, dtype=torch.float64, scale=3.0):
    logits = (torch.randn(tokens, vocab, dtype=torch.float64) * scale).to(dtype)
    return (
        logits,
        torch.randint(0, vocab, (tokens,)),
        torch.randn(vocab, width, dtype=torch.float64),
    )


def grads(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", ["emo1", "emo2", "mle"])
def test_float32_matches_reference(name):
    logits, target, embedding = example(dtype=torch.float32)
    logits.requires_grad_()
    upstream = torch.rand(target.shape)
    out = vocab_parallel_loss(
        logits, target, build_objective(name), embedding.float(), return_entropy=True
    )
    (grad,) = grads((out.loss * upstream).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected = reference_loss(exact, target, name, embedding.float().double())
    (expected_grad,) = grads((expected.loss * upstream).sum(), exact)
    for field in ("loss", "mle_loss", "emo_loss", "entropy"):
        value = getattr(out, field)
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(), getattr(expected, field), rtol=2e-6, atol=2e-6, msg=field
        )
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-6)


def test_row_chunks_do_not_change_a_bit(monkeypatch):
    logits, target, embedding = example(dtype=torch.float32)
    logits.requires_grad_()

    def run():
        out = vocab_parallel_loss(
            logits, target, EMO1, embedding.float(), return_entropy=True, return_argmax=True
        )
        return [*out, *grads(out.loss.sum(), logits)]

    whole = run()
    monkeypatch.setitem(kernels._BLOCK_BYTES, "cpu", 3 * 61 * 4)
    assert all(torch.equal(x, y) for x, y in zip(whole, run(), strict=True))


def test_argmax_is_the_first_of_the_likeliest():
    logits, target, embedding = example(dtype=torch.bfloat16, scale=0.02)
    logits = logits.mul(50).round().div(50)  # many ties
    keep = torch.ones(23)
    keep[4] = 0
    out = vocab_parallel_loss(logits, target, EMO1, embedding, keep, return_argmax=True)
    first = [row.index(max(row)) for row in logits.tolist()]
    first[4] = 0
    assert out.argmax.tolist() == first
    assert (logits == logits.amax(dim=1, keepdim=True)).sum(dim=1).max() > 1
    assert vocab_parallel_loss(logits, target, EMO1, embedding).argmax is None


def confident_logits(q_t, vocab=32000):
    """One row per token with the target's probability near q_t, from a spread of other logits."""
    logits = torch.randn(64, vocab, dtype=torch.float64)
    others = torch.logsumexp(logits[:, 1:], dim=1)
    logits[:, 0] = others + torch.log(torch.tensor(q_t / (1 - q_t)))
    return logits.to(torch.bfloat16), torch.zeros(64, dtype=torch.long)


@pytest.mark.parametrize("q_t", [0.9, 0.999, 0.9999])
def test_expected_cost_in_bf16_keeps_its_digits(q_t, capsys):
    logits, target = confident_logits(q_t)
    embedding = torch.randn(32000, 64).to(torch.bfloat16)
    ours = vocab_parallel_loss(logits, target, EMO1, embedding).emo_loss.double()

    unit = embedding.double() / embedding.double().norm(dim=1, keepdim=True)
    q = torch.softmax(logits.double(), dim=1)
    cost = 1 - unit @ unit[0]
    cost[0] = 0
    exact = q @ cost
    # The released form, 1 - <e_t, q E>, in the dtype it would run in.
    narrow = unit.to(torch.bfloat16)
    official = (1 - (torch.softmax(logits, 1) @ narrow * narrow[0]).sum(1)).double()
    error = ((ours - exact) / exact).abs().max().item()
    official_error = ((official - exact) / exact).abs().max().item()
    with capsys.disabled():
        print(f"\nq_t {q_t}: error of d {error:.1e}, of the released form {official_error:.1e}")
    assert error <= 1e-3
    assert (ours > 0).all()
    if q_t >= 0.999:
        assert official_error > 0.1, "the form this package avoids would do after all"


def test_cross_entropy_keeps_its_relative_accuracy_near_certainty():
    # q_t = 1 - 2e-9: log(sum exp) in fp32 would be exactly 0, and EMO-2's ratio 0/0.
    logits = torch.tensor([[20.0, 0.0, -40.0]])
    out = vocab_parallel_loss(logits, torch.tensor([0]), build_objective("emo2"), torch.eye(3))
    exact = reference_loss(logits.double(), torch.tensor([0]), "emo2", torch.eye(3).double())
    for field in ("mle_loss", "emo_loss", "loss"):
        assert getattr(out, field).item() == pytest.approx(getattr(exact, field).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_1e4(dtype):
    logits = (torch.randn(40, 50) * 1e4).to(dtype).requires_grad_()
    logits.data[:20] = (1e4 + torch.randn(20, 50)).to(dtype)
    target, embedding = torch.randint(0, 50, (40,)), torch.randn(50, 8)
    out = vocab_parallel_loss(logits, target, EMO1, embedding)
    (grad,) = grads(out.loss.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected = reference_loss(exact, target, "emo1", embedding.double())
    (expected_grad,) = grads(expected.loss.sum(), exact)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masked_tokens_give_nothing_whatever_they_hold(dtype):
    logits, target, embedding = example(dtype=dtype)
    mask = torch.ones(23)
    mask[[0, 5, 6, 22]] = 0
    logits[5], logits[6] = torch.nan, torch.inf
    target[0], target[22] = -100, 61
    logits.requires_grad_()
    out = vocab_parallel_loss(logits, target, EMO1, embedding.to(dtype), mask, return_entropy=True)
    (grad,) = grads(out.loss.sum(), logits)
    dropped = mask == 0
    for values in (*out[:5], grad):
        assert torch.isfinite(values).all()
        assert (values[dropped] == 0).all()
    kept = vocab_parallel_loss(logits[~dropped], target[~dropped], EMO1, embedding.to(dtype))
    torch.testing.assert_close(out.loss[~dropped], kept.loss, rtol=0, atol=0)


def test_all_masked_batch_is_zero_not_nan():
    logits, target, embedding = example(dtype=torch.float16)
    logits.requires_grad_()
    out = vocab_parallel_loss(logits, target, EMO1, embedding, torch.zeros(23))
    (grad,) = grads(out.loss.sum(), logits)
    assert (out.loss == 0).all() and (grad == 0).all()


def test_bad_logits_spoil_their_own_token_only():
    logits, target, embedding = example(dtype=torch.float32)
    clean = vocab_parallel_loss(logits, target, EMO1, embedding.float()).loss
    logits[3, 7], logits[4, 2] = torch.nan, torch.inf
    logits[9], logits[10, ::2] = -torch.inf, -torch.inf
    target[10] = 1
    loss = vocab_parallel_loss(logits, target, EMO1, embedding.float()).loss
    assert not torch.isfinite(loss[[3, 4, 9]]).any()
    assert torch.isfinite(loss[10])
    untouched = [i for i in range(23) if i not in (3, 4, 9, 10)]
    assert torch.equal(loss[untouched], clean[untouched])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inputs_are_not_written_to(dtype):
    logits, target, embedding = example(dtype=dtype)
    embedding = embedding.to(dtype).requires_grad_()
    logits.requires_grad_()
    mask = torch.randint(0, 2, target.shape)
    target[mask == 0] = -100
    before = [x.detach().clone() for x in (logits, target, embedding, mask)]
    out = vocab_parallel_loss(logits, target, EMO1, embedding, mask, return_entropy=True)
    out.loss.sum().backward()
    for now, then in zip((logits, target, embedding, mask), before, strict=True):
        assert torch.equal(now.detach(), then)
    assert embedding.grad is None


def test_gradient_can_be_taken_twice_from_one_graph():
    logits, target, embedding = example()
    logits.requires_grad_()
    loss = vocab_parallel_loss(logits, target, EMO1, embedding).loss.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_only_loss_carries_gradient():
    logits, target, embedding = example()
    out = vocab_parallel_loss(logits.requires_grad_(), target, EMO1, embedding, return_entropy=True)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:5])


def test_zero_rows_cost_one_and_norms_do_not_matter():
    logits, target, embedding = example()
    embedding[40:] = 0
    target = target.clamp(max=39)
    lengths = torch.rand(61, 1, dtype=torch.float64) * 100 + 0.1
    out = vocab_parallel_loss(logits, target, EMO1, embedding)
    scaled = vocab_parallel_loss(logits, target, EMO1, embedding * lengths)
    torch.testing.assert_close(out.emo_loss, scaled.emo_loss, rtol=0, atol=1e-14)
    # Moving all mass to zero rows makes the expected cost 1.
    logits[:, :40] = -1e4
    certain = vocab_parallel_loss(logits, target, EMO1, embedding)
    torch.testing.assert_close(certain.emo_loss, torch.ones_like(certain.emo_loss))


def test_a_target_without_direction_costs_nothing_itself():
    # Its row is zero, so cos(e_t, e_t) is 0: the cost of predicting it right is 0 all the same.
    logits, target, embedding = example()
    embedding[target] = 0
    logits.requires_grad_()
    out = vocab_parallel_loss(logits, target, build_objective("emo"), embedding)
    (grad,) = grads(out.loss.sum(), logits)
    exact = logits.detach().requires_grad_()
    error = 1 - torch.softmax(exact, 1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(out.loss, error)
    torch.testing.assert_close(grad, grads(error.sum(), exact)[0])


def test_any_leading_shape():
    logits, target, embedding = example(tokens=24)
    flat = vocab_parallel_loss(logits, target, EMO1, embedding).loss
    folded = vocab_parallel_loss(logits.view(2, 3, 4, 61), target.view(2, 3, 4), EMO1, embedding)
    assert torch.equal(folded.loss, flat.view(2, 3, 4))
    transposed = logits.view(6, 4, 61).transpose(0, 1)
    out = vocab_parallel_loss(transposed, target.view(6, 4).T, EMO1, embedding).loss
    assert torch.equal(out, flat.view(6, 4).T)
    empty = vocab_parallel_loss(logits[:0], target[:0], EMO1, embedding)
    assert empty.loss.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": [-100, 61, 0]}, r"\[0, 61\).*got 2 outside, the first -100 at flat position 0"),
        ({"target": [0, 60, 0], "vocab_size": 60}, r"\[0, 60\).*got 1 outside, the first 60"),
        ({"target": [[0, 1, 2]]}, r"target: expected integers of shape \(3,\)"),
        ({"target": [0.0, 1.0, 2.0]}, "target: expected integers"),
        ({"loss_mask": torch.ones(2)}, r"loss_mask: expected shape \(3,\), got \(2,\)"),
        ({"cost_embedding": None}, "objective emo1 needs one"),
        ({"cost_embedding": torch.ones(60, 2)}, r"expected \[61, D\].*got \[60, 2\]"),
        ({"logits": torch.ones(3, 61, dtype=torch.long)}, "expected a float dtype"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {
        "logits": torch.randn(3, 61),
        "target": [0, 1, 2],
        "cost_embedding": torch.randn(61, 4),
        **change,
    }
    logits, target = call.pop("logits"), torch.tensor(call.pop("target"))
    with pytest.raises(ValueError, match=message):
        vocab_parallel_loss(logits, target, EMO1, **call)


def test_no_warning_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, target, embedding = example(dtype=torch.bfloat16)
        vocab_parallel_loss(logits.requires_grad_(), target, EMO1, embedding).loss.sum().backward()
