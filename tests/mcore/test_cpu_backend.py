"""Megatron's own `pretrain()`, with its own cross-entropy, on gloo ranks without CUDA.

The layouts start from one checkpoint, so that they differ in nothing but who computes what. Losses
are read back from the TensorBoard files that Megatron wrote.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_emo.training import cpu

if not cpu.is_needed():
    pytest.skip("CUDA is available: nothing to stand in for", allow_module_level=True)

BASE = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --position-embedding-type rope
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8
    --train-iters 4 --eval-iters 0 --lr 1e-2 --lr-decay-style constant --num-workers 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --make-vocab-size-divisible-by 32
    --log-interval 1 --attention-dropout 0 --hidden-dropout 0 --split 1,0,0
""".split()
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
LAYOUTS = {
    "tensor": "--tensor-model-parallel-size 2",
    "sequence": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2",
    "interleaved": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "optimizer": "--use-distributed-optimizer",
}


def datasets_provider(num_samples, vp_stage=None):
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args, get_tokenizer
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )

    def is_built_on_rank() -> bool:
        is_used = is_first_or_last_pipeline_stage(vp_stage)
        return is_used and mpu.get_tensor_model_parallel_rank() == 0

    builder = BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, is_built_on_rank, config)
    return builder.build()


datasets_provider.is_distributed = True


def loss_func(loss_mask, token_losses):
    loss = torch.sum(token_losses.float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens])}


def forward_step(data_iterator, model):
    from megatron.core import mpu
    from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    batch = dict.fromkeys(("tokens", "position_ids", "attention_mask", "labels", "loss_mask"))
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        is_source = mpu.get_tensor_model_parallel_rank() == 0
        batch = get_batch_on_this_tp_rank(
            {name: tensor.cuda() for name, tensor in next(data_iterator).items()}
            if is_source
            else {},
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            has_cu_seqlens=False,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            cp_size=1,
            tp_rank=mpu.get_tensor_model_parallel_rank(),
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
            is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        )
    token_losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return token_losses, partial(loss_func, batch["loss_mask"])


def train(flags: str, directory: str) -> list[float]:
    """Run `pretrain()` once and return the loss of each iteration on the last rank, []
    elsewhere."""
    from megatron_emo.training import compat

    argv = [*BASE, *flags.split(), "--tensorboard-dir", directory]
    sys.argv = ["pretrain", *cpu.enable(argv)]
    compat.apply_repairs()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    assert (args.rank, args.world_size) == (
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
    )
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    try:
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    finally:
        compat.reset_megatron_state()
    torch.distributed.barrier()
    is_last = args.rank == args.world_size - 1
    return logged_losses(directory) if is_last else []


def logged_losses(directory: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory)
    events.Reload()
    return [event.value for event in events.Scalars("lm loss")]


def check_layouts_agree(directory: str) -> None:
    start = f"--load {directory}/start --finetune"
    train(f"--train-iters 1 --save {directory}/start --save-interval 1", f"{directory}/first")
    expected = train(start, f"{directory}/data")
    for name, flags in LAYOUTS.items():
        losses = train(f"{start} {flags}", f"{directory}/{name}")
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5, msg=f"{name}: {losses}")
    again = train(start, f"{directory}/again")
    assert again == expected, "an earlier run in the same process left something behind"
    assert len(expected) in (0, 4)


def check_resume_is_bit_identical(flags: str, directory: str) -> None:
    straight = train(f"{flags} --save {directory}/run --save-interval 2", f"{directory}/straight")
    resumed = train(f"{flags} --load {directory}/run --ckpt-step 2", f"{directory}/resumed")
    assert resumed == straight[2:]


def test_parallel_layouts_give_the_same_losses(run_distributed, tmp_path):
    run_distributed(2)(check_layouts_agree, directory=str(tmp_path))


@pytest.mark.parametrize("layout", ["sequence", "optimizer"])
def test_resume_with_dropout_is_bit_identical(run_distributed, tmp_path, layout):
    flags = f"{LAYOUTS[layout]} {DROPOUT}"
    run_distributed(2)(check_resume_is_bit_identical, flags=flags, directory=str(tmp_path))


def test_typed_backends_are_overridden_and_named():
    argv, overridden = cpu.cpu_arguments(["--transformer-impl=transformer_engine", "--bf16"])
    assert argv[:2] == ["--transformer-impl=transformer_engine", "--bf16"]
    assert argv[argv.index("--transformer-impl") + 1] == "local"
    assert overridden == ["--transformer-impl transformer_engine -> local"]


@pytest.mark.parametrize(
    "argv",
    [["--fp8-format", "hybrid"], ["--context-parallel-size=2"], ["--tp-comm-overlap", "--bf16"]],
)
def test_what_only_cuda_can_do_is_refused_by_its_flag(argv):
    with pytest.raises(ValueError, match=argv[0].partition("=")[0]):
        cpu.cpu_arguments(argv)


def test_flags_that_ask_for_nothing_pass():
    cpu.cpu_arguments(["--context-parallel-size", "1", "--cuda-graph-impl", "none"])


def test_a_plain_process_is_rank_0_of_1(monkeypatch):
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*launch, "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)
    cpu.set_launch_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert os.environ["MASTER_PORT"] == "0"


def test_importing_the_module_installs_nothing():
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert Path(cpu.__file__).name == "cpu.py"
