"""Plans: the runs that a file comes to, what is refused, and the flags that Megatron gets."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_emo.scaling.counts.devices import DEVICES, GIB, find_device
from megatron_emo.scaling.counts.flops import count_flops
from megatron_emo.scaling.counts.memory import (
    Layout,
    LossMemory,
    activation_bytes,
    estimate_memory,
    model_state_bytes,
)
from megatron_emo.scaling.counts.shape import ModelShape
from megatron_emo.scaling.plans.plan import make_plan
from megatron_emo.scaling.plans.plan_checks import JUDGEMENTS, check_plan
from megatron_emo.scaling.plans.plan_file import PlanError, parse_plan, read_plan_file
from megatron_emo.scaling.plans.plan_report import describe_run, total_by_goal
from megatron_emo.scaling.plans.recipe import BUNDLES, SizeEntry
from megatron_emo.scaling.plans.run_arguments import megatron_arguments

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "scaling").glob("plan*.yaml"))
H100 = DEVICES["h100"]
PLAN = yaml.safe_load("""
name: small
budgets: [1e17, 2e17, 4e17]
sizes: [256, 320, 384, 512, 640]
objectives: [mle, emo1]
seeds: [1, 2]
model: {vocab_size: 5000, seq_length: 512, make_vocab_size_divisible_by: 64}
recipe: {head_size: 64, steps: 4096}
loss: {cost_dim: 96}
layout: {gpus: 2, micro_batch_size: 8}
""")


def plan_of(**changes):
    """The plan above with changed keys; a mapping changes keys of a section, None takes one out."""
    content = copy.deepcopy(PLAN)
    for key, value in changes.items():
        if value is None:
            del content[key]
        elif isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] |= value
        else:
            content[key] = value
    return parse_plan(content)


def refusals_of(device=H100, **changes):
    return check_plan(make_plan(plan_of(**changes)), device)[0]


def names(problems):
    return {problem.name for problem in problems}


def test_runs_meet_their_budgets():
    spec = plan_of()
    plan = make_plan(spec)
    assert not plan.problems and check_plan(plan, H100) == ([], [])
    assert len(plan.runs) == 3 * 5 * 2 * 2 == len({run.name for run in plan.runs})
    for run in plan.runs:
        shape = run.shape
        assert run.flops == count_flops(shape, run.tokens)
        assert abs(run.flops / run.budget - 1) < 0.01
        assert run.tokens == run.steps * run.batch * 512
        assert shape.hidden_size == run.size and shape.num_attention_heads == run.size // 64
        assert shape.ffn_hidden_size == 4 * run.size and shape.padded_vocab_size == 5056
        depth = run.size / (64 + 4 * math.log2(run.size) - 9)
        assert shape.num_layers == round(depth)
        assert run.batch == 2 ** round(math.log2(run.batch)) and run.batch % (2 * 8) == 0
        optimizer = run.optimizer
        assert optimizer.learning_rate == pytest.approx(0.33 * run.batch**0.5 / run.size, rel=1e-5)
        assert optimizer.learning_rate <= 0.01
        assert optimizer.beta2 == pytest.approx(0.98 ** (run.batch / 128), rel=1e-5)
        assert optimizer.decay_steps == round(0.2 * run.steps)


def test_objectives_share_tokens_or_budgets():
    for equal in ("tokens", "flops"):
        plan = make_plan(plan_of(equal=equal))
        pairs = {}
        for run in plan.runs:
            pairs.setdefault((run.budget, run.size, run.seed), {})[run.objective.label] = run
        for pair in pairs.values():
            mle, emo = pair["mle"], pair["emo1"]
            assert mle.loss_flops.cost_products == 0 < emo.loss_flops.cost_products
            # 0.3 distinct targets a token, 96 columns, 5056 rows; the logits fit the workspace.
            at_once = emo.micro_batch * 512
            per_token = 2 * math.ceil(0.3 * at_once) * 96 * 5056 / at_once
            assert emo.loss_flops.total == pytest.approx(per_token * emo.tokens)
            if equal == "tokens":
                assert mle.tokens == emo.tokens and mle.flops == emo.flops < emo.all_flops
            else:
                assert emo.tokens < mle.tokens
                assert abs(emo.all_flops / emo.budget - 1) < 0.01
                assert abs(mle.all_flops / mle.budget - 1) < 0.01


def test_sizes_times_token_ratios_from_a_table():
    table = {
        "a": {"layers": 2, "hidden": 64, "heads": 4, "ffn": 200, "learning_rate": 2e-3},
        "b": {"layers": 4, "hidden": 96, "heads": 6, "ffn": 300, "query_groups": 2, "batch": 4},
        "c": {"layers": 4, "hidden": 128, "heads": 4, "ffn": 400},
        "d": {"layers": 6, "hidden": 160, "heads": 5, "ffn": 500},
    }
    recipe = {"table": table, "batch": 16, "bundle": "cosine", "lr_max": 1.0}
    for params in ("total", "non_embedding"):
        spec = plan_of(
            budgets=None,
            tokens_per_param=[10, 20, 40, 80],
            params=params,
            sizes=list(table),
            recipe=recipe,
            layout={"gpus": 1, "micro_batch_size": 4},
            allow=["few-steps"],
        )
        plan = make_plan(spec)
        assert check_plan(plan, H100)[0] == [] and len(plan.runs) == 4 * 4 * 2 * 2
        for run in plan.runs:
            counts = run.params
            count = counts.total if params == "total" else counts.non_embedding
            assert abs(run.tokens / count / run.tokens_per_param - 1) < 0.01
            assert run.batch == (4 if run.size == "b" else 16)
            assert run.shape.num_query_groups == (2 if run.size == "b" else None)
            assert run.optimizer.decay_style == "cosine"
            assert run.optimizer.min_learning_rate == pytest.approx(
                run.optimizer.learning_rate / 10, rel=1e-5
            )
            if run.size == "a":
                assert run.optimizer.learning_rate == 2e-3


def test_a_formula_may_know_the_horizon():
    recipe = replace(BUNDLES["marin"], lr_horizon=0.3, lr_horizon_tokens=1e9)
    plain = BUNDLES["marin"].learning_rate(512, 64, 8e9)
    assert recipe.learning_rate(512, 64, 8e9) == pytest.approx(plain * 8**-0.3)
    assert recipe.optimizer(SizeEntry(2, 512, 8, 2048), 64, 1000, 8e9).warmup_steps == 100
    wide = replace(recipe, ffn_ratio=8 / 3, ffn_multiple=64, heads_per_group=4, head_size=64)
    assert wide.entry(512) == SizeEntry(6, 512, 8, 1344, 2)


def test_names_are_stable_and_tell_trainings_apart():
    plan = make_plan(plan_of())
    again = make_plan(plan_of(layout={"gpus": 4, "micro_batch_size": 2}, rates={"mfu": 0.1}))
    assert [run.name for run in plan.runs] == [run.name for run in again.runs]
    for change in (
        {"recipe": {"lr_constant": 0.3}},
        {"model": {"swiglu": False}},
        {"arguments": ["--data-path", "other"]},
    ):
        other = make_plan(plan_of(**change))
        assert not {run.hash for run in plan.runs} & {run.hash for run in other.runs}
    # Written down: a name that moves would make a study lose its finished runs.
    first = plan.runs[0]
    assert first.name == f"mle_h256_C1.00e17_s1_{first.hash}" and first.hash == "2937cad162"


def test_objectives_with_settings_of_their_own():
    capped = {"label": "cap3", "objective": "emo1", "arguments": ["--emo-weight-max", "3"]}
    plan = make_plan(plan_of(objectives=["mle", capped]))
    labels = {run.objective.label for run in plan.runs}
    assert labels == {"mle", "cap3"} and plan.runs[2].name.startswith("cap3_h256")
    assert megatron_arguments(plan.runs[2])[-2:] == ["--emo-weight-max", "3"]


def test_hours_and_totals():
    plan = make_plan(plan_of(rates={"mfu": 0.25}))
    run = plan.runs[-1]
    row = describe_run(run, plan, H100)
    assert row["gpu_hours"] == pytest.approx(run.all_flops / (989.4e12 * 0.25) / 3600)
    assert row["hours"] == row["gpu_hours"] / 2
    assert row["flops_6nd"] == 6 * run.params.total * run.tokens
    assert row["flops_over_6nd"] == run.flops / row["flops_6nd"]
    totals = total_by_goal([describe_run(r, plan, H100) for r in plan.runs])
    assert [t["runs"] for t in totals] == [10] * 6 + [60]
    assert totals[-1]["gpu_hours"] == pytest.approx(sum(t["gpu_hours"] for t in totals[:-1]))
    fp8 = make_plan(plan_of(rates={"precision": "fp8"}))
    assert describe_run(fp8.runs[0], fp8, H100)["hours"] < describe_run(
        plan.runs[0], plan, H100
    ).get("hours")
    with pytest.raises(ValueError, match=r"precision: expected one of \['bf16'\] of NVIDIA A100"):
        describe_run(fp8.runs[0], fp8, find_device("a100"))


@pytest.mark.parametrize(
    ("changes", "name", "part"),
    [
        ({"budgets": ["1e17", "2e17"]}, "too-few-points", "expected at least 3 budgets, got 2"),
        ({"sizes": [256, 384, 512]}, "too-few-points", "expected at least 4 points a budget"),
        ({"sizes": [256, 320, 384, 410, 512]}, "shape", "a divisor of hidden_size 410"),
        ({"sizes": [768, 896, 1024, 1152, 1280]}, "edge-optimum", "is not between two sizes"),
        ({"expect": {"range": 1.5}}, "isoflop-range", "expected within a factor of 1.5"),
        ({"layout": {"gpus": 1, "micro_batch_size": 8192}}, None, None),
        ({"tolerance": 1e-7}, "tolerance", "miss it by"),
        ({"recipe": {"batch": 3}}, "batch", "expected a multiple of the 2 data-parallel ranks"),
        ({"recipe": {"batch": 10_000_000}}, "tokens-below-batch", "are below one batch of"),
        ({"recipe": {"batch": 4096}}, "learning-rate", "expected at most 0.01"),
        ({"layout": {"gpus": 4, "tensor_parallel": 4}}, "layout", "expected a divisor of heads"),
        ({"layout": {"gpus": 4, "pipeline_parallel": 4}}, "layout", "a divisor of layers"),
        ({"layout": {"gpus": 4, "expert_parallel": 4}}, "layout", "without model.num_experts"),
        ({"recipe": {"steps": 50, "lr_max": 1, "max_batch": 16384}}, "few-steps", "steps"),
    ],
)
def test_what_is_refused(changes, name, part):
    found = refusals_of(**changes)
    if name is None:
        assert not found
        return
    assert name in names(found)
    if part:
        assert any(part in p.message for p in found if p.name == name), found
    if name in JUDGEMENTS:
        allow = [*changes.get("allow", []), name]
        refused, warned = check_plan(make_plan(plan_of(**{**changes, "allow": allow})), H100)
        assert name not in names(refused)
        assert name in names(warned) or name == "learning-rate"


def test_sizes_too_small_and_too_large_are_both_far():
    found = [p.message for p in refusals_of(expect={"range": 2})]
    assert any("budget 4e+17, size 256" in message for message in found)
    assert any("budget 1e+17, size 640" in message for message in found)


def test_heads_that_do_not_divide_are_refused_by_name():
    table = {"odd": {"layers": 2, "hidden": 100, "heads": 3, "ffn": 400}}
    found = refusals_of(sizes=["odd"], recipe={"table": table})
    assert "num_attention_heads: expected a divisor of hidden_size 100, got 3" in found[0].message
    assert found[0].name == "shape"


def test_memory_above_the_devices_is_refused():
    table = {
        f"{n}": {"layers": 80, "hidden": 8192, "heads": 64, "ffn": 28672 + n, "learning_rate": 1e-4}
        for n in range(4)
    }
    changes = {
        "sizes": [f"{n}x" for n in range(4)],
        "budgets": [1e24, 2e24, 4e24],
        "recipe": {"table": {f"{k}x": v for k, v in table.items()}, "batch": 512},
        "model": {"seq_length": 4096},
        "layout": {"gpus": 64, "micro_batch_size": 1},
    }
    found = [p for p in refusals_of(**changes) if p.name == "memory"]
    assert "GiB a GPU, expected at most 67.1 (90% of NVIDIA H100 80GB HBM3)" in found[0].message
    layout = {"gpus": 512, "micro_batch_size": 1, "tensor_parallel": 8, "pipeline_parallel": 4}
    assert "memory" not in names(refusals_of(**{**changes, "layout": layout}))


def test_one_ratio_alone_is_a_line():
    found = refusals_of(
        budgets=None, tokens_per_param=[20], layout={"gpus": 1}, allow=["few-steps"]
    )
    assert names(found) & {"one-line", "too-few-points"}
    assert all("as fit --approach 3" in problem.message for problem in found)


def test_an_objective_without_its_cells_is_unbalanced():
    plan = make_plan(plan_of())
    lacking = replace(plan, runs=tuple(r for r in plan.runs if r.name[:9] != "emo1_h256"))
    found = check_plan(lacking, H100)[0]
    assert "emo1: 3 of 15 cells have no run" in {p.message for p in found}


def test_the_same_training_twice_is_refused():
    table = {n: {"layers": 2, "hidden": 64, "heads": 4, "ffn": 200} for n in "ab"}
    found = refusals_of(sizes=["a", "b"], recipe={"table": table, "lr_max": 1})
    assert "duplicate" in names(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": [1e18]}, "budget: unknown; nearest: budgets; known: .*allow, arguments"),
        ({"recipe": {"learning_rate": 1}}, "recipe.learning_rate: unknown; nearest: "),
        ({"model": {"seqlength": 1}}, "model.seqlength: unknown; nearest: seq_length"),
        ({"recipe": {"table": {"a": {"layer": 2}}}}, "recipe.table.a.layer: unknown; nearest: lay"),
        ({"recipe": {"table": {"a": {"layers": 2}}}}, "recipe.table.a.hidden: missing"),
        ({"model": None}, "model: missing"),
        ({"budgets": []}, "budgets: expected budgets or tokens_per_param, got neither"),
        ({"tokens_per_param": [20]}, "expected budgets or tokens_per_param, got both"),
        ({"budgets": ["1e17", "many"]}, "budgets: expected a number, got 'many'"),
        ({"budgets": [-1]}, "budgets: expected above 0, to 1e\\+40, got -1"),
        ({"budgets": 1e17}, "budgets: expected a list, got 1e"),
        ({"seeds": [0]}, "seeds: expected numbers from 1 on, got 0"),
        ({"seeds": [1.5]}, "seeds: expected a whole number, got 1.5"),
        ({"seeds": [1, 1]}, "seeds: expected each once, got 1 2 times"),
        ({"objectives": ["mle", "mle"]}, "objectives: expected each once, got 'mle' 2 times"),
        ({"objectives": ["emo3"]}, "objectives: expected one of emo1, .*, got 'emo3'"),
        ({"objectives": [{"label": "a/b", "objective": "mle"}]}, "objectives.label: expected let"),
        ({"objectives": "mle"}, "objectives: expected a list, got 'mle'"),
        ({"model": {"swiglu": 1}}, "model.swiglu: expected true or false, got 1"),
        ({"recipe": {"bundle": "kaplan"}}, "recipe.bundle: expected one of marin, cosine, got"),
        ({"recipe": {"decay_style": "step"}}, "recipe.decay_style: expected one of"),
        ({"layout": {"gpus": 3, "tensor_parallel": 2}}, "layout.gpus: expected a multiple of"),
        ({"loss": {"path": "fast"}}, "loss.path: expected one of"),
        ({"loss": {"distinct_share": 0}}, "loss.distinct_share: expected above 0, to 1"),
        ({"rates": {"mfu": 2}}, "rates.mfu: expected above 0, to 1, got 2"),
        ({"rates": {"precision": "fp4"}}, "rates.precision: expected one of"),
        ({"flops": "kaplan"}, "flops: expected one of megatron, .*, got 'kaplan'"),
        ({"equal": "flops", "flops": "6nd"}, "equal: expected tokens with flops: 6nd"),
        ({"tolerance": 0}, "tolerance: expected between 0 and 1, got 0"),
        ({"expect": {"law": {"E": 1}}}, "expect.law.A: missing"),
        ({"expect": {"range": 1}}, "expect.range: expected above 1, to 1e12, got 1"),
    ],
)
def test_files_that_are_no_plans(changes, message):
    with pytest.raises(PlanError, match=message):
        plan_of(**changes)


def test_values_out_of_all_reason_are_refused_at_once():
    law = {"E": 1, "A": 1, "B": 1, "alpha": 100, "beta": 1}
    for changes, part in (
        ({"sizes": [10**9]}, "sizes: expected hidden sizes from 2 to 1,000,000"),
        ({"recipe": {"layer_ratio": 0, "layer_log": 0}}, "layer_offset above 0, got -9"),
    ):
        assert part in refusals_of(**changes)[0].message
    for changes, message in (
        ({"budgets": [1e300]}, "budgets: expected above 0, to 1e"),
        ({"seeds": list(range(1, 30_000))}, "plan: expected at most 20,000 runs"),
        ({"model": {"make_vocab_size_divisible_by": 0}}, "divisible_by: expected 1 to 1e"),
        ({"recipe": {"lr_batch_power": 1e300}}, "lr_batch_power: expected -8 to 8"),
        ({"recipe": {"table": {"a": {"layers": 10**400}}}}, "a.hidden: missing"),
        ({"layout": {"micro_batch_size": 10**7}}, "micro_batch_size: expected 1 to 1,000,000"),
        ({"recipe": {"steps": 10**400}}, "recipe.steps: expected a number, got 1000"),
        ({"loss": {"workspace_mb": 0}}, "loss.workspace_mb: expected 1 to"),
        ({"expect": {"law": law}}, "expect.law: expected alpha, beta 0.001 to 4"),
    ):
        with pytest.raises(PlanError, match=message):
            plan_of(**changes)


def test_a_few_aliases_do_not_fill_the_memory(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    for use in ("name: *a11", "budgets: [*a11]", "*a11 : 1", "model: *a11"):
        path = tmp_path / "plan.yaml"
        path.write_text("\n".join([*lines, use]))
        with pytest.raises(PlanError, match="--plan"):
            read_plan_file(path)
    with pytest.raises(PlanError, match="budgets: expected a number, got"):
        plan_of(budgets=[yaml.safe_load("\n".join(lines))["a11"]])


def test_an_unknown_allowance():
    with pytest.raises(PlanError, match="allow: expected some of .*memory.*, got 'memroy'"):
        refusals_of(allow=["memroy"])


def test_numbers_as_yaml_reads_them(tmp_path):
    # YAML 1.1 has 1e18 for a text, and 1e+18 too.
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN).replace("[1e17", "[1.0e+17"))
    assert read_plan_file(path).budgets == (1e17, 2e17, 4e17)
    for text in ("- a", "a: [", "!!python/object/apply:os.system ['true']", "", "[" * 1100):
        path.write_text(text)
        with pytest.raises(PlanError, match="--plan .*plan.yaml"):
            read_plan_file(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_plans_are_taken(path):
    plan = make_plan(read_plan_file(path))
    refusals, warnings = check_plan(plan, H100)
    assert refusals == []
    assert {problem.name for problem in warnings} <= set(plan.spec.allow)
    # By the same names on every machine and day.
    assert len({run.hash for run in plan.runs}) == len(plan.runs)


def megatron_memory_args(shape, layout):
    freq = shape.moe_layer_freq
    return Namespace(
        **{name: getattr(shape, name) for name in vars(shape) if name != "moe_layer_freq"}
        | {"kv_channels": shape.head_channels, "mtp_num_layers": shape.mtp_num_layers or None},
        moe_layer_freq=list(freq) if isinstance(freq, tuple) else freq,
        group_query_attention=shape.num_query_groups is not None,
        multi_latent_attention=False,
        micro_batch_size=layout.micro_batch_size,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.tensor_parallel,
        world_size=layout.gpus,
        data_parallel_size=layout.data_parallel,
        use_distributed_optimizer=layout.distributed_optimizer,
    )


def test_memory_is_megatrons_theory():
    pytest.importorskip("megatron.training")
    from megatron.training import theoretical_memory_usage as theirs

    dense = ModelShape(8, 512, 8, 1408, 32000, 1024, num_query_groups=4, swiglu=True)
    moe = {"num_experts": 8, "moe_ffn_hidden_size": 384, "add_bias_linear": False}
    shapes = [
        dense,
        replace(dense, untie_embeddings_and_output_weights=True, normalization="RMSNorm"),
        replace(dense, kv_channels=128, mtp_num_layers=1),
        replace(dense, **moe, moe_layer_freq=2, moe_shared_expert_intermediate_size=640),
        replace(dense, **moe, moe_latent_size=256, mtp_num_layers=2),
    ]
    count = 0
    for shape in shapes:
        for tp, pp, ep, dp, distributed in [
            *((1, 1, 1, 1, False), (1, 1, 1, 8, True), (2, 1, 1, 4, True), (4, 4, 1, 2, True)),
            (2, 2, 2, 4, False),
        ]:
            gpus = tp * pp * dp
            layout = Layout(gpus, tp, pp, 1, ep, 2, distributed)
            args = megatron_memory_args(shape, layout)
            expected = theirs.compute_weight_and_optimizer_memory(args)
            assert model_state_bytes(shape, layout) == pytest.approx(expected, rel=1e-12)
            tokens, hidden, vocab = 2 * 1024, 512, 32000
            for microbatches in (1, 3, 16):
                ours = activation_bytes(shape, layout, microbatches)
                # Theirs has the hidden states and fp32 logits of the loss where it stands.
                output = 4 * tokens * (hidden + vocab) / tp if pp == 1 else 0
                full = theirs.compute_activation_memory(args, microbatches)
                assert ours + output == pytest.approx(full, rel=1e-12)
                plain = replace(layout, sequence_parallel=False)
                ours = activation_bytes(shape, plain, microbatches)
                output = 1.05 * 2 * tokens * (hidden + vocab / tp) if pp == 1 else 0
                full = theirs.compute_activation_memory_without_sp(args, microbatches)
                assert ours + output == pytest.approx(full, rel=1e-12)
                count += 1
    assert count == 75


def test_what_the_loss_keeps():
    shape = ModelShape(8, 512, 8, 2048, 32000, 1024)
    layout = Layout(micro_batch_size=4)
    kept = {
        path: estimate_memory(shape, layout, 1, LossMemory(path, 1000, 256))
        for path in ("logits", "recompute", "forward")
    }
    tokens, hidden_states = 4096, 2 * 2 * 4096 * 512
    assert kept["logits"].loss == hidden_states + 32000 * (tokens * 2 + 1000 * 4)
    assert kept["recompute"].loss == hidden_states + min(512 << 20, 32000 * 8 * tokens)
    assert kept["forward"].loss == kept["recompute"].loss + 4 * 32000 * 512
    assert {m.cost_embedding for m in kept.values()} == {32000 * 256 * 4 + 1000 * 256 * 4}
    mle = estimate_memory(shape, layout, 1, LossMemory("logits"))
    assert mle.cost_embedding == 0 and mle.total < kept["logits"].total
    # In a pipeline the first stage, with all microbatches in flight, or the last with the loss.
    cut = Layout(gpus=4, pipeline_parallel=4, micro_batch_size=4)
    first = estimate_memory(replace(shape, num_layers=64), cut, 8, LossMemory("logits"))
    assert first.loss == 0 and first.activations == activation_bytes(
        replace(shape, num_layers=64), cut, 8
    )
    wide = estimate_memory(
        replace(shape, padded_vocab_size=256000), cut, 8, LossMemory("logits", 1000, 256)
    )
    assert wide.loss > 0 and wide.cost_embedding > 0
    assert mle.total / GIB == pytest.approx(1.5, abs=1.0)


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")
def test_megatron_takes_the_flags_and_counts_the_same(monkeypatch):
    pytest.importorskip("megatron.training")
    from megatron.training.arguments import parse_args
    from megatron.training.training import num_floating_point_operations

    from megatron_emo.training.arguments import add_emo_arguments

    moe = {"num_experts": 4, "moe_ffn_ratio": 0.5}
    plans = [
        plan_of(),
        plan_of(model={"learned_positions": True, "swiglu": False, "normalization": "LayerNorm"}),
        plan_of(recipe={"heads_per_group": 2, "bundle": "cosine", "lr_max": 1}, model=moe),
    ]
    for spec in plans:
        for run in make_plan(spec).runs[::31]:
            monkeypatch.setattr("sys.argv", ["x", *megatron_arguments(run)])
            args = parse_args(add_emo_arguments)
            assert args.objective == run.objective.objective and args.seed == run.seed
            args.padded_vocab_size = run.shape.padded_vocab_size
            args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
            flops = num_floating_point_operations(args, run.batch) * run.steps
            assert flops == pytest.approx(run.flops, rel=1e-14)
            assert args.train_iters == run.steps and args.micro_batch_size == run.micro_batch
            assert ModelShape.from_args(args) == replace(
                run.shape, kv_channels=run.shape.head_channels
            )
