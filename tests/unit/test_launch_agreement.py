"""What has to be alike on all ranks, and the table of what is not."""

from __future__ import annotations

import argparse
import enum

import pytest
import torch
from store_ranks import on_ranks

from megatron_emo.launch import environment
from megatron_emo.launch.agreement import check_agreement, describe


class Colour(enum.Enum):
    RED = 1


def namespace(**changes):
    values = {"lr": 1e-3, "rank": 0, "params_dtype": torch.bfloat16, "activation": torch.relu}
    return argparse.Namespace(**values | changes)


def verdicts(described):
    return on_ranks(
        len(described),
        lambda rank, exchange: check_agreement(described[rank], rank=rank, exchange=exchange),
    )


def test_equal_descriptions_pass():
    assert verdicts([{"--lr": "1"}, {"--lr": "1"}]) == [None, None]


def test_a_table_names_key_ranks_and_values_on_every_rank():
    base = {"--lr": "0.001", "--seed": "7"}
    other = base | {"--lr": "0.005", "variable OMP_NUM_THREADS": "4"}
    errors = verdicts([base, base, other, base])
    assert len({str(error) for error in errors}) == 1
    lines = [line.split() for line in str(errors[0]).splitlines()[1:]]
    assert lines == [
        ["what", "ranks", "value"],
        ["--lr", "0-1,", "3", "0.001"],
        ["2", "0.005"],
        ["variable", "OMP_NUM_THREADS", "0-1,", "3", "(absent)"],
        ["2", "4"],
    ]
    assert {error.exit_code for error in errors} == {78}


def test_many_sets_of_ranks_are_cut_and_counted():
    error = verdicts([{"--seed": str(rank)} for rank in range(11)])[0]
    assert "and 3 more sets of ranks" in str(error) and "--seed" in str(error)


def test_values_that_differ_behind_the_cut_are_told_apart():
    long = "x" * 200
    shown = str(verdicts([{"--data-path": long + "a"}, {"--data-path": long + "b"}])[0])
    values = [line.split()[-1] for line in shown.splitlines() if "sha256" in line]
    assert len(set(values)) == 2


def test_ranks_and_what_one_rank_writes_may_differ():
    first = describe(namespace(rank=0, local_rank=0, tensorboard_dir="a"))
    assert first == describe(namespace(rank=1, local_rank=1, tensorboard_dir="b"))
    assert describe(namespace(lr=2e-3)) != describe(namespace())


def test_a_description_has_no_addresses_and_no_order_of_sets():
    described = describe(
        namespace(kind=Colour.RED, many={"b", "a"}, nested={"k": [Colour.RED]}, thing=object())
    )
    assert described["--activation"].endswith("relu")
    assert described["--kind"] == "Colour.RED" and described["--many"] == "{a, b}"
    assert described["--nested"] == "{k: [Colour.RED]}" and described["--thing"] == "object"
    assert described["--params-dtype"] == "torch.bfloat16"


def test_a_secret_is_compared_and_not_shown():
    shown = str(
        verdicts([describe(namespace(wandb_api_key=key)) for key in ("hunter2-a", "hunter2-b")])[0]
    )
    assert "--wandb-api-key" in shown and "hunter2" not in shown


@pytest.mark.parametrize(
    ("name", "is_taken"),
    [
        ("NCCL_ALGO", True),
        ("OMP_NUM_THREADS", True),
        ("CUDA_DEVICE_MAX_CONNECTIONS", True),
        ("PYTHONHASHSEED", True),
        ("NVTE_FLASH_ATTN", True),
        ("CUDA_VISIBLE_DEVICES", False),  # each rank its own, under srun
        ("NCCL_SOCKET_IFNAME", False),  # interfaces have other names on other hosts
        ("TRITON_CACHE_DIR", False),
        ("TORCHELASTIC_ERROR_FILE", False),
        ("HF_TOKEN", False),
        ("WANDB_API_KEY", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("NCCL_AUTH_TOKEN", False),
        ("HOME", False),
    ],
)
def test_variables_are_taken_by_an_allow_list(name, is_taken):
    assert (name in environment.variables({name: "1"})) is is_taken


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("--wandb-api-key", True),
        ("hf_token", True),
        ("--db-password", True),
        ("--tokenizer-type", False),
        ("max_tokens_to_oom", False),
        ("kv_channels", False),
    ],
)
def test_secret_names(name, is_secret):
    assert environment.is_secret_name(name) is is_secret


def test_versions_name_what_computes_and_hash_our_sources():
    found = environment.versions()
    assert found["torch"] == torch.__version__
    assert "sources " in found["megatron_emo"]
    assert {"python", "megatron-core", "transformer-engine", "apex", "triton"} <= set(found)


def test_the_machine_names_its_host_and_processors():
    found = environment.machine()
    assert int(found["processors"]) >= 1 and found["host"]
