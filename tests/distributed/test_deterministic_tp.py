"""The same bits at 1, 2, 4 and 8 ranks: every rank forms the whole answer of one rank by itself,
from the same full tensors, and compares its part of what the group found."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_emo import build_objective, fused_linear_loss, vocab_parallel_loss
from megatron_emo.benchmark.collectives import CollectiveCounter
from megatron_emo.cost_embedding import unit_rows
from megatron_emo.cost_embedding.narrow import DTYPES, narrow_rows
from megatron_emo.loss import fused_linear

BLOCKS = 8
SHAPES = {  # vocabulary, padded, hidden size, width of the table, sequence x batch
    "96": (90, 96, 7, 5, (8, 4)),
    "4096": (4096, 4096, 96, 64, (16, 4)),
    "50304": (50257, 50304, 16, 12, (8, 3)),
    "32003": (32003, 32768, 24, 12, (8, 3)),
}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
WORLD_SIZES = [2, 4, 8]


def ulps(ours, exact):
    """How many numbers differ in any bit; two NaN are alike."""
    assert ours.dtype == exact.dtype and ours.shape == exact.shape
    if not ours.is_floating_point():
        return int((ours != exact).sum())
    bits = BITS[ours.element_size()]
    same = ours.contiguous().view(bits) == exact.contiguous().view(bits)
    return int((~same & ~(ours.isnan() & exact.isnan())).sum())


def part_of(size, rank=None):
    rank, ranks = dist.get_rank() if rank is None else rank, dist.get_world_size()
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def build_case(shape, dtype, scale=1.0):
    """The same full tensors on every rank."""
    vocab, padded, hidden, width, tokens = SHAPES[shape]
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    x, w = normal(*tokens, hidden) * scale, normal(padded, hidden) * (2 / hidden**0.5)
    table = torch.cat([normal(vocab, width), torch.zeros(padded - vocab, width)])
    target = torch.randint(0, vocab, tokens, generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3).float()
    upstream = torch.rand(tokens, generator=generator) * mask
    x[mask == 0] = torch.nan  # what a masked token holds must reach nobody
    return x.to(dtype), w.to(dtype), unit_rows(table), target, mask, upstream


def run(case, group, path, upstream, blocks=BLOCKS, sequence_parallel=False, name="emo1"):
    """Return the results and gradients that one rank, or each rank of a group, gets."""
    x, w, table, target, mask, _ = case
    if group is not None:
        rows = part_of(len(w))
        w, table = w[rows].clone(), table[rows]  # as a rank that never held more
        x = x[part_of(len(x))] if sequence_parallel else x
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = fused_linear_loss(
        x,
        w,
        target,
        build_objective(name),
        table,
        mask,
        group,
        path,
        cost_embedding_is_normalized=True,
        return_entropy=True,
        return_argmax=True,
        sequence_parallel=sequence_parallel,
        deterministic_blocks=blocks,
    )
    grads = torch.autograd.grad((out.loss * upstream).sum(), (x, w))
    return [value.detach() for value in out], *grads


def count_different(case, path, upstream, sequence_parallel=False, **settings):
    """Return name -> how many numbers differ from those of one rank."""
    exact, exact_x, exact_w = run(case, None, path, upstream, **settings)
    group = dist.group.WORLD
    out, grad_x, grad_w = run(
        case, group, path, upstream, sequence_parallel=sequence_parallel, **settings
    )
    names = ("loss", "m", "d", "weight", "entropy", "argmax")
    found = {name: ulps(*pair) for name, *pair in zip(names, out, exact, strict=True)}
    exact_x = exact_x[part_of(len(exact_x))] if sequence_parallel else exact_x
    found["dX"], found["dW"] = ulps(grad_x, exact_x), ulps(grad_w, exact_w[part_of(len(exact_w))])
    return found


def check_same_bits(shape, dtype, scale, sequence_parallel):
    case = build_case(shape, dtype, scale)
    tokens, width = case[3].numel(), SHAPES[shape][1]
    usual = fused_linear._CHUNK_BYTES["cpu"]
    per_token, uniform = case[5], case[4] * 0.37
    runs = [("logits", per_token), ("recompute", per_token)]
    runs += [("forward", per_token), ("forward", uniform)]
    try:
        for path, upstream in runs:
            # About three chunks of tokens; logits and costs in fp32.
            columns = width if path == "forward" else width // BLOCKS
            fused_linear._CHUNK_BYTES["cpu"] = tokens // 4 * columns * 2 * 4
            found = count_different(case, path, upstream, sequence_parallel)
            assert not any(found.values()), (path, found)
    finally:
        fused_linear._CHUNK_BYTES["cpu"] = usual


def matrix():
    """Every combination; what shows most for its time is in the fast tier."""
    for world_size in WORLD_SIZES:
        for shape in SHAPES:
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                for is_sp in (False, True):
                    is_fast = world_size == 4 and (shape, is_sp) in {("96", True), ("4096", False)}
                    yield pytest.param(
                        *(world_size, shape, dtype, is_sp),
                        id=f"{world_size}-{shape}-{name}" + ("-sp" if is_sp else ""),
                        marks=() if is_fast else pytest.mark.slow,
                    )


@pytest.mark.parametrize(("world_size", "shape", "dtype", "sequence_parallel"), list(matrix()))
def test_same_bits_at_any_number_of_ranks(
    run_distributed, world_size, shape, dtype, sequence_parallel
):
    run_distributed(world_size)(
        check_same_bits,
        shape=shape,
        dtype=dtype,
        scale=1.0,
        sequence_parallel=sequence_parallel,
    )


SOME = [pytest.param(n, marks=() if n == 2 else pytest.mark.slow) for n in WORLD_SIZES]
"""Two ranks in the fast tier."""


@pytest.mark.parametrize("world_size", SOME)
@pytest.mark.parametrize("scale", [1e3, 3e4])
def test_same_bits_at_extreme_logits(run_distributed, world_size, scale):
    run_distributed(world_size)(
        check_same_bits, shape="96", dtype=torch.float32, scale=scale, sequence_parallel=False
    )


def check_default_differs():
    """These cases can tell: without fixed blocks their bits follow the ranks."""
    different = {}
    for shape in ("4096", "50304"):
        case = build_case(shape, torch.float32)
        found = count_different(case, "recompute", case[5], blocks=None)
        different[shape] = found
        assert found["m"] and found["loss"] and found["dX"], different


def test_default_mode_follows_the_ranks(run_distributed):
    run_distributed(4)(check_default_differs)


def check_logits_gradient(dtype, scale):
    vocab, padded, _, width, _ = SHAPES["4096"]
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(5, 3, padded, generator=generator) * scale
    logits[0, 0, part_of(padded, rank=1)] = -torch.inf  # blocks without a finite logit
    logits[0, 1, 7], logits[0, 2, 9] = torch.nan, torch.inf
    logits[1, 0], logits[1, 1, ::2] = 65504.0, -65504.0
    logits[1, 2] = 1e-40  # subnormal
    logits[2, 0] = torch.nan
    logits = logits.to(dtype)
    table = unit_rows(torch.randn(vocab, width, generator=generator))
    target = torch.randint(0, vocab, (5, 3), generator=generator)
    mask = torch.ones(5, 3)
    mask[2, :2] = 0
    for name in ("mle", "emo1", "emo2", "focal"):
        results = []
        for group, rows in ((None, slice(None)), (dist.group.WORLD, part_of(padded))):
            z = logits[..., rows].clone().requires_grad_()
            out = vocab_parallel_loss(
                z,
                target,
                build_objective(name),
                table[rows],
                mask,
                group,
                cost_embedding_is_normalized=True,
                return_entropy=True,
                return_argmax=True,
                deterministic_blocks=BLOCKS,
            )
            (grad,) = torch.autograd.grad((out.loss * 0.3).sum(), z)
            results.append([value.detach() for value in (*out, grad)])
        results[0][-1] = results[0][-1][..., part_of(padded)]
        found = [ulps(*pair) for pair in zip(*results, strict=True)]
        assert not any(found), (name, found)


@pytest.mark.parametrize("world_size", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_same_bits_from_logits(run_distributed, world_size, dtype, scale):
    run_distributed(world_size)(check_logits_gradient, dtype=dtype, scale=scale)


def check_narrow_tables():
    x, w, table, *others = build_case("4096", torch.float32)
    for name, dtype in DTYPES.items():
        # A rank narrows its own rows, as a run does.
        whole = narrow_rows(table, dtype)
        mine = narrow_rows(table[part_of(len(table))], dtype)
        as_bytes = whole[part_of(len(table))].contiguous().view(torch.uint8)
        assert torch.equal(mine.view(torch.uint8), as_bytes), name
        case = (x, w, whole, *others)
        found = count_different(case, "recompute", case[5])
        assert not any(found.values()), (name, found)


def test_same_bits_with_narrow_tables(run_distributed):
    run_distributed(4)(check_narrow_tables)


def check_main_grad(path):
    x, w, table, target, mask, upstream = build_case("96", torch.bfloat16)
    results = []
    for group, rows in ((None, slice(None)), (dist.group.WORLD, part_of(len(w)))):
        weight = w[rows].clone().requires_grad_()
        weight.main_grad = torch.full(weight.shape, 0.1)
        for scale in (1.0, 0.37):  # two microbatches
            out = fused_linear_loss(
                x,
                weight,
                target,
                build_objective("emo1"),
                table[rows],
                mask,
                group,
                path,
                into_main_grad=True,
                deterministic_blocks=BLOCKS,
            )
            (out.loss * upstream).sum().mul(scale).backward()
        results.append(weight.main_grad)
    assert not ulps(results[1], results[0][part_of(len(w))])


@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
def test_same_bits_in_main_grad(run_distributed, path):
    run_distributed(4)(check_main_grad, path=path)


def check_collectives(sequence_parallel):
    size = dist.get_world_size()
    x, w, table, target, mask, upstream = build_case("4096", torch.bfloat16)
    rows, part = part_of(len(w)), part_of(len(x)) if sequence_parallel else slice(None)
    local_x, local_w = x[part].clone().requires_grad_(), w[rows].clone().requires_grad_()
    with CollectiveCounter() as forward:
        out = fused_linear_loss(
            local_x,
            local_w,
            target,
            build_objective("emo1"),
            table[rows],
            mask,
            dist.group.WORLD,
            "logits",
            cost_embedding_is_normalized=True,
            sequence_parallel=sequence_parallel,
            deterministic_blocks=BLOCKS,
        )
    with CollectiveCounter() as backward:
        torch.autograd.grad((out.loss * upstream).sum(), (local_x, local_w))
    counted = target[mask != 0]
    gather = [("all_gather", x.numel() // size, x.numel() // size * 2)] * sequence_parallel
    cost_rows = counted.unique().numel() * table.shape[1]
    statistics = BLOCKS // size * 4 * counted.numel()
    calls = [
        [(call.name, call.numel, call.num_bytes) for call in c.calls] for c in (forward, backward)
    ]
    assert calls[0] == [
        ("all_reduce", cost_rows, cost_rows * 4),
        *gather,
        ("all_gather", statistics, statistics * 4),
    ]
    exchange = ("all_to_all_single", x.numel(), x.numel() * 4)
    rounded = ("all_gather", x.numel() // size, x.numel() // size * 2)
    assert calls[1] == [*gather, exchange, *([] if sequence_parallel else [rounded])]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_collectives_are_as_the_docstring_says(run_distributed, world_size, sequence_parallel):
    run_distributed(world_size)(check_collectives, sequence_parallel=sequence_parallel)


def check_tokens_that_ranks_do_not_divide():
    x, w, table, target, mask, upstream = build_case("96", torch.float32)
    case = (x[:5, :3], w, table, target[:5, :3], mask[:5, :3], upstream[:5, :3])
    found = count_different(case, "recompute", case[5])
    assert not any(found.values()), found


def test_tokens_that_ranks_do_not_divide(run_distributed):
    run_distributed(4)(check_tokens_that_ranks_do_not_divide)


def check_too_few_blocks():
    x, w, table, target, mask, _ = build_case("96", torch.float32)
    rows = part_of(len(w))
    with pytest.raises(ValueError, match="expected a multiple of the 4 tensor-parallel.*got 2"):
        fused_linear_loss(
            x, w[rows], target, build_objective("emo1"), table[rows], mask, dist.group.WORLD,
            deterministic_blocks=2,
        )  # fmt: skip


def test_fewer_blocks_than_ranks_are_refused(run_distributed):
    run_distributed(4)(check_too_few_blocks)
