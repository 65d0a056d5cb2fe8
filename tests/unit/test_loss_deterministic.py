"""Fixed vocabulary blocks on one rank: values, order of sums, refusals. That ranks give the same
bits: tests/distributed/test_deterministic_tp.py."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import narrow_rows
from megatron_emo.loss import fused_linear
from megatron_emo.loss.statistics import Shard, make_shard
from megatron_emo.loss.vocabulary_blocks import OrderedReduction, TreeSum, blocks_of, tree_sum
from megatron_emo.reference import reference_loss
from megatron_emo.training.arguments import add_emo_arguments, emo_config_from_args

PATHS = ("logits", "recompute", "forward")
EMO1 = build_objective("emo1")
VOCAB, PADDED, HIDDEN = 90, 96, 7


def example(dtype=torch.float64):
    x = torch.randn(4, 6, HIDDEN, dtype=torch.float64).to(dtype).requires_grad_()
    # Logits of standard deviation 2: fp32 logits themselves carry an error in proportion to them.
    w = torch.randn(PADDED, HIDDEN, dtype=torch.float64) * (2 / HIDDEN**0.5)
    w = w.to(dtype).requires_grad_()
    embedding = torch.randn(PADDED, 5, dtype=torch.float64)
    embedding[VOCAB:] = 0
    mask = (torch.rand(4, 6) > 0.3).double()
    return x, w, torch.randint(0, VOCAB, (4, 6)), embedding.to(dtype), mask


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["mle", "emo1", "emo2"])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per token"])
@pytest.mark.parametrize("blocks", [1, 2, 8, 32])
def test_matches_reference(monkeypatch, path, name, uniform, blocks):
    monkeypatch.setitem(fused_linear._CHUNK_BYTES, "cpu", 5 * 2 * PADDED * 8)
    x, w, target, embedding, mask = example()
    upstream = mask * (0.3 if uniform else torch.rand_like(mask))
    out = fused_linear_loss(
        x,
        w,
        target,
        build_objective(name),
        embedding,
        mask,
        path=path,
        return_entropy=True,
        return_argmax=True,
        deterministic_blocks=blocks,
    )
    grads = torch.autograd.grad((out.loss * upstream).sum(), (x, w))
    logits = x @ w.T
    expected = reference_loss(logits, target, name, embedding, loss_mask=mask)
    for field in ("loss", "mle_loss", "emo_loss", "entropy"):
        ours, true = getattr(out, field), getattr(expected, field)
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12, msg=field)
    assert torch.equal(out.argmax, logits.argmax(dim=-1) * (mask != 0))
    true_grads = torch.autograd.grad((expected.loss * upstream).sum(), (x, w))
    for grad, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logits_match_reference(blocks, scale):
    _, _, target, embedding, mask = example()
    logits = (torch.randn(4, 6, PADDED, dtype=torch.float64) * scale).requires_grad_()
    before = logits.detach().clone()
    out = vocab_parallel_loss(
        logits, target, EMO1, embedding, mask, return_argmax=True, deterministic_blocks=blocks
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    expected = reference_loss(logits, target, "emo1", embedding, loss_mask=mask)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-12)
    (true,) = torch.autograd.grad(expected.loss.sum(), logits)
    torch.testing.assert_close(grad, true, rtol=1e-12, atol=1e-12)
    assert torch.equal(out.argmax, logits.argmax(dim=-1) * (mask != 0))
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_the_truth_as_the_default(path, dtype):
    x, w, target, embedding, mask = example(dtype)
    embedding = embedding.float()
    exact_x, exact_w = (v.detach().double().requires_grad_() for v in (x, w))
    expected = reference_loss(
        exact_x @ exact_w.T, target, "emo1", embedding.double(), loss_mask=mask
    )
    true = [
        expected.loss.detach(),
        *torch.autograd.grad((expected.loss * mask).sum(), (exact_x, exact_w)),
    ]
    errors = []
    for blocks in (None, 8):
        out = fused_linear_loss(
            x, w, target, EMO1, embedding, mask, path=path, deterministic_blocks=blocks
        )
        grads = torch.autograd.grad((out.loss * mask).sum(), (x, w))
        pairs = zip((out.loss.detach(), *grads), true, strict=True)
        errors.append([(ours.double() - exact).norm() / exact.norm() for ours, exact in pairs])
    for default, fixed in zip(*errors, strict=True):
        assert fixed <= (1e-6 if dtype == torch.float32 else 1.1 * default)


def test_bf16_gradient_of_hidden_states_is_rounded_once():
    # Eight partial sums in fp32, then one rounding: nearer than eight rounded ones.
    x, w, target, embedding, mask = example(torch.bfloat16)
    out = fused_linear_loss(
        x, w, target, EMO1, embedding, mask, path="recompute", deterministic_blocks=8
    )
    (grad,) = torch.autograd.grad((out.loss * mask).sum(), x)
    wide_x = x.detach().float().requires_grad_()
    z = wide_x @ w.detach().float().T
    z = z + (z.bfloat16().float() - z).detach()  # the logits as they are held
    dz = torch.autograd.grad(
        (vocab_parallel_loss(z, target, EMO1, embedding, mask).loss * mask).sum(), z
    )[0]
    true = (dz.bfloat16().double() @ w.detach().double()).to(torch.bfloat16)
    ulps = (grad.view(torch.int16).int() - true.view(torch.int16).int()).abs()
    assert (ulps > 1).sum() <= 0.02 * ulps.numel()
    assert (ulps > 0).sum() <= 0.1 * ulps.numel()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_order_of_a_sum_does_not_follow_who_adds(count):
    summands = torch.randn(count, 1000) * 10.0 ** torch.randint(-3, 4, (count, 1000))
    expected = list(summands)
    while len(expected) > 1:
        expected = [a + b for a, b in zip(expected[::2], expected[1::2], strict=True)]
    assert torch.equal(tree_sum(summands), expected[0])
    ranks = 1
    while ranks <= count:
        parts = []
        for part in summands.view(ranks, count // ranks, -1):
            adder = TreeSum(len(part))
            for _ in range(2):  # it begins anew
                given = [adder.add(x.clone()) for x in part]
                assert all(x is None for x in given[:-1])
            parts.append(given[-1])
        assert torch.equal(tree_sum(torch.stack(parts)), expected[0]), ranks
        ranks *= 2


def test_one_ranks_sum_is_scaled_then_rounded():
    summand = torch.randn(5, 3)
    scaled = OrderedReduction(
        summand.clone(), None, torch.bfloat16, keep_part=False, scale=torch.tensor(0.37)
    )
    assert torch.equal(scaled.get(), (summand * 0.37).bfloat16())


def test_blocks_are_the_same_whoever_holds_them():
    def starts(shard):
        return [(x.shard.vocab_start_index, x.shard.partition_vocab_size) for x in blocks_of(shard)]

    whole = make_shard(96, None, 8)
    assert starts(whole) == [(12 * i, 12) for i in range(8)]
    assert [x.rows for x in blocks_of(whole)] == [slice(12 * i, 12 * i + 12) for i in range(8)]
    for ranks in (2, 4, 8):
        parts = [
            Shard(96 // ranks * rank, 96 // ranks, None, 8 // ranks, True) for rank in range(ranks)
        ]
        assert sum(map(starts, parts), []) == starts(whole)
    assert starts(make_shard(96, None)) == [(0, 96)]


def test_what_products_read_lies_at_a_round_address():
    buffer = torch.randn(PADDED * 3 + 1)
    odd = buffer[1:].view(PADDED, 3)  # 4 bytes past a round address
    for block in blocks_of(make_shard(PADDED, None, 32)):
        rows = block.rows_of(odd)
        assert rows.data_ptr() % 64 == 0 and torch.equal(rows, odd[block.rows])
    default = blocks_of(make_shard(PADDED, None))[0]
    assert default.rows_of(odd).data_ptr() == odd.data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_addresses_of_inputs_do_not_matter(path):
    x, w, target, embedding, _ = example(torch.float32)
    shifted = torch.empty(w.numel() + 1)[1:].view(w.shape).copy_(w.detach()).requires_grad_()
    results = []
    for weight in (w, shifted):
        weight.main_grad = torch.zeros(w.numel() + 1)[weight is shifted :][: w.numel()]
        weight.main_grad = weight.main_grad.view(w.shape)
        out = fused_linear_loss(
            x,
            weight,
            target,
            EMO1,
            embedding,
            path=path,
            into_main_grad=True,
            deterministic_blocks=32,
        )
        x.grad = None
        out.loss.sum().backward()
        results.append((out.loss.detach(), x.grad, weight.main_grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = torch.autograd.grad(fused_linear_loss(x, w, target, EMO1, embedding).loss.sum(), w)[
        0
    ]
    torch.testing.assert_close(w.main_grad, expected)


@pytest.mark.parametrize("path", PATHS)
def test_all_masked_is_zero(path):
    x, w, target, embedding, mask = example()
    out = fused_linear_loss(
        x, w, target, EMO1, embedding, mask * 0, path=path, deterministic_blocks=8
    )
    grads = torch.autograd.grad(out.loss.sum(), (x, w))
    assert (out.loss == 0).all() and all((grad == 0).all() for grad in grads)


def test_narrow_tables_are_cut_alike():
    x, w, target, embedding, _ = example(torch.float32)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        table = narrow_rows(unit_rows(embedding), dtype)
        default, fixed = (
            fused_linear_loss(
                x,
                w,
                target,
                EMO1,
                table,
                cost_embedding_is_normalized=True,
                deterministic_blocks=blocks,
            )
            for blocks in (None, 8)
        )
        torch.testing.assert_close(fixed.emo_loss, default.emo_loss, rtol=2e-6, atol=2e-6)


def test_chunks_follow_the_vocabulary_not_the_ranks():
    plan = SimpleNamespace(order=torch.zeros(100))
    hidden = torch.zeros(100, HIDDEN)
    found = {}
    for ranks in (1, 2, 4, 8):
        group = SimpleNamespace(size=lambda ranks=ranks: ranks)
        size = 65536 // ranks
        shard = Shard(0, size, group if ranks > 1 else None, 8 // ranks, True)
        for path in ("recompute", "forward"):
            chunks = fused_linear._chunks(path, plan, hidden, True, 4, shard)
            assert found.setdefault(path, chunks) == chunks, (path, ranks)
    # 4 MiB over 2 rows of 8,192 or of 65,536 fp32 numbers.
    assert found["recompute"][0] == slice(0, 64) and found["forward"][0] == slice(0, 8)


def test_auto_path_does_not_follow_the_ranks():
    weight = torch.zeros(65536 // 8, HIDDEN, requires_grad=True)
    plan = SimpleNamespace(order=torch.zeros(100), distinct=torch.zeros(50))
    group = SimpleNamespace(size=lambda: 8)
    sizes = ("auto", plan, torch.zeros(100, HIDDEN), weight, True, 8)
    fixed = Shard(0, 65536 // 8, group, 1, True)
    assert fused_linear._path_taken(*sizes, fixed) == "recompute"
    assert fused_linear._path_taken(*sizes, Shard(0, 65536 // 8, group)) == "logits"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (6, "deterministic_blocks: expected a power of two, got 6"),
        (0, "deterministic_blocks: expected a power of two, got 0"),
        (64, "deterministic_blocks: expected a divisor of the padded vocabulary 96, got 64"),
    ],
)
def test_bad_counts_are_named(blocks, message):
    x, w, target, embedding, _ = example()
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(x, w, target, EMO1, embedding, deterministic_blocks=blocks)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_loss(x @ w.T, target, EMO1, embedding, deterministic_blocks=blocks)


def config_of(*argv, **others):
    args = add_emo_arguments(argparse.ArgumentParser()).parse_args(argv)
    defaults = {"tensor_model_parallel_size": 2, "defer_embedding_wgrad_compute": False}
    for name, value in {**defaults, **others}.items():
        setattr(args, name, value)
    return emo_config_from_args(args)


def test_flags():
    assert config_of().loss_path.deterministic_blocks is None
    assert config_of("--emo-deterministic-blocks", "4").loss_path.deterministic_blocks is None
    assert config_of("--emo-deterministic-tp").loss_path.deterministic_blocks == 8
    argv = ("--emo-deterministic-tp", "--emo-deterministic-blocks", "2")
    assert config_of(*argv).loss_path.deterministic_blocks == 2


@pytest.mark.parametrize(
    ("argv", "others", "message"),
    [
        (("--emo-deterministic-blocks", "12"), {}, "expected a power of two, got 12"),
        (
            (),
            {"tensor_model_parallel_size": 16},
            "--emo-deterministic-blocks: expected a multiple of --tensor-model-parallel-size 16, "
            "got 8",
        ),
        (
            (),
            {"defer_embedding_wgrad_compute": True},
            "--emo-deterministic-tp: does not go with --defer-embedding-wgrad-compute",
        ),
        ((), {"fp8_output_proj": True}, "--emo-deterministic-tp: does not go with --fp8-output"),
        (
            ("--emo-cost-dim", "4", "--emo-cost-embedding", __file__),
            {},
            "--emo-deterministic-tp: does not go with --emo-cost-dim 4.*reduce the file once",
        ),
    ],
)
def test_flags_that_do_not_fit_are_named(argv, others, message):
    with pytest.raises(ValueError, match=message):
        config_of("--emo-deterministic-tp", *argv, **others)
