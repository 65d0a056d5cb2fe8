"""examples/llama3_8b_fp8: its flags are Megatron's, it refuses clearly, and it trains."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emo.training_curves import read_scalars

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "llama3_8b_fp8" / "pretrain.sh"

SETTINGS = {
    "delayed": {},
    "tensorwise": {"RECIPE": "tensorwise", "TP": "4", "EMO_COST_DTYPE": "fp8"},
    "mxfp8": {"RECIPE": "mxfp8", "FP8_FORMAT": "e4m3", "EMO_LOSS_PATH": "forward"},
    "none": {"RECIPE": "none", "TP": "1", "CP": "2", "PP": "2", "OBJECTIVE": "mle"},
    "data": {"DATA_PATH": "0.3 first 0.7 second", "TOKENIZER_MODEL": "somewhere"},
    "local": {"SMOKE": "1", "GLOBAL_BATCH_SIZE": "8"},
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
from megatron_emo.training.arguments import (
    add_emo_arguments, check_supported, emo_config_from_args
)
parsed = {}
for name, argv in json.load(sys.stdin).items():
    # Of all that is asked for, the fusion alone looks for Transformer Engine here.
    sys.argv[1:] = [*argv, "--no-rope-fusion"]
    args = parse_args(add_emo_arguments)
    validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    check_supported(args)
    config = emo_config_from_args(args)
    args.padded_vocab_size = args.vocab_size or 128256
    transformer = argument_utils.gpt_config_from_args(args).transformer
    values = {key: vars(args)[key] for key in vars(args) if not key.startswith("_")}
    values["recipe_of_model"] = transformer.fp8 and str(transformer.fp8_recipe)
    values["loss_path"] = config.loss_path.path
    parsed[name] = values
json.dump(parsed, open(os.environ["PARSED"], "w"), default=str)
"""


def run_script(*flags: str, timeout: int = 300, **settings: str) -> subprocess.CompletedProcess:
    own = ("RECIPE", "TP", "CP", "PP", "SMOKE", "DRY_RUN", "RUN_DIR", "DATA_PATH", "OBJECTIVE")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    return subprocess.run(
        ["bash", str(SCRIPT), *flags],
        env={**environment, "PYTHON": sys.executable, **settings},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def printed_command(**settings: str) -> list[str]:
    process = run_script("--print", **settings)
    assert process.returncode == 0, process.stderr
    return shlex.split(process.stdout)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, dict]:
    """By name in SETTINGS, what Megatron made of the script's flags on 8 ranks."""
    commands = {name: printed_command(**settings) for name, settings in SETTINGS.items()}
    flags = {
        name: command[command.index("pretrain_gpt_emo.py") + 1 :]
        for name, command in commands.items()
    }
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


def test_the_model_is_llama_3_8b(parsed):
    args = parsed["delayed"]
    hidden, layers, ffn = args["hidden_size"], args["num_layers"], args["ffn_hidden_size"]
    key_value = hidden * args["num_query_groups"] // args["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * ffn + 2 * hidden
    embeddings = 2 * args["vocab_size"] * hidden
    assert layers * layer + hidden + embeddings == 8_030_261_248
    assert args["swiglu"] and args["normalization"] == "RMSNorm"
    assert not args["add_bias_linear"] and args["untie_embeddings_and_output_weights"]
    assert (args["seq_length"], args["rotary_base"]) == (8192, 500000)
    assert args["position_embedding_type"] == "rope"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8"])
def test_every_recipe_reaches_the_model(parsed, recipe):
    args = parsed[recipe]
    assert args["fp8"] == ("e4m3" if recipe == "mxfp8" else "hybrid")
    assert recipe in args["recipe_of_model"] and args["bf16"]
    assert args["transformer_impl"] == "transformer_engine"


