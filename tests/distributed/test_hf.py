"""TrainerLoss on two data-parallel processes: what one process finds for the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from megatron_emo.hf import TrainerLoss

VOCAB_SIZE = 37


def build_model(tied):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(config).double().train()
    model.lm_head.weight.data.mul_(20)
    return model


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_equals_one_process(path, tied, find_unused):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB_SIZE, (4, 9), generator=generator)
    labels = ids.clone()
    labels[0, 2:] = -100  # ranks with unlike counts
    alone = build_model(tied)
    expected = TrainerLoss(alone, "emo1", path="logits")(alone(input_ids=ids), labels)
    expected.backward()

    model = build_model(tied)
    loss = TrainerLoss(model, "emo1", path=path)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    ranks, mine = dist.get_world_size(), slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    count = (labels[:, 1:] != -100).sum()
    value = loss(wrapped(input_ids=ids[mine]), labels[mine], num_items_in_batch=count)
    # DDP takes the mean over processes; Trainer makes up for that in the same way.
    (value * ranks).backward()
    total = value.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=0, atol=1e-12)
    wanted = gradients(alone)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["logits", "recompute", "forward"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_equal_one(run_distributed, path, tied):
    pytest.importorskip("transformers")
    run = run_distributed(2)
    run(check_equals_one_process, path=path, tied=tied, find_unused=False)


def test_every_parameter_is_found_used(run_distributed):
    pytest.importorskip("transformers")
    run = run_distributed(2)
    run(check_equals_one_process, path="recompute", tied=False, find_unused=True)
