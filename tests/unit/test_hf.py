"""TrainerLoss against the released wheel, against whole logits, and in real Trainer runs."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_emo import build_objective
from megatron_emo.cost_embedding import CostEmbeddingWarning, unit_rows, write_cost_embedding
from megatron_emo.hf import TrainerLoss

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 61
PATHS = ("logits", "recompute", "forward")


def tiny_model(kind: str = "llama", **changes):
    common = dict(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == "gpt2":
        sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32)
        config = transformers.GPT2Config(**common | sizes | changes)
    else:
        classes = {
            "llama": transformers.LlamaConfig,
            "gemma2": transformers.Gemma2Config,
            "granite": transformers.GraniteConfig,
            "phi": transformers.PhiConfig,
            "mixtral": transformers.MixtralConfig,
        }
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=2, num_key_value_heads=1)
        config = classes[kind](**common | sizes | changes)
    return transformers.AutoModelForCausalLM.from_config(config)


def example(batch: int = 3, seq: int = 10, vocab_size: int = VOCAB_SIZE):
    """Token ids and labels, of which some do not count."""
    ids = torch.randint(0, vocab_size, (batch, seq))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, -3:] = -100
    return ids, labels


def scaled_up(model):
    """The model in fp64 with an output layer of some size, so that logits are not all near 0."""
    model = model.double()
    model.get_output_embeddings().weight.data.mul_(40)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def released():
    """EMOLoss 0.0.3, from the wheel that `make env` puts beside the environment."""
    root = Path(sys.prefix) / "oracles" / "EMOLoss-0.0.3" / "emo"
    if not root.is_dir():
        pytest.skip("EMOLoss 0.0.3 is not installed; `make env` does")
    spec = importlib.util.spec_from_file_location("emo_0_0_3", root / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EMOLoss


# What it computes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_value_and_gradients_equal_release_0_0_3(kind, mode, path):
    model = scaled_up(tiny_model(kind))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, labels = example()
    table = model.get_output_embeddings().weight.detach().clone()
    expected = released()(model(input_ids=ids).logits, labels, table, mode=mode)
    expected.backward()
    expected_gradients = gradients(model)

    settings = {"weight_max": 3.0} if mode == 1 else {}
    loss = TrainerLoss(model, f"emo{mode}", path=path, **settings)
    value = loss(model(input_ids=ids), labels)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_mle_equals_the_models_own_loss_with_and_without_a_count(path):
    model = scaled_up(tiny_model()).train()
    ids, labels = example()
    loss = TrainerLoss(model, "mle", path=path)
    for kwargs in ({}, {"num_items_in_batch": torch.tensor(37.0)}, {"num_items_in_batch": 37}):
        value = loss(model(input_ids=ids), labels, **kwargs)
        loss.release()
        expected = model(input_ids=ids, labels=labels, **kwargs).loss
        # Their loss is fp32.
        torch.testing.assert_close(value.float(), expected.float(), rtol=1e-6, atol=0)
        loss = TrainerLoss(model, "mle", path=path)


@pytest.mark.parametrize("path", PATHS)
def test_parts_of_a_batch_add_up_to_it(path):
    model = scaled_up(tiny_model()).train()
    loss = TrainerLoss(model, "emo1", path=path)
    ids, labels = example(batch=6)
    count = (labels[:, 1:] != -100).sum()
    whole = loss(model(input_ids=ids), labels)
    whole.backward()
    expected = gradients(model)
    total = 0
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        value = loss(model(input_ids=ids[part]), labels[part], num_items_in_batch=count)
        value.backward()
        total += value.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=0, atol=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def test_a_count_that_repeats_for_each_gpu_gives_the_same_loss_as_trainer_uses_it():
    model = scaled_up(tiny_model())
    loss = TrainerLoss(model, "emo1")
    ids, labels = example()
    outputs, count = model(input_ids=ids), 22
    expected = loss(outputs, labels, num_items_in_batch=torch.tensor(count))
    repeated = torch.tensor(count).unsqueeze(0).expand(4, -1)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=repeated) * 4, expected)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0.0)])
def test_a_batch_without_counted_tokens_is_zero(count):
    model = tiny_model()
    labels = torch.full((2, 5), -100)
    value = TrainerLoss(model)(model(input_ids=labels.abs() % 50), labels, count)
    assert value.item() == 0.0


@pytest.mark.parametrize("path", PATHS)
def test_means_are_over_the_tokens_trained_on_since_the_last_call(path):
    model = scaled_up(tiny_model()).train()
    loss = TrainerLoss(model, "emo1", path=path)
    assert loss.pop_means() == {}
    ids, labels = example()
    loss(model(input_ids=ids[:1]), labels[:1])
    loss(model(input_ids=ids[1:]), labels[1:])
    means = loss.pop_means()
    assert loss.pop_means() == {}
    loss.release()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
        loss(model(input_ids=ids), labels)
    assert loss.pop_means() == {}
    target, keep = labels[:, 1:], labels[:, 1:] != -100
    expected = nn.functional.cross_entropy(logits[keep], target[keep])
    assert means["lm loss"] == pytest.approx(expected.item(), rel=1e-12)
    rows = unit_rows(model.get_output_embeddings().weight)
    cost = 1 - rows @ rows.T
    expected_cost = (logits[keep].softmax(-1) * cost[target[keep]]).sum(-1).mean()
    assert means["emo loss"] == pytest.approx(expected_cost.item(), rel=1e-10)
    assert set(means) == {"lm loss", "emo loss", "objective", "objective weight"}


@pytest.mark.parametrize("path", ["recompute", "forward"])
def test_autocast_gives_what_its_logits_give(path):
    model = tiny_model().train()
    model.get_output_embeddings().weight.data.mul_(40)
    ids, labels = example()
    results = {}
    for name in ("logits", path):
        loss = TrainerLoss(model, "emo1", path=name)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(input_ids=ids)
            value = loss(outputs, labels)
        value.backward()
        results[name] = value.detach(), gradients(model)
    (a, grad_a), (b, grad_b) = results.values()
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    for name, gradient in grad_a.items():
        assert gradient.dtype == torch.float32
        assert (gradient - grad_b[name]).norm() <= 2e-2 * gradient.norm()


@pytest.mark.parametrize("path", PATHS)
def test_fp32_scores_stay_fp32_inside_autocast(path):
    model = scaled_up(tiny_model()).float().train()
    loss = TrainerLoss(model, "emo2", path=path)
    ids, labels = example()
    expected = loss(model(input_ids=ids), labels)
    outputs = model(input_ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(outputs, labels), expected)


# Where logits are formed


def test_auto_withholds_logits_where_they_do_not_fit():
    vocab_size = 5000
    model = tiny_model(vocab_size=vocab_size).train()
    loss = TrainerLoss(model, "emo1", workspace_mb=1)
    assert loss.path == "auto" and loss.why_logits == ""
    ids, labels = example(batch=2, seq=40, vocab_size=vocab_size)
    large = model(input_ids=ids)
    assert large.logits.shape == (2, 0, vocab_size)
    value = loss(large, labels)
    assert model(input_ids=ids[:1, :9]).logits.shape == (1, 9, vocab_size)
    loss.release()
    torch.testing.assert_close(value, loss(model(input_ids=ids), labels))


def test_evaluation_generation_and_copies_form_logits():
    model = tiny_model().train()
    loss = TrainerLoss(model, "emo1", path="recompute")
    ids, labels = example()
    assert model(input_ids=ids.flip(0)).logits.shape[1] == 0
    with torch.no_grad():
        in_evaluation = model(input_ids=ids)
    assert in_evaluation.logits.shape[1] == 10
    # Not the hidden states of the step before.
    expected = loss(in_evaluation, labels)
    twin = copy.deepcopy(model)
    assert twin(input_ids=ids).logits.shape[1] == 10
    torch.testing.assert_close(loss(model(input_ids=ids), labels), expected)
    assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape[1] <= 7
    model.eval()
    assert model(input_ids=ids).logits.shape[1] == 10


def test_one_loss_at_a_time_has_the_hook_and_none_when_it_is_gone():
    model = tiny_model().train()
    ids, labels = example()
    first = TrainerLoss(model, "emo1", path="recompute")
    second = TrainerLoss(model, "emo1", path="logits")
    assert torch.equal(second(model(input_ids=ids), labels), first(model(input_ids=ids), labels))
    third = TrainerLoss(model, "emo1", path="forward")
    assert model(input_ids=ids).logits.shape[1] == 0
    with pytest.raises(ValueError, match=r"one for each of the model's \(3, 0\) positions"):
        second(model(input_ids=ids), labels)
    third.release()
    assert model(input_ids=ids).logits.shape[1] == 10
    assert third.path == "logits"
    fourth = TrainerLoss(model, "emo1", path="recompute")
    assert model(input_ids=ids).logits.shape[1] == 0
    del fourth
    assert model(input_ids=ids).logits.shape[1] == 10


def test_hidden_states_are_let_go_of_with_the_loss():
    model = tiny_model().train()
    loss = TrainerLoss(model, "emo1", path="recompute")
    ids, labels = example()
    outputs = model(input_ids=ids)
    loss(outputs, labels)
    with pytest.raises(ValueError, match=r"each of the model's \(3, 0\) positions"):
        loss(outputs, labels)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, "changes the logits"),
        ("granite", {"logits_scaling": 8.0}, "changes the logits"),
        ("phi", {}, "output layer has a bias"),
    ],
)
def test_models_that_change_logits_keep_them(kind, changes, reason):
    model = tiny_model(kind, **changes).train()
    loss = TrainerLoss(model, "emo1")
    assert loss.path == "logits" and reason in loss.why_logits
    assert model(input_ids=example()[0]).logits.shape[1] == 10
    with pytest.raises(ValueError, match=f"path: recompute needs .*{reason}.*expected logits"):
        TrainerLoss(model, "emo1", path="recompute")


def test_making_one_uses_no_random_numbers_and_leaves_modes_alone():
    model = tiny_model("gpt2").train()
    frozen = model.transformer.h[0].eval()
    before = torch.get_rng_state()
    TrainerLoss(model, "emo1")
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and not any(m.training for m in frozen.modules())
    assert all(m.training for m in model.transformer.h[1].modules())


# The cost table


def test_the_default_table_stays_and_the_live_one_moves():
    model = scaled_up(tiny_model())
    ids, labels = example()
    frozen = TrainerLoss(model, "emo")
    live = TrainerLoss(model, "emo", cost_embedding="live")
    start = model.get_output_embeddings().weight.detach().clone()
    model.get_output_embeddings().weight.data.add_(torch.randn_like(start) * 8)
    outputs = model(input_ids=ids)
    now = model.get_output_embeddings().weight.detach().clone()
    for loss, table in ((frozen, start), (live, now)):
        given = TrainerLoss(model, "emo", cost_embedding=table)
        assert torch.equal(loss(outputs, labels), given(outputs, labels))
    assert not torch.equal(frozen(outputs, labels), live(outputs, labels))


def test_a_file_serves_with_its_tokenizer_checked(tmp_path):
    model = tiny_model()
    table = torch.randn(VOCAB_SIZE - 6, 5)
    path = tmp_path / "table.safetensors"
    write_cost_embedding(path, table, source="test", tokenizer_fingerprint="abc")
    ids, labels = example()
    labels = labels.where(labels < 50, -100)
    with pytest.warns(CostEmbeddingWarning, match="has 55 rows, the model's output layer 61"):
        loss = TrainerLoss(model, "emo1", cost_embedding=path)
    full = torch.cat([table, torch.zeros(6, 5)])
    outputs = model(input_ids=ids)
    given = TrainerLoss(model, "emo1", cost_embedding=full)
    torch.testing.assert_close(loss(outputs, labels), given(outputs, labels))

    class OtherTokenizer:
        vocab = ["a", "b"]

    with pytest.raises(ValueError, match="fingerprint abc"):
        TrainerLoss(model, "emo1", cost_embedding=str(path), tokenizer=OtherTokenizer())
    with pytest.raises(ValueError, match="expected at most 61 rows.*got 62"):
        TrainerLoss(model, "emo1", cost_embedding=torch.ones(62, 3))


# What is refused


def test_mistakes_are_named():
    model = tiny_model()
    loss = TrainerLoss(model)
    ids, labels = example()
    with pytest.raises(ValueError, match="labels: expected token ids, got None"):
        loss(model(input_ids=ids), None)
    with pytest.raises(ValueError, match=r"each of the model's \(3, 10\) positions, got \(3, 9\)"):
        loss(model(input_ids=ids), labels[:, 1:])
    with pytest.raises(ValueError, match="target: expected ids in"):
        loss(model(input_ids=ids), labels.clamp(min=VOCAB_SIZE))
    with pytest.raises(ValueError, match="eta: expected no settings beside an Objective"):
        TrainerLoss(model, build_objective("mle"), eta=0.5)
    with pytest.raises(ValueError, match="path: expected one of auto"):
        TrainerLoss(model, path="fused")


def test_models_it_cannot_serve_are_named():
    with pytest.raises(ValueError, match="got Linear, which shows no output layer"):
        TrainerLoss(nn.Linear(2, 2))
    config = transformers.T5Config(
        vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        TrainerLoss(transformers.T5ForConditionalGeneration(config))
    moe = dict(num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="output_router_logits: expected False, got True"):
        TrainerLoss(tiny_model("mixtral", output_router_logits=True, **moe))
    TrainerLoss(tiny_model("mixtral", **moe))


def test_a_sharded_output_layer_is_named_with_the_way_out():
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"\[61, h\], got a Parameter \(0,\).*a file as cost_emb"):
        TrainerLoss(model)
    loss = TrainerLoss(model, cost_embedding=torch.randn(VOCAB_SIZE, 3))
    assert loss.path == "logits" and "looks sharded" in loss.why_logits


# Real runs


class Sentences(torch.utils.data.Dataset):
    """Rows of counting: the next token is the last one plus the row's step."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        first = torch.randint(0, VOCAB_SIZE, (count, 1), generator=generator)
        step = torch.randint(1, 3, (count, 1), generator=generator)
        self.rows = (first + step * torch.arange(12)) % VOCAB_SIZE
        # Rows of unlike counts, which a mean over microbatches would weigh wrongly.
        self.lengths = torch.randint(3, 13, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.rows[index].clone()
        labels[self.lengths[index] :] = -100
        return {"input_ids": self.rows[index], "labels": labels}


def trainer_of(tmp_path, model, loss, **arguments):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    settings = dict(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        seed=3,
    )
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings | arguments),
        train_dataset=Sentences(80),
        eval_dataset=Sentences(16),
        compute_loss_func=loss,
    )


