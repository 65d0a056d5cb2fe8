"""examples/multinode without a cluster: the recipes' flags are Megatron's, the scripts pass on what
they are told and refuse clearly."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from clusters import ROOT, SBATCH, TRAIN, clean_environment

from megatron_emo.training_curves import read_scalars

SCRIPTS = [
    TRAIN,
    SBATCH,
    *sorted(str(path) for path in ROOT.glob("examples/multinode/recipes/*.sh")),
]

SETTINGS = {
    "gpt_125m": {},
    "moe": {},
    "moe tp": {"TP": "2", "EP": "4"},
    "llama3_8b_fp8": {},
    "llama3_8b_fp8 tensorwise": {"FP8_RECIPE": "tensorwise", "TP": "4", "EMO_COST_DTYPE": "fp8"},
    "llama3_8b_fp8 mxfp8": {
        **{"FP8_RECIPE": "mxfp8", "FP8_FORMAT": "e4m3", "EMO_LOSS_PATH": "forward"},
        **{"TP": "2", "PP": "2", "CP": "2"},
    },
    "llama3_8b_fp8 none": {"FP8_RECIPE": "none", "TP": "1", "OBJECTIVE": "mle"},
    "llama3_8b_fp8 data": {"DATA_PATH": "0.3 first 0.7 second", "TOKENIZER_MODEL": "somewhere"},
    "llama3_8b_fp8 local": {"SMOKE": "1", "GLOBAL_BATCH_SIZE": "8", "TRANSFORMER_IMPL": "local"},
    "llama3_8b_fp8 timeout": {"DISTRIBUTED_TIMEOUT_SECONDS_AFTER_INIT": "40"},
}

# Megatron's parser and checks, then the configuration that the model is built from; nothing starts.
PARSE = """
import json, os, sys
os.environ.update(RANK="0", WORLD_SIZE="8", LOCAL_RANK="0", MASTER_ADDR="nowhere", MASTER_PORT="1")
from megatron_emo.training import cpu, cpu_stand_ins
if cpu.is_needed():
    cpu.set_launch_environment()
    cpu_stand_ins.install()
from megatron.training import argument_utils
from megatron.training.arguments import parse_args, validate_args
from megatron_emo.training import arguments, signals
parsed = {}
for name, argv in json.load(sys.stdin).items():
    # Of all that is asked for, these alone look for Transformer Engine here.
    off = ("--moe-grouped-gemm", "--moe-permute-fusion")
    sys.argv[1:] = [*(word for word in argv if word not in off), "--no-rope-fusion"]
    args = parse_args(lambda parser: signals.add_arguments(arguments.add_emo_arguments(parser)))
    validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    arguments.check_supported(args)
    config = arguments.emo_config_from_args(args)
    args.padded_vocab_size = args.vocab_size or 128256
    transformer = argument_utils.gpt_config_from_args(args).transformer
    values = {key: vars(args)[key] for key in vars(args) if not key.startswith("_")}
    values["recipe_of_model"] = transformer.fp8 and str(transformer.fp8_recipe)
    values["loss_path"] = config.loss_path.path
    parsed[name] = values
json.dump(parsed, open(os.environ["PARSED"], "w"), default=str)
"""


def run_script(script: str, *words: str, timeout: int = 300, **settings: str):
    return subprocess.run(
        ["bash", script, *words],
        cwd=ROOT,
        env=clean_environment(**settings),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def printed_command(recipe: str, *flags: str, **settings: str) -> list[str]:
    process = run_script(TRAIN, "--print", recipe, *flags, **{"GPUS_PER_NODE": "8", **settings})
    assert process.returncode == 0, process.stderr
    return shlex.split(process.stdout)


def launch_of(command: list[str]) -> dict[str, str]:
    """torchrun's flags and their values."""
    words = command[command.index("megatron_emo.launch.torchrun") + 1 :]
    words = words[: words.index("pretrain_gpt_emo.py")]
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True)}


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, dict]:
    """By name in SETTINGS, what Megatron made of the script's flags on 8 ranks."""
    flags = {}
    for name, settings in SETTINGS.items():
        command = printed_command(name.split()[0], **settings)
        flags[name] = command[command.index("pretrain_gpt_emo.py") + 1 :]
    file = tmp_path_factory.mktemp("parsed") / "args.json"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps(flags),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PARSED": str(file)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(file.read_text())