def test_variables_reach_megatron(parsed):
    assert parsed["delayed"]["tensor_model_parallel_size"] == 2
    assert parsed["delayed"]["sequence_parallel"] and not parsed["none"]["sequence_parallel"]
    assert parsed["delayed"]["emo_cost_embedding"] == "output-layer"
    assert parsed["delayed"]["mock_data"] and parsed["delayed"]["vocab_size"] == 128256
    assert parsed["tensorwise"]["tensor_model_parallel_size"] == 4
    assert parsed["tensorwise"]["emo_cost_dtype"] == "fp8"
    assert parsed["mxfp8"]["loss_path"] == "forward"
    none = parsed["none"]
    assert (none["fp8"], none["objective"]) == (None, "mle")
    assert (none["context_parallel_size"], none["pipeline_model_parallel_size"]) == (2, 2)
    assert parsed["data"]["data_path"] == ["0.3", "first", "0.7", "second"]
    assert not parsed["data"]["mock_data"]
    assert parsed["data"]["tokenizer_type"] == "HuggingFaceTokenizer"
    assert parsed["local"]["transformer_impl"] == "local"


def test_flags_behind_the_name_come_last():
    command = shlex.split(run_script("--print", "--lr", "1", DRY_RUN="0").stdout)
    assert command[-2:] == ["--lr", "1"]
    assert run_script("--lr", "1", DRY_RUN="1").stdout.endswith(" --lr 1 \n")


def test_several_nodes_meet_at_node_0():
    command = printed_command(NNODES="4", NODE_RANK="3", MASTER_ADDR="node0")
    launch = command[: command.index("pretrain_gpt_emo.py")]
    assert launch[launch.index("--node-rank") + 1] == "3"
    assert launch[launch.index("--master-addr") + 1] == "node0"
    assert "--standalone" not in launch and "--standalone" in printed_command()
    missing = run_script("--print", NNODES="4")
    assert missing.returncode != 0 and "NODE_RANK: expected 0 to NNODES - 1" in missing.stderr


def test_an_unknown_recipe_is_named():
    process = run_script("--print", RECIPE="fp6")
    assert process.returncode != 0
    assert process.stderr == "RECIPE=fp6: expected delayed, tensorwise, mxfp8 or none\n"


without_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="Transformer Engine is installed",
)

# What a GPU machine without Transformer Engine runs: its layers are not overridden.
ON_CPU_AS_ON_A_GPU = """
from megatron_emo.training import cpu
from megatron_emo.training.run import pretrain_gpt
del cpu._CPU_VALUES["--transformer-impl"], cpu._CUDA_ONLY["--fp8-format"]
pretrain_gpt()
"""


@without_engine
def test_the_entry_point_refuses_before_a_model_is_built(tmp_path):
    settings = {"RECIPE": "delayed", "TRANSFORMER_IMPL": "transformer_engine"}
    command = printed_command(SMOKE="1", RUN_DIR=str(tmp_path), **settings)
    flags = command[command.index("pretrain_gpt_emo.py") + 1 :]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_CPU_AS_ON_A_GPU, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode != 0
    assert "ValueError: --transformer-impl transformer_engine (the default) --fp8-" in result.stderr


@without_engine
def test_without_transformer_engine_nothing_is_started(tmp_path):
    run_dir = tmp_path / "run"
    process = run_script(RUN_DIR=str(run_dir))
    assert process.returncode == 1
    assert process.stderr.startswith("--transformer-impl transformer_engine (the default) --fp8-")
    assert "pip install --no-build-isolation 'transformer_engine[pytorch]'" in process.stderr
    assert "nvcr.io/nvidia/pytorch" in process.stderr and "Traceback" not in process.stderr
    assert process.stdout == "" and not run_dir.exists()


@pytest.mark.slow
def test_the_smoke_form_trains(tmp_path):
    process = run_script(SMOKE="1", RUN_DIR=str(tmp_path))
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    scalars = read_scalars(tmp_path / "tensorboard")
    assert list(scalars["lm loss"]) == [1, 2]
    assert scalars["lm loss"][2] < scalars["lm loss"][1] < 6.5  # ln 512 = 6.24
    assert 0.9 < scalars["emo loss"][1] < 1.1
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"
