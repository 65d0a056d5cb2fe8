"""The cost model: collectives, bubbles, loss terms and layouts against hand computation."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_emo.benchmark import roofline
from megatron_emo.scaling.counts.devices import DEVICES
from megatron_emo.scaling.counts.flops import flops_per_token
from megatron_emo.scaling.counts.memory import Layout, activation_bytes
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.plans.plan_file import LossSettings, PlanError
from megatron_emo.scaling.speed import estimate_command
from megatron_emo.scaling.speed.cluster import Cluster, Efficiency, Link, cluster_of
from megatron_emo.scaling.speed.cluster_layouts import LayoutRules, find_obstacle, name_layout
from megatron_emo.scaling.speed.cluster_measure import SCHEMA, _Rank, cluster_from_entry, fit_line
from megatron_emo.scaling.speed.cost_model import estimate_step, run_pipeline
from megatron_emo.scaling.speed.cost_model_loss import LossTerms, cost_of_loss, make_loss_terms
from megatron_emo.scaling.speed.estimate import find_layouts, rank_layouts
from megatron_emo.scaling.speed.estimate_against import compare_measured, summarise_comparison
from megatron_emo.scaling.speed.throughput_file import parse_study

ROOT = Path(__file__).parents[2]
EIGHT_B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=14336,
    padded_vocab_size=131072,
    seq_length=8192,
    num_query_groups=8,
    swiglu=True,
    normalization="RMSNorm",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
MLE = LossTerms("recompute")
EMO = LossTerms("recompute", num_distinct=2458, cost_dim=4096, cost_bytes=2)
STUDY = {
    "name": "s",
    "batch": 512,
    "model": {"vocab_size": 128256, "seq_length": 8192},
    "sizes": {"8b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 14336, "query_groups": 8}},
    "layouts": [{"data_parallel": 8}],
}


@pytest.fixture
def bare() -> Cluster:
    """Rates that make sums easy: 8 ranks a node, 100 and 10 bytes/s, 1 and 2 s a step."""
    return Cluster(
        name="bare",
        flops=1e3,
        attention_flops=1e3,
        memory_bandwidth=1e3,
        start_s=0.0,
        memory=None,
        ranks_per_node=8,
        within=Link(1.0, 100.0),
        between=Link(2.0, 10.0),
    )


@pytest.fixture
def h100() -> Cluster:
    return cluster_of(DEVICES["h100"], "bf16", Efficiency())


def test_collectives_take_the_steps_and_bytes_of_halving_and_doubling(bare):
    # 4 of 8 ranks: 2 steps each way; 3/4 of 800 bytes sent, twice for an all-reduce.
    assert bare.all_reduce(800, 4) == pytest.approx(2 * 2 * 1.0 + 2 * 600 / 100)
    assert bare.all_gather(800, 4) == pytest.approx(2 * 1.0 + 600 / 100)
    assert bare.reduce_scatter(800, 4) == pytest.approx(2 * 1.0 + 600 / 100)
    assert bare.all_to_all(800, 4) == pytest.approx(3 * 1.0 + 600 / 100)
    assert bare.send(800, stride=1) == pytest.approx(1.0 + 8.0)
    assert bare.all_reduce(800, 1) == bare.all_gather(800, 1) == 0.0


def test_between_nodes_a_group_has_the_cards_of_its_members_there(bare):
    # 16 ranks side by side on 2 nodes: 8 cards of 10 bytes/s are 80, below 100 within.
    assert bare.all_gather(1600, 16) == pytest.approx(4 * 2.0 + 1500 / 80)
    # Every 8th rank: one card a node.
    assert bare.all_gather(1600, 16, stride=8) == pytest.approx(4 * 2.0 + 1500 / 10)
    fast = replace(bare, between=Link(2.0, 1000.0))
    assert fast.all_gather(1600, 16) == pytest.approx(4 * 2.0 + 1500 / 100)
    # Each byte of an all-to-all passes one card.
    assert bare.all_to_all(1600, 16) == pytest.approx(15 * 2.0 + 1500 / 10)


def test_products_take_the_longer_of_flops_and_bytes(bare):
    assert bare.product(10, 20, 30) == pytest.approx(12000 / 1e3)
    # One row: 2 bytes for each of 20 x 30 weights and the vectors.
    assert bare.product(1, 20, 30) == pytest.approx(max(1.2, 2 * (30 + 600 + 20) / 1e3))
    tiled = replace(bare, num_units=4)
    whole = 2 * 256 * 256 * 512 / 1e3
    assert tiled.product(256, 256, 512) == pytest.approx(whole)
    # A fifth tile takes a second wave of four; a column more than a tile costs a whole one.
    assert tiled.product(128, 5 * 128, 512) == pytest.approx(2 * 128 * 640 * 512 / 1e3 * 8 / 5)
    assert tiled.product(256, 129, 512) == pytest.approx(whole)


@pytest.mark.parametrize(("p", "m", "v"), [(1, 4, 1), (2, 4, 1), (4, 8, 1), (4, 8, 2), (8, 8, 4)])
def test_the_bubble_of_equal_stages_is_the_known_share(p, m, v):
    seconds = run_pipeline([0.5] * p, m, v)
    assert seconds == pytest.approx(0.5 * (m + (p - 1) / v))
    assert (seconds - 0.5 * m) / seconds == pytest.approx((p - 1) / (v * m + p - 1))


def test_the_bubble_is_what_a_simulated_schedule_leaves():
    """One forward, one backward, by events: stages start when their neighbours have ended."""
    forward, backward = [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]
    num_stages, num_microbatches = 3, 5
    done: dict[tuple[int, str, int], float] = {}
    orders = []
    for stage in range(num_stages):
        warm = min(num_stages - 1 - stage, num_microbatches)
        order = [("F", i) for i in range(warm)]
        for i in range(num_microbatches - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(num_microbatches - warm, num_microbatches)])
    clock, position = [0.0] * num_stages, [0] * num_stages
    while any(position[s] < len(orders[s]) for s in range(num_stages)):
        for stage in range(num_stages):
            if position[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][position[stage]]
            needs = (stage - 1, "F", i) if kind == "F" else (stage + 1, "B", i)
            if 0 <= needs[0] < num_stages and needs not in done:
                continue
            start = max(clock[stage], done.get(needs, 0.0))
            clock[stage] = start + (forward if kind == "F" else backward)[stage]
            done[stage, kind, i] = clock[stage]
            position[stage] += 1
    assert run_pipeline([3.0] * 3, num_microbatches) == pytest.approx(max(clock))


def test_terms_add_up_and_compute_is_no_less_than_the_exact_flops_at_full_rate(h100):
    layout = Layout(gpus=8, tensor_parallel=2, pipeline_parallel=2, micro_batch_size=1)
    step = estimate_step(EIGHT_B, layout, 64, EMO, h100)
    assert step.total == pytest.approx(sum(vars(step).values()))
    assert all(seconds >= 0 for seconds in vars(step).values())
    flops = flops_per_token(EIGHT_B)
    layers = sum(flops[part] for part in ("attention", "core_attention", "mlp"))
    per_rank = layers * 64 * 8192 / 8
    assert step.compute > per_rank / h100.flops
    assert step.compute < 2 * per_rank / h100.flops


def test_without_parallelism_nothing_is_communicated(h100):
    step = estimate_step(EIGHT_B, Layout(), 4, MLE, h100)
    assert step.tensor == step.context == step.pipeline == step.bubble == step.data == 0


def test_bytes_of_tensor_parallel_layers(bare):
    """Four all-reduces of a hidden state a layer; on a CPU none is hidden."""
    cpu = replace(bare, is_cpu=True, itemsize=4, cores=8)
    layout = Layout(gpus=2, tensor_parallel=2, sequence_parallel=False, distributed_optimizer=False)
    step = estimate_step(EIGHT_B, layout, 3, MLE, cpu)
    one = cpu.all_reduce(8192 * 4096 * 4, 2)
    assert step.tensor == pytest.approx(3 * 32 * 4 * one)


def test_data_parallel_gradients_are_reduced_once_in_fp32(bare):
    cpu = replace(bare, is_cpu=True, itemsize=4, cores=8)
    small = replace(EIGHT_B, num_layers=1)
    layout = Layout(gpus=4, sequence_parallel=False, distributed_optimizer=False)
    step = estimate_step(small, layout, 8, MLE, cpu)
    kv = 2 * 1024
    layer = 4096 * (4096 + kv + 4096 + 3 * 14336) + 2 * 4096
    params = layer + 2 * 131072 * 4096 + 4096
    assert step.data == pytest.approx(cpu.all_reduce(4 * params, 4))


def test_gradients_hide_under_the_backward_until_the_network_is_slow(h100):
    layout = Layout(gpus=64, tensor_parallel=2)
    fast = estimate_step(EIGHT_B, layout, 64, MLE, h100)
    assert fast.data == 0.0
    slow = replace(h100, between=Link(15e-6, 1e8))
    late = estimate_step(EIGHT_B, layout, 64, MLE, slow)
    assert late.data > 1.0 and late.compute == fast.compute


@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
@pytest.mark.parametrize("distinct", [0, 2458])
def test_the_loss_agrees_with_the_roofline_of_the_loss_layer(h100, path, distinct):
    """On one GPU, where sizes fill its tiles: the other formula of the package."""
    even = replace(h100, num_units=None, start_s=0.0)
    terms = LossTerms(path, distinct, 4096 if distinct else 0, cost_bytes=2)
    seconds = cost_of_loss(EIGHT_B, Layout(), terms, even, hidden_by=0.0)
    device = roofline.Device(0, even.loss_flops, even.table_flops, 0, even.memory_bandwidth)
    expected = roofline.predict(
        device,
        path,
        num_tokens=8192,
        vocab_size=131072,
        hidden_size=4096,
        cost_dim=4096,
        num_distinct=distinct,
    )
    assert seconds == pytest.approx(expected.total / 1e3, rel=1e-9)


def test_emo_takes_longer_than_mle_and_its_rows_hide_under_the_forward(h100):
    layout = Layout(gpus=8, tensor_parallel=8)
    mle = cost_of_loss(EIGHT_B, layout, MLE, h100, hidden_by=1.0)
    hidden = cost_of_loss(EIGHT_B, layout, EMO, h100, hidden_by=1.0)
    shown = cost_of_loss(EIGHT_B, layout, EMO, h100, hidden_by=0.0)
    assert mle < hidden < shown
    rows = h100.all_reduce(2458 * 4096 * 2, 8)
    assert shown - hidden == pytest.approx(rows)


def test_terms_of_an_objective():
    settings = LossSettings(distinct_share=0.25, cost_bytes=2)
    emo = make_loss_terms(EIGHT_B, Layout(), "emo1", settings, 128256)
    assert (emo.num_distinct, emo.cost_dim) == (2048, 4096)
    mle = make_loss_terms(EIGHT_B, Layout(), "mle", settings, 128256)
    assert (mle.num_distinct, mle.cost_dim) == (0, 0)


def test_more_gpus_never_mean_more_compute_and_slower_links_are_never_faster(h100):
    seconds = []
    for dp, tp in itertools.product((1, 2, 8, 64), (1, 2, 4, 8)):
        layout = Layout(gpus=dp * tp, tensor_parallel=tp)
        step = estimate_step(EIGHT_B, layout, 64, EMO, h100)
        seconds.append((dp * tp, tp, step.compute + step.loss))
        for share in (0.5, 0.1):
            slower = replace(
                h100,
                within=Link(h100.within.latency, h100.within.bandwidth * share),
                between=Link(h100.between.latency / share, h100.between.bandwidth),
            )
            assert estimate_step(EIGHT_B, layout, 64, EMO, slower).total >= step.total
    for tp in (1, 2, 4, 8):
        own = [s for _, t, s in sorted(seconds) if t == tp]
        assert own == sorted(own, reverse=True)


def test_a_cpu_shares_its_cores():
    cpu = Cluster(
        "cpu", 100.0, 100.0, 10.0, 1.0, None, 4, Link(1, 1), Link(1, 1), is_cpu=True, cores=2,
        together=(80.0, 5.0, 2.0),
    )  # fmt: skip
    assert cpu.of_ranks(1).flops == 100
    assert cpu.of_ranks(2).flops == 80 and cpu.of_ranks(2).memory_bandwidth == 5
    assert cpu.of_ranks(4).flops == 40 and cpu.of_ranks(4).start_s == 4
    # More than a node has are on other nodes.
    assert cpu.of_ranks(16).flops == 40


def test_interleaving_keeps_more_activations():
    plain = Layout(gpus=4, pipeline_parallel=4)
    inter = replace(plain, virtual_pipeline=2)
    one, other = (activation_bytes(EIGHT_B, layout, 8) for layout in (plain, inter))
    assert other == pytest.approx(one * (1 + 3 / 8))  # Megatron's factor, 1 + (p - 1) / (p v)


@pytest.mark.parametrize(
    ("sizes", "layout", "batch", "published"),
    [
        ((32, 4096, 32, 14336), Layout(8), 128, 14451),
        ((80, 8192, 64, 28672), Layout(64, 4, 8, virtual_pipeline=5), 128, 1602),
        ((126, 16384, 128, 53248), Layout(1024, 8, 8, 2, virtual_pipeline=8), 512, 292),
    ],
    ids=["8b", "70b", "405b"],
)
def test_published_tokens_a_second_are_met_within_a_fifth(sizes, layout, batch, published):
    """Llama 3 in fp8 on DGX H100s, Megatron Bridge's performance summary of its release 25.11."""
    layers, hidden, heads, ffn = sizes
    shape = replace(
        EIGHT_B,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        padded_vocab_size=128256,
    )
    cluster = cluster_of(DEVICES["h100"], "fp8", Efficiency())
    step = estimate_step(shape, layout, batch, LossTerms("logits"), cluster)
    found = batch * 8192 / step.total / layout.gpus
    assert found == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize("gpus", [8, 12, 512])