def parameters_of_layers(args: dict, ffn: int, experts: int = 1) -> int:
    hidden = args["hidden_size"]
    heads = args["num_attention_heads"]
    groups = args["num_query_groups"] if args["group_query_attention"] else heads
    key_value = hidden * groups // heads
    router = hidden * experts if experts > 1 else 0
    attention = 2 * hidden * hidden + 2 * hidden * key_value + 2 * hidden
    return args["num_layers"] * (attention + experts * 3 * hidden * ffn + router) + hidden


def test_the_dense_models_are_those_the_recipes_name(parsed):
    llama, small = parsed["llama3_8b_fp8"], parsed["gpt_125m"]
    layers = parameters_of_layers(llama, llama["ffn_hidden_size"])
    assert layers + 2 * 4096 * 128256 == 8_030_261_248
    assert llama["untie_embeddings_and_output_weights"]
    assert (llama["seq_length"], llama["rotary_base"]) == (8192, 500000)
    layers = parameters_of_layers(small, small["ffn_hidden_size"])
    assert layers + 768 * 50257 == pytest.approx(125e6, rel=0.02)
    for args in (llama, small):
        assert args["swiglu"] and args["normalization"] == "RMSNorm"
        assert not args["add_bias_linear"] and args["position_embedding_type"] == "rope"


