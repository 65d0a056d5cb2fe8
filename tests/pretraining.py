"""Short real pretraining runs in the pool's ranks, and what their TensorBoard files say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VOCAB_SIZE = 123
ITERATIONS = 10

MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48
    --seq-length 24 --max-position-embeddings 24 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.2
""".split()
TRAINING = f"""
    --micro-batch-size 2 --global-batch-size 8 --train-iters {ITERATIONS}
    --lr 5e-3 --min-lr 1e-3 --lr-decay-style cosine --clip-grad 1.0 --seed 7
    --eval-interval {ITERATIONS} --eval-iters 1 --log-interval 1 --tensorboard-log-interval 1
""".split()
DATA = f"""
    --mock-data --split 98,1,1 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}
    --make-vocab-size-divisible-by 16 --num-workers 0
""".split()


def pretrain(argv: list[str], use_megatron_loss: bool = False, error: str | None = None) -> None:
    """Run `pretrain_gpt(argv)` in this rank and leave the process as it was; for `run_distributed`.

    Args:
        use_megatron_loss: train on GPTModel's own cross-entropy instead, the independent baseline.
        error: pattern of the ValueError with which the run must end; None if it must not.
    """
    from megatron_emo.training import compat, cpu, run

    os.chdir(Path(argv[argv.index("--tensorboard-dir") + 1]))
    try:
        if use_megatron_loss:
            _pretrain_with_megatron_loss(argv)
        elif error is None:
            run.pretrain_gpt(argv)
        else:
            with pytest.raises(ValueError, match=error):
                run.pretrain_gpt(argv)
    finally:
        if cpu.is_needed():
            compat.reset_megatron_state()


def _pretrain_with_megatron_loss(argv: list[str]) -> None:
    import sys
    from functools import partial

    import torch

    from megatron_emo.training import compat, cpu

    sys.argv[1:] = cpu.enable(argv)
    compat.apply_repairs()
    import megatron.training
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    from megatron_emo.training import steps

    def loss_func(loss_mask, losses):
        total = (losses.float() * loss_mask).sum()
        count = loss_mask.sum().to(torch.int)
        return total, count, {"lm loss": torch.stack([total.detach(), count])}

    def forward_step(data_iterator, model):
        batch = steps.get_batch(data_iterator)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, partial(loss_func, batch["loss_mask"])

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    model_config = argument_utils.gpt_config_from_args(args)
    megatron.training.pretrain(
        argument_utils.pretrain_cfg_container_from_args(args, model_config),
        steps.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=steps.get_embedding_ranks,
    )


def read_scalars(directory: Path) -> dict[str, dict[int, float]]:
    """Return name -> iteration -> value of every scalar a run wrote to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
