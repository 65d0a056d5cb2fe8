"""A loss or gradient that is not finite stops the run before the optimizer, with nothing saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pretraining import DATA, MODEL, TRAINING

TP2 = ["--tensor-model-parallel-size", "2"]
RUN = [*MODEL, *TRAINING, *DATA, *TP2, "--objective", "emo1"]


def poison(patch, where, microbatch):
    """Make one number NaN or too large: EMO's share of the loss, a weight, or all gradients."""
    import torch
    from megatron.training import training

    from megatron_emo.training import steps

    loss_func, setup = steps.loss_func, training.setup_model_and_optimizer
    count = 0

    def loss_with_nan(loss_mask, output_tensor, *, microbatch):
        nonlocal count
        count += 1
        if count == at:
            output = microbatch.output
            microbatch.output = output._replace(loss=output.loss * torch.nan)
            output_tensor = output_tensor * torch.nan
        return loss_func(loss_mask, output_tensor, microbatch=microbatch)

    def setup_poisoned(*args, **kwargs):
        result = setup(*args, **kwargs)
        for weight in result[0][0].parameters():
            if where == "weight" and os.environ["RANK"] == "1":
                weight.data.view(-1)[0] = torch.nan
            if where == "gradient":
                weight.register_hook(lambda gradient: gradient + 1e30)
        return result

    at = microbatch
    patch.setattr(steps, "loss_func", loss_with_nan)
    patch.setattr(training, "setup_model_and_optimizer", setup_poisoned)


def stop(argv, message, where, microbatch=0):
    """In a rank: the run ends in NonFiniteError, and the optimizer never steps on what is not
    finite."""
    import torch

    from megatron_emo.launch.exit_codes import NonFiniteError
    from megatron_emo.training import compat, run

    os.chdir(Path(argv[argv.index("--tensorboard-dir") + 1]))
    steps = []
    adam = torch.optim.Adam.step
    try:
        with pytest.MonkeyPatch.context() as patch:
            poison(patch, where, microbatch)
            patch.setattr(
                torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or adam(self)
            )
            with pytest.raises(NonFiniteError, match=message) as error:
                run.pretrain_gpt(argv)
        assert error.value.exit_code == 65
    finally:
        compat.reset_megatron_state()
    # Four microbatches a step.
    assert len(steps) == (microbatch - 1) // 4 if microbatch else not steps


@pytest.fixture
def stops(run_distributed, tmp_path, cost_embedding):
    """Return stops(*flags, message=, where=, microbatch=) -> names in its --save folder."""

    def call(*flags, **kwargs):
        logs, saves = tmp_path / "logs", tmp_path / "saves"
        logs.mkdir(exist_ok=True)
        argv = [*RUN, "--emo-cost-embedding", str(cost_embedding), *flags]
        argv += ["--tensorboard-dir", str(logs), "--save", str(saves), "--save-interval", "1"]
        run_distributed(2)(stop, argv=argv, **kwargs)
        return sorted(path.name for path in saves.glob("iter_*")) if saves.is_dir() else []

    return call


def test_emo_at_the_first_step(stops):
    message = (
        r"iteration 1, before the optimizer's step; nothing is saved\n"
        r"  rank 0: NaN in the local forward loss: nan. EMO: the model's cross-entropy is finite, "
        r"objective not \(lm loss \d(.|\n)*  rank 1: NaN"
    )
    assert stops(message=message, where="loss", microbatch=2) == []


def test_the_model_at_the_first_step_after_a_resume(stops, initial_checkpoint):
    flags = ["--load", str(initial_checkpoint), "--no-load-optim", "--no-load-rng"]
    flags += ["--override-opt-param-scheduler"]
    message = (
        r"iteration 2, the first after the resume, before the optimizer's step; nothing is saved"
        r"\n  rank 0: .*The model: its cross-entropy is not finite, with or without EMO \(lm loss "
        r"nan"
    )
    assert stops(*flags, message=message, where="weight") == []


def test_a_later_step_saves_nothing_more_and_tells_of_the_second_run(stops):
    message = r"iteration 3, before .* nothing is saved; a second run of the step gave another val"
    saved = stops(message=message, where="loss", microbatch=10)
    assert saved == ["iter_0000001", "iter_0000002"]


@pytest.mark.slow
def test_gradients_that_overflow_with_finite_losses(stops):
    message = r"iteration 1.*\n  rank 0: found Inf in local grad norm .*losses are finite \(lm loss"
    assert stops(message=message, where="gradient") == []


def test_the_norm_is_looked_at_whatever_megatron_is_told(stops):
    flag = "--no-check-for-nan-in-loss-and-grad"
    message = r"iteration 1: the gradient's norm is inf, before the optimizer's step; nothing is sa"
    assert stops(flag, message=message, where="gradient") == []


@pytest.mark.slow
def test_the_first_step_is_checked_with_reruns_disabled(stops):
    message = r"iteration 2, before the optimizer's step; nothing is saved\n  rank 0: NaN in the"
    flags = ("--rerun-mode", "disabled")
    assert stops(*flags, message=message, where="loss", microbatch=6) == ["iter_0000001"]