def test_the_mixture_is_that_which_its_recipe_says(parsed):
    args = parsed["moe"]
    ffn, embedding = args["moe_ffn_hidden_size"], 1024 * 50257
    assert not args["untie_embeddings_and_output_weights"]
    assert (args["num_experts"], args["moe_router_topk"]) == (32, 4)
    assert parameters_of_layers(args, ffn, 32) + embedding == pytest.approx(0.92e9, rel=0.01)
    assert parameters_of_layers(args, ffn, 4) + embedding == pytest.approx(0.22e9, rel=0.01)
    assert args["expert_model_parallel_size"] == 8
    command = printed_command("moe")
    assert "--moe-grouped-gemm" in command and "--moe-permute-fusion" in command
    assert "--moe-grouped-gemm" not in printed_command("moe", GPUS_PER_NODE="0")
    two = parsed["moe tp"]
    assert (two["tensor_model_parallel_size"], two["expert_model_parallel_size"]) == (2, 4)
    assert two["sequence_parallel"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8"])
def test_every_fp8_recipe_reaches_the_model(parsed, recipe):
    args = parsed["llama3_8b_fp8" if recipe == "delayed" else f"llama3_8b_fp8 {recipe}"]
    assert args["fp8"] == ("e4m3" if recipe == "mxfp8" else "hybrid")
    assert recipe in args["recipe_of_model"] and args["bf16"]
    assert args["transformer_impl"] == "transformer_engine"
    assert args["use_distributed_optimizer"]


def test_variables_reach_megatron(parsed):
    llama = parsed["llama3_8b_fp8"]
    assert llama["tensor_model_parallel_size"] == 2 and llama["sequence_parallel"]
    assert llama["emo_cost_embedding"] == "output-layer"
    assert llama["mock_data"] and llama["vocab_size"] == 128256
    assert (llama["emo_grace_s"], llama["exit_signal_handler"]) == (240.0, True)
    assert (llama["save"], llama["load"]) == ("runs/llama3_8b_fp8/checkpoints",) * 2
    assert llama["distributed_timeout_minutes"] == 10
    assert parsed["llama3_8b_fp8 timeout"]["distributed_timeout_seconds_after_init"] == 40
    assert parsed["llama3_8b_fp8 tensorwise"]["tensor_model_parallel_size"] == 4
    assert parsed["llama3_8b_fp8 tensorwise"]["emo_cost_dtype"] == "fp8"
    blackwell = parsed["llama3_8b_fp8 mxfp8"]
    assert blackwell["loss_path"] == "forward"
    layout = ("tensor", "pipeline", "context")
    sizes = [f"{kind}_{'' if kind == 'context' else 'model_'}parallel_size" for kind in layout]
    assert [blackwell[size] for size in sizes] == [2, 2, 2]
    none = parsed["llama3_8b_fp8 none"]
    assert (none["fp8"], none["objective"], none["sequence_parallel"]) == (None, "mle", False)
    data = parsed["llama3_8b_fp8 data"]
    assert data["data_path"] == ["0.3", "first", "0.7", "second"] and not data["mock_data"]
    assert data["tokenizer_type"] == "HuggingFaceTokenizer"
    assert parsed["llama3_8b_fp8 local"]["transformer_impl"] == "local"


def test_flags_behind_the_recipe_come_last():
    assert printed_command("gpt_125m", "--lr", "1")[-2:] == ["--lr", "1"]
    assert run_script(TRAIN, "gpt_125m", "--lr", "1", DRY_RUN="1").stdout.endswith(" --lr 1 \n")


def test_nodes_meet_at_node_0():
    nodes = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    launch = launch_of(printed_command("gpt_125m", **nodes))
    assert (launch["--nnodes"], launch["--node-rank"], launch["--nproc-per-node"]) == (
        "4",
        "3",
        "8",
    )
    assert launch["--rdzv-endpoint"] == "node0:1234" and "--standalone" not in launch
    assert launch["--local-ranks-filter"] == "0,7"
    assert launch["--log-dir"].endswith("/node_0003")
    # torchrun's own 30 s would cut a save short.
    assert launch["--shutdown-timeout"] == "240"
    assert "--standalone" in launch_of(printed_command("gpt_125m"))
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_JOB_ID": "77", "MASTER_ADDR": "node0"}
    launch = launch_of(printed_command("gpt_125m", **slurm))
    assert (launch["--nnodes"], launch["--node-rank"]) == ("4", "3")
    assert launch["--rdzv-id"] == "77-0" and "/logs/77-0/" in launch["--log-dir"]


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([], {}, "expected a recipe's name before any flag"),
        (["--lr", "1"], {}, "expected a recipe's name before any flag"),
        (["gpt_9t"], {}, "recipe gpt_9t: expected one of gpt_125m.sh llama3_8b_fp8.sh moe.sh"),
        (["llama3_8b_fp8"], {"FP8_RECIPE": "fp6"}, "FP8_RECIPE=fp6: expected delayed, tensorwise,"),
        (["gpt_125m"], {"NNODES": "2"}, "NODE_RANK: expected 0 to NNODES - 1, another on each"),
        (["gpt_125m"], {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: expected the name or"),
        (["gpt_125m"], {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python: expected a Python"),
    ],
)
def test_what_is_missing_is_named(words, settings, message):
    process = run_script(TRAIN, *words, GPUS_PER_NODE="0", **settings)
    assert process.returncode == 78
    assert message in process.stderr and process.stdout == ""


@pytest.mark.parametrize("script", [TRAIN, SBATCH])
def test_help_lists_every_variable(script):
    process = run_script(script, "--help")
    assert process.returncode == 0 and "set -euo" not in process.stdout
    names = ["RUN_DIR", "SHUTDOWN_TIMEOUT_S", "EMO_PREFLIGHT", "PYTHON"]
    names = names if script == TRAIN else ["MAX_REQUEUES", "CONTAINER_RUNTIME", "TASKS"]
    assert all(name in process.stdout for name in names)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, []),
        ({"SLURM_CPUS_PER_TASK": "12"}, ["--cpus-per-task", "12"]),
        (
            {"CONTAINER": "image.sqsh", "CONTAINER_MOUNTS": "/data:/data"},
            ["--container-image", "image.sqsh", "--container-mounts", "/data:/data"]
            + ["--container-workdir", str(ROOT)],
        ),
        (
            {"CONTAINER": "image.sif", "CONTAINER_RUNTIME": "apptainer"},
            [
                "apptainer",
                "exec",
                "--nv",
                "--bind",
                f"{ROOT}:{ROOT}",
                "--pwd",
                str(ROOT),
                "image.sif",
            ],
        ),
    ],
)
def test_sbatch_gives_srun_the_same_script(settings, words):
    settings = {"MASTER_ADDR": "n", "DRY_RUN": "1", **settings}
    process = run_script(SBATCH, "moe", "--lr", "a b", **settings)
    assert process.returncode == 0, process.stderr
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    assert shlex.split(process.stdout) == [*srun, *words, "bash", TRAIN, "moe", "--lr", "a b"]


