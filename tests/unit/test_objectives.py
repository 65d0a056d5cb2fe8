"""Objectives: hand-computed golden numbers, gradients against autograd of the written-out
equations, ranges."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_emo import build_objective, vocab_parallel_loss
from megatron_emo.config import ObjectiveConfig, ScheduleConfig
from megatron_emo.objectives import OBJECTIVES, ObjectiveWarning, blend_with_mle
from megatron_emo.reference import reference_loss

LOGITS = [2.0, 1.0, 0.0]
EMBEDDING = [[2.0, 0.0], [0.3, 0.4], [0.0, 3.0]]  # costs for target 0: 0, 0.4, 1

# Worked out in closed form from z = (2, 1, 0): q = softmax(z), c = (0, .4, 1), see docs/design.md.
GOLDEN = {
    "emo": (("emo", {}), 0.18792196, [-0.12501339, 0.05190153, 0.07311185]),
    "emo1": (("emo1", {}), 0.40760596, [-0.30295761, 0.17865190, 0.12430572]),
    "emo1 capped at 3": (
        ("emo1", {"weight_max": 3.0}),
        0.40760596,
        [-0.30295761, 0.17865190, 0.12430572],
    ),
    "emo1 detached target": (
        ("emo1", {"detach_target": True}),
        0.40760596,
        [-0.19724264, 0.13476244, 0.06248020],
    ),
    "emo2": (("emo2", {}), 0.37584392, [-0.27935013, 0.16473073, 0.11461939]),
    "emo2 half": (
        ("emo2", {"half": True}),
        0.37584392 / 2,
        [-0.27935013 / 2, 0.16473073 / 2, 0.11461939 / 2],
    ),
    "emo2 detached target": (
        ("emo2", {"detach_target": True, "weight_max": 1e9}),
        1.70632583,
        [-0.82569990, 0.56414442, 0.26155548],
    ),
    "mixce": (("mixce", {"eta": 0.5}), 0.33938107, [-0.27872724, 0.20376594, 0.07496130]),
    "tailr": (
        ("tailr", {"gamma": 0.5, "weight_min": 0.2}),
        0.32566600,
        [-0.26746331, 0.19553135, 0.07193196],
    ),
    "tvd": (("tvd", {"mixing_ratio": 0.8}), 0.40015166, [-0.32863696, 0.24025287, 0.08838409]),
    "focal": (("focal", {"gamma": 2.0}), 0.04567780, [-0.09828779, 0.07185414, 0.02643366]),
}


def fast(logits, target, name, embedding, **settings):
    objective = build_objective(name, **settings)
    return vocab_parallel_loss(logits, target, objective, cost_embedding=embedding)


@pytest.mark.parametrize("implementation", [fast, reference_loss])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_value_and_gradient(case, implementation):
    (name, settings), loss, gradient = GOLDEN[case]
    logits = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    embedding = torch.tensor(EMBEDDING, dtype=torch.float64)
    out = implementation(logits, torch.tensor([0]), name, embedding, **settings)
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(loss, abs=6e-9)
    assert logits.grad[0].tolist() == pytest.approx(gradient, abs=6e-9)


def test_statistics_of_the_golden_case():
    logits = torch.tensor([LOGITS], dtype=torch.float64)
    out = fast(logits, torch.tensor([0]), "mle", torch.tensor(EMBEDDING, dtype=torch.float64))
    assert out.mle_loss.item() == pytest.approx(0.40760596, abs=6e-9)
    assert out.emo_loss.item() == pytest.approx(0.18792196, abs=6e-9)


VARIANTS = [
    ("mle", {}),
    ("emo", {}),
    ("emo", {"detach_target": True}),
    ("emo1", {}),
    ("emo1", {"weight_max": 3.0}),
    ("emo1", {"weight_max": 3.0, "half": False, "detach_target": True}),
    ("emo1", {"ratio_eps": 1e-2}),
    ("emo2", {}),
    ("emo2", {"half": True}),
    ("emo2", {"weight_max": 0.1, "detach_target": True}),
    ("emo2", {"emo_scale": 5.0}),
    ("mixce", {"eta": 0.1}),
    ("tailr", {"gamma": 0.8}),
    ("tailr", {}),
    ("tvd", {"mixing_ratio": 0.3}),
    ("focal", {}),
    ("focal", {"gamma": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_variant_matches_reference(name, settings):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(7, 5, 37, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    target = torch.randint(0, 37, (7, 5), generator=generator)
    embedding = torch.randn(37, 6, generator=generator, dtype=torch.float64)
    upstream = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    expected = reference_loss(logits, target, name, embedding, **settings)
    (expected_grad,) = torch.autograd.grad((expected.loss * upstream).sum(), logits)
    out = fast(logits, target, name, embedding, **settings)
    (grad,) = torch.autograd.grad((out.loss * upstream).sum(), logits)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
    assert grad.sum(-1).abs().max() < 1e-13, "logits have a direction of no effect: all ones"


def test_every_objective_is_covered_above():
    assert {name for name, _ in VARIANTS} == set(OBJECTIVES)


def test_constant_embedding_has_no_cost_and_orthonormal_gives_the_error_probability():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 8, 8])
    constant = fast(logits, target, "emo", torch.ones(9, 2, dtype=torch.float64))
    (grad,) = torch.autograd.grad(constant.loss.sum(), logits)
    assert constant.loss.abs().max() < 1e-15 and grad.abs().max() < 1e-15
    orthonormal = fast(logits, target, "emo", torch.eye(9, dtype=torch.float64))
    q_t = torch.softmax(logits, -1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(orthonormal.loss, 1 - q_t)


def test_emo1_value_stays_near_the_cross_entropy():
    logits = torch.randn(50, 30, dtype=torch.float64)
    out = fast(logits, torch.randint(0, 30, (50,)), "emo1", torch.randn(30, 5).double())
    torch.testing.assert_close(out.loss, out.mle_loss, rtol=1e-6, atol=0)


def test_emo2_with_detached_target_keeps_a_gradient_on_learnt_tokens():
    # The trap that the warning names: compare the gradient's size at q_t = .999 with the plain
    # form's.
    logits = torch.zeros(1, 1000, dtype=torch.float64)
    logits[0, 0] = math.log(999 * 999)
    embedding = torch.randn(1000, 64, dtype=torch.float64)

    def gradient_norm(**settings):
        z = logits.clone().requires_grad_()
        fast(z, torch.tensor([0]), "emo2", embedding, **settings).loss.sum().backward()
        return z.grad.norm().item()

    with pytest.warns(ObjectiveWarning, match="weight_max"):
        trapped = gradient_norm(detach_target=True)
    assert trapped > 0.9
    assert gradient_norm() < 3e-3


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_blend_is_linear_in_share(share):
    m = torch.rand(20, dtype=torch.float64) * 3
    d = torch.rand(20, dtype=torch.float64)
    q_t = torch.exp(-m)
    objective = build_objective("emo1", weight_max=3.0)
    full, mle = objective(m, q_t, d), build_objective("mle")(m, q_t, d)
    for blended, x, y in zip(blend_with_mle(objective, share)(m, q_t, d), mle, full, strict=True):
        torch.testing.assert_close(blended, (1 - share) * x + share * y, rtol=0, atol=1e-15)


def test_schedule_counts_iterations_from_one():
    schedule = ScheduleConfig(start_iter=10, ramp_iters=4)
    assert [schedule.share(i) for i in (1, 10, 11, 12, 14, 15)] == [0, 0, 0.25, 0.5, 1, 1]
    assert ScheduleConfig().share(1) == 1.0
    assert [ScheduleConfig(start_iter=3).share(i) for i in (3, 4)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_objective("emo3"), "expected one of mle, emo1.*got 'emo3'"),
        (lambda: build_objective("emo1", cap=3.0), "unknown setting cap"),
        (lambda: build_objective("mixce", weight_max=3.0), "mixce: does not have weight_max"),
        (lambda: build_objective("emo1", weight_max=-1.0), "weight_max: expected > 0.0, got -1.0"),
        (lambda: build_objective("mixce", eta=1.5), "eta: expected >= 0.0 and <= 1.0, got 1.5"),
        (lambda: build_objective("emo1", ratio_eps=0.0), "ratio_eps: expected > 0.0"),
        (lambda: ObjectiveConfig(weight_max=math.nan), "weight_max"),
        (lambda: ScheduleConfig(start_iter=-1), "start_iter: expected >= 0, got -1"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