def test_all_layouts_that_can_be_are_found_and_no_other(gpus):
    """Against a search over all numbers, each tried by the same rules."""
    spec = parse_study(STUDY)
    shape = spec.shape("8b", 1)
    small = replace(shape, num_layers=4, num_attention_heads=8, num_query_groups=4)
    rules = LayoutRules(48, 8)
    from megatron_emo.scaling.speed.cluster_layouts import enumerate_layouts

    found = [name_layout(layout) for layout in enumerate_layouts(small, gpus, rules)]
    expected = set()
    sizes = (range(1, 9), range(1, 5), [2**i for i in range(14)], [1, 2, 4, 8, 16], range(1, 5))
    for tp, pp, cp, mb, vp in itertools.product(*sizes):
        if gpus % (tp * pp * cp):
            continue
        dp = gpus // (tp * pp * cp)
        fits = 4 % tp == 0 and 4 % pp == 0 and 48 % (dp * mb) == 0 and 4096 % cp == 0
        fits &= (6 if gpus == 12 else 8) % tp == 0  # 12 GPUs are two nodes of 6
        m = 48 // (dp * mb)
        fits &= vp == 1 or (pp > 1 and (4 // pp) % vp == 0 and m % pp == 0)
        if fits:
            expected.add(name_layout(Layout(gpus, tp, pp, cp, 1, mb, virtual_pipeline=vp)))
    assert expected and len(found) == len(set(found)) and set(found) == expected


def test_obstacles_are_named():
    plain = LayoutRules(64, 8)

    def why(rules=plain, shape=EIGHT_B, **layout):
        return find_obstacle(shape, Layout(**layout), rules)

    assert not why(gpus=8, tensor_parallel=8)
    assert "query groups 8" in why(gpus=16, tensor_parallel=16)
    assert "layers 32" in why(gpus=3, pipeline_parallel=3)
    assert "on a CPU" in why(LayoutRules(64, 2, is_cpu=True), gpus=2, context_parallel=2)
    assert "micro_batch_size = 24" in why(gpus=8, micro_batch_size=3)
    assert "without a pipeline" in why(gpus=1, virtual_pipeline=2)
    assert "6 microbatches" in why(
        LayoutRules(6, 8), gpus=4, pipeline_parallel=4, virtual_pipeline=2
    )
    odd = replace(EIGHT_B, seq_length=65)
    assert "4 to divide seq_length 65" in why(shape=odd, gpus=2, context_parallel=2)
    even = replace(EIGHT_B, seq_length=68)
    assert not why(shape=even, gpus=2, context_parallel=2)
    assert "8 to divide seq_length 68" in why(shape=even, gpus=4, context_parallel=4)
    assert "experts 1" in why(gpus=2, expert_parallel=2)
    experts = replace(EIGHT_B, num_experts=8)
    assert "data_parallel x context_parallel = 2" in why(shape=experts, gpus=2, expert_parallel=4)


def test_experts_send_their_tokens(bare):
    experts = replace(EIGHT_B, num_experts=8, num_layers=2)
    layout = Layout(gpus=4, expert_parallel=4)
    step = estimate_step(experts, layout, 4, MLE, bare)
    assert step.expert == pytest.approx(2 * 4 * bare.all_to_all(8192 * 2 * 4096 * 2, 4))


def test_what_does_not_fit_is_dropped_by_name(h100):
    spec = parse_study(STUDY)
    layouts = find_layouts(spec, "8b", 8, h100)
    ranking = rank_layouts(spec, "8b", spec.objectives[1], h100, layouts)
    assert len(ranking.fitting) + len(ranking.too_large) == len(layouts)
    assert all(one.memory.total > 0.9 * 80e9 for one in ranking.too_large)
    assert all(one.memory.total <= 0.9 * 80e9 for one in ranking.fitting)
    times = [one.step.total for one in ranking.fitting]
    assert times == sorted(times) and ranking.too_large


def test_thousands_of_gpus_are_ranked_in_seconds(h100):
    spec = parse_study(STUDY | {"batch": 4096})
    start = time.process_time()
    layouts = find_layouts(spec, "8b", 4096, h100)
    ranking = rank_layouts(spec, "8b", spec.objectives[1], h100, layouts)
    assert time.process_time() - start < 5
    assert len(ranking.fitting) > 1000


def test_layouts_that_cannot_be_are_refused(h100):
    spec = parse_study(STUDY)
    with pytest.raises(PlanError, match="--gpus 7: size 8b: expected a layout"):
        find_layouts(spec, "8b", 7, h100)
    with pytest.raises(PlanError, match="mode: expected strong"):
        find_layouts(replace(spec, mode="weak"), "8b", 8, h100)


def test_a_line_is_recovered():
    start, rate = fit_line([10, 100, 1000], [2 + 10 / 50, 2 + 100 / 50, 2 + 1000 / 50])
    assert (start, rate) == (pytest.approx(2), pytest.approx(50))
    start, rate = fit_line([10, 100], [0.1, 2.0])  # would start below 0
    assert start == 0 and 50 <= rate <= 100


class Traffic(TorchDispatchMode):
    """Bytes that operators take and give, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            tensors = [one for one in tree_leaves((args, kwargs, out)) if torch.is_tensor(one)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def test_a_pass_of_a_core_is_counted_as_its_operators_move():
    rank = object.__new__(_Rank)
    rank.torch, rank.kind, rank.device, rank.dtype = (
        torch,
        "cpu",
        torch.device("cpu"),
        torch.float32,
    )
    act, accesses = rank._pass(1 << 16)
    with Traffic() as traffic:
        act()
    assert traffic.bytes == accesses << 16


def make_entry(**changes):
    rates = {"flops": 5e10, "bandwidth": 1e10, "start_s": 1e-5}
    entry = {
        "schema": SCHEMA,
        "kind": "cpu",
        "name": "CPU",
        "backend": "gloo",
        "date": "2026-01-01T00:00:00Z",
        "threads": 1,
        "cores": 2,
        "memory": None,
        "alone": rates,
        "together": rates | {"flops": 4e10},
        "link": {"latency": 1e-4, "bandwidth": 1e9, "shares": {"send": 2.0}},
        "ranks_per_node": 2,
    }
    return entry | changes


def test_a_measured_machine_becomes_a_device():
    cpu = cluster_from_entry(make_entry())
    assert cpu.of_ranks(2).flops == 4e10 and cpu.of_ranks(1).flops == 5e10
    assert cpu.send(1e9, 1) == pytest.approx(1e-4 + 0.5)
    with pytest.raises(PlanError, match="device entry"):
        cluster_from_entry({"schema": "other"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alone": {"flops": 0, "bandwidth": 1e10, "start_s": 1e-5}}, "flops"),
        ({"alone": {"flops": float("nan"), "bandwidth": 1e10, "start_s": 1e-5}}, "flops"),
        ({"together": {"flops": 1e10, "bandwidth": 0, "start_s": 1e-5}}, "together"),
        ({"together": {"flops": 1e10, "bandwidth": 1e10, "start_s": -1}}, "together"),
        ({"link": {"latency": 1e-4, "bandwidth": 0, "shares": {}}}, "bandwidth"),
        ({"link": {"latency": 1e-4, "bandwidth": 1e9, "shares": {"send": 0}}}, "send"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"kind": "cuda", "memory": 10**400}, "memory"),
        ({"alone": None}, "device entry"),
    ],
)
def test_a_machine_without_speed_is_refused_and_its_file_named(tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        cluster_from_entry(make_entry(**changes))
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(make_entry(**changes)))
    parser = argparse.ArgumentParser()
    estimate_command.add_arguments(parser)
    plan = str(ROOT / "examples/scaling/throughput_cpu.yaml")
    with pytest.raises(PlanError, match=f"--device .*machine.json: .*{message}"):
        estimate_command.run(parser.parse_args(["--plan", plan, "--device", str(path)]))


def row(layout: str, seconds: float, ratio_to: float, **more) -> dict:
    return {
        "size": "s",
        "objective": "mle",
        "layout": layout,
        "predicted_s": seconds * ratio_to,
        "measured_s": seconds,
        "ratio": ratio_to,
        "spread": 0.1,
    } | more


def test_estimates_beside_measurements_are_summed_up():
    rows = [row("a", 1.0, 1.2), row("b", 2.0, 1.1), row("c", 3.0, 0.7)]
    (found,) = summarise_comparison(rows)
    # Predicted 1.2, 2.2, 2.1: one of three pairs the other way round.
    assert found["tau"] == pytest.approx(1 / 3)
    assert found["error"] == pytest.approx(0.2) and found["median_ratio"] == 1.1
    assert found["is_best_first"] and found["regret"] == 0
    rows = [row("a", 1.0, 2.0), row("b", 1.5, 1.0)]
    (found,) = summarise_comparison(rows)
    assert not found["is_best_first"] and found["regret"] == pytest.approx(0.5)


def test_measured_rows_of_another_study_are_refused():
    spec = parse_study(STUDY)
    cpu = cluster_from_entry(make_entry())
    with pytest.raises(PlanError, match="--against: size 'x'"):
        compare_measured(spec, [{"size": "x", "objective": "mle"}], cpu)


def test_efficiencies_are_checked():
    with pytest.raises(ValueError, match="assume.products"):
        Efficiency(products=1.5)
    assert math.isfinite(cluster_of(DEVICES["h200"], "fp8", Efficiency(links=0.5)).flops)
    with pytest.raises(ValueError, match="precision"):
        cluster_of(DEVICES["a100"], "fp8", Efficiency())