def logged_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluation_rows() -> tuple[torch.Tensor, torch.Tensor]:
    data = Sentences(16)
    rows = [data[i] for i in range(16)]
    return tuple(torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))


@torch.no_grad()
def cross_entropy(model) -> float:
    ids, labels = evaluation_rows()
    logits, target = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
    keep = target != -100
    return nn.functional.cross_entropy(logits[keep], target[keep]).item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["mle", "emo1", "emo2"])
def test_a_trainer_run_learns(tmp_path, name, path):
    model = tiny_model()
    start = cross_entropy(model)
    trainer = trainer_of(tmp_path, model, TrainerLoss(model, name, path=path))
    trainer.train()
    losses = logged_losses(trainer)
    assert len(losses) == 10
    assert max(losses[-3:]) < min(losses[:3])
    assert cross_entropy(model) < 0.9 * start


@pytest.mark.parametrize("name", ["mle", "emo1"])
def test_the_evaluation_loss_is_the_objective_on_the_models_logits(tmp_path, name):
    model = tiny_model()
    settings = {"weight_max": 3.0} if name == "emo1" else {}
    loss = TrainerLoss(model, name, path="recompute", **settings)
    found = trainer_of(tmp_path, model, loss).evaluate()["eval_loss"]
    ids, labels = evaluation_rows()
    table = model.get_output_embeddings().weight.detach()
    if name == "mle":
        expected = cross_entropy(model)
    else:
        expected = released()(model(input_ids=ids).logits, labels, table, mode=1).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_accumulation_equals_one_large_batch(tmp_path, path):
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        model = tiny_model().double()
        loss = TrainerLoss(model, "emo1", path=path)
        trainer = trainer_of(
            tmp_path,
            model,
            loss,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        results.append((logged_losses(trainer), dict(model.named_parameters())))
    (losses_a, weights_a), (losses_b, weights_b) = results
    assert losses_a == pytest.approx(losses_b, abs=1e-6)
    for name, weight in weights_a.items():
        torch.testing.assert_close(weight, weights_b[name], rtol=0, atol=1e-6)


def test_a_trainer_run_under_bf16_autocast_learns(tmp_path):
    model = tiny_model()
    loss = TrainerLoss(model, "emo1", path="forward")
    trainer = trainer_of(tmp_path, model, loss, bf16=True)
    trainer.train()
    losses = logged_losses(trainer)
    assert max(losses[-3:]) < min(losses[:3])
