"""`pretrain_gpt`: everything between a command line and Megatron's `pretrain()`."""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from megatron_emo.training import compat, cpu
from megatron_emo.training.arguments import (
    EmoConfig,
    add_emo_arguments,
    check_supported,
    emo_config_from_args,
)
from megatron_emo.training.model_arguments import (
    add_model_arguments,
    model_config_from_args,
    with_checkpoint_arguments,
)
from megatron_emo.training.transformer_engine import check_transformer_engine


def pretrain_gpt(argv: list[str] | None = None, program_start: float | None = None) -> None:
    """Pretrain a GPT model on Megatron's loop with the objective the flags name.

    Args:
        argv: arguments without the program's name; by default those of the process.
        program_start: time.time() before the imports, for Megatron's start-up report.

    Raises:
        ValueError: flags that do not fit together, or a table that does not fit the run.
    """
    argv = with_checkpoint_arguments(list(sys.argv[1:] if argv is None else argv))
    sys.argv[1:] = cpu.enable(argv)
    # Only now: these imports need CUDA or the stand-ins that `enable` put in its place.
    import megatron.training as megatron_training
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, inprocess_restart
    from megatron.training.arguments import parse_and_validate_args

    from megatron_emo.training import (
        checkpointing,
        finite,
        preflight,
        recording,
        signals,
        state,
        steps,
    )

    compat.apply_repairs()
    if program_start is not None:
        megatron_training.set_startup_timestamps(
            program_start=program_start, main_entry=program_start
        )
    args = parse_and_validate_args(
        extra_args_provider=lambda parser: compat.repair_help(_add_arguments(parser)),
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
    check_supported(args)
    check_transformer_engine(args)
    config = emo_config_from_args(args)
    preflight.check_before_start(args, config)
    megatron_training.print_rank_0(_summary(config))
    for part in (recording, signals, finite):
        part.install(args)
    checkpointing.prepare(args)

    owns_process_group = not torch.distributed.is_initialized()
    # After our own parse: it parses again, with Megatron's flags alone, and would answer --help.
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(megatron_training.pretrain)
    model_config = model_config_from_args(args)
    pretrain(
        argument_utils.pretrain_cfg_container_from_args(args, model_config),
        steps.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        partial(steps.forward_step, state=state.LossState(config)),
        store=store,
        get_embedding_ranks=steps.get_embedding_ranks,
    )
    writer = megatron_training.get_tensorboard_writer()
    if writer:
        writer.flush()  # the last validation comes after the loop's own flush
    if owns_process_group:
        # Threads of groups still alive at interpreter exit can abort a finished run.
        torch.distributed.destroy_process_group()


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_emo.training import checkpointing, recording, signals

    add_model_arguments(add_emo_arguments(parser))
    for part in (checkpointing, recording, signals):
        part.add_arguments(parser)
    return parser


def _summary(config: EmoConfig) -> str:
    objective = config.build_objective()
    settings = ", ".join(f"{key}={value}" for key, value in objective.settings.items())
    lines = [f"> objective {objective.name}" + (f" ({settings})" if settings else "")]
    if config.cost_embedding is not None:
        role = "" if objective.uses_cost else ", for the log only"
        lines.append(f"> cost embedding {config.cost_embedding.source}{role}")
    schedule = config.schedule
    if schedule.start_iter or schedule.ramp_iters:
        lines.append(
            f"> MLE for {schedule.start_iter} iterations, then the objective's share grows to 1 "
            f"over {schedule.ramp_iters}"
        )
    return "\n".join(lines)
