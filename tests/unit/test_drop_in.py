"""EMOLoss against the released wheels as oracles, and without their bugs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_emo import EMOLoss, build_objective, vocab_parallel_loss


def released(version: str):
    """The released function, from the wheel that `make env` puts beside the environment."""
    root = Path(sys.prefix) / "oracles" / f"EMOLoss-{version}" / "emo"
    if not root.is_dir():
        pytest.skip(f"EMOLoss {version} is not installed; `make env` does")
    spec = importlib.util.spec_from_file_location(f"emo_{version}", root / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EMOLoss


def example(dtype=torch.float64, scale=2.0):
    logits = (torch.randn(3, 9, 41, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    labels = torch.randint(0, 41, (3, 9))
    return logits, labels, torch.randn(41, 7, dtype=torch.float64).to(dtype)


def value_and_grad(function, logits, *args, **kwargs):
    loss = function(logits, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_release_0_0_3(mode, scale, masked):
    logits, labels, embedding = example(scale=scale)
    if masked:
        labels[torch.rand(labels.shape) < 0.4] = -100
    ours = value_and_grad(EMOLoss, logits, labels, embedding, mode=mode)
    theirs = value_and_grad(released("0.0.3"), logits, labels, embedding, mode=mode)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("mode", "name"), [(1, "emo1"), (2, "emo2")])
def test_objectives_equal_release_0_0_1(mode, name):
    logits, labels, embedding = example()

    def ours(z):
        objective = build_objective(name, half=True)
        return vocab_parallel_loss(z[:, :-1], labels[:, 1:], objective, embedding).loss.mean()

    for a, b in zip(
        value_and_grad(ours, logits),
        value_and_grad(released("0.0.1"), logits, labels, embedding, mode=mode),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
def test_any_ignore_index(mode, ignore_index):
    logits, labels, embedding = example()
    labels[:, ::3] = ignore_index
    value, grad = value_and_grad(
        EMOLoss, logits, labels, embedding, ignore_index=ignore_index, mode=mode
    )
    keep = labels[:, 1:] != ignore_index
    objective = build_objective("emo1", weight_max=3.0) if mode == 1 else build_objective("emo2")
    expected = vocab_parallel_loss(
        logits[:, :-1][keep], labels[:, 1:][keep], objective, embedding
    ).loss.mean()
    torch.testing.assert_close(value, expected)
    assert (grad[:, :-1][~keep] == 0).all() and (grad[:, -1] == 0).all()


@pytest.mark.parametrize("mode", [1, 2])
def test_fp16_with_ignored_tokens_is_finite(mode):
    logits, labels, embedding = example(torch.float16)
    labels[:, 2:5] = -100
    value, grad = value_and_grad(EMOLoss, logits, labels, embedding, mode=mode)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_zero_row_and_empty_batch_are_finite():
    logits, labels, embedding = example()
    embedding[4] = 0
    assert torch.isfinite(EMOLoss(logits, labels, embedding))
    assert EMOLoss(logits, torch.full_like(labels, -100), embedding) == 0


def test_table_receives_no_gradient():
    logits, labels, embedding = example()
    EMOLoss(logits, labels, embedding.requires_grad_()).backward()
    assert embedding.grad is None


def test_other_modes_are_refused():
    logits, labels, embedding = example()
    with pytest.raises(ValueError, match="mode: expected 1 or 2, got 3"):
        EMOLoss(logits, labels, embedding, mode=3)