def test_sbatch_refuses_clearly(tmp_path):
    settings = {"MASTER_ADDR": "n", "DRY_RUN": "1"}
    process = run_script(SBATCH, "moe", CONTAINER="i", CONTAINER_RUNTIME="docker", **settings)
    assert process.returncode == 78
    assert process.stderr == "CONTAINER_RUNTIME=docker: expected pyxis or apptainer\n"
    process = run_script(SBATCH, "moe", SLURM_SUBMIT_DIR=str(tmp_path), **settings)
    assert process.returncode == 78 and "expected the repository" in process.stderr


SRUN_THAT_IS_PREEMPTED = """#!/bin/sh
mkdir -p "$RUN_DIR/checkpoints" && touch "$RUN_DIR/checkpoints/PREEMPTED"
exit 143
"""
# Slurm ends the script that it requeues.
SCONTROL = '#!/bin/sh\necho "$@" >>"$SCONTROL_CALLS"\nkill -KILL $PPID\n'


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({}, "requeue 70"),
        ({"SLURM_ARRAY_JOB_ID": "68", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 68_2"),
        ({"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}, None),
    ],
)
def test_a_preempted_job_requeues_itself_and_no_other_task_of_its_array(tmp_path, settings, call):
    for name, text in {"srun": SRUN_THAT_IS_PREEMPTED, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    settings = {
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "none", "MASTER_ADDR": "n"},
        **{"RUN_DIR": str(tmp_path / "run"), "SLURM_JOB_ID": "70", "SCONTROL_CALLS": str(calls)},
        **settings,
    }
    process = run_script(SBATCH, "moe", **settings)
    if call is None:
        assert process.returncode == 75 and "MAX_REQUEUES=3 is reached" in process.stdout
        assert not calls.exists()
    else:
        assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
        assert calls.read_text().splitlines() == [call]


# What a GPU machine without Transformer Engine runs: its layers are not overridden.
ON_CPU_AS_ON_A_GPU = """
from megatron_emo.training import cpu
from megatron_emo.training.run import pretrain_gpt
del cpu._CPU_VALUES["--transformer-impl"], cpu._CUDA_ONLY["--fp8-format"]
pretrain_gpt()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="Transformer Engine is installed",
)
def test_without_transformer_engine_the_run_ends_before_a_model_is_built(tmp_path):
    settings = {"FP8_RECIPE": "delayed", "GPUS_PER_NODE": "1"}
    command = printed_command("llama3_8b_fp8", SMOKE="1", RUN_DIR=str(tmp_path), **settings)
    flags = command[command.index("pretrain_gpt_emo.py") + 1 :]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_CPU_AS_ON_A_GPU, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode != 0
    assert "--transformer-impl transformer_engine (the default) --fp8-" in result.stderr
    assert "pip install --no-build-isolation 'transformer_engine[pytorch]'" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    own = sorted(str(path) for path in ROOT.glob("tests/multinode/*.sh"))
    process = subprocess.run(
        ["shellcheck", "--external-sources", *SCRIPTS, *own],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llama3_8b_fp8", "moe"])
def test_the_smoke_form_trains(tmp_path, recipe):
    settings = {"SMOKE": "1", "GPUS_PER_NODE": "0", "RUN_DIR": str(tmp_path), "EMO_PREFLIGHT": "1"}
    process = run_script(TRAIN, recipe, **settings, timeout=500)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    scalars = read_scalars(tmp_path / "tensorboard")
    assert list(scalars["lm loss"]) == [1, 2]
    assert scalars["lm loss"][2] < scalars["lm loss"][1] < 6.5  # ln 512 = 6.24
    assert 0.9 < scalars["emo loss"][1] < 1.1
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"
