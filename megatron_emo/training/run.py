"""`pretrain_gpt`: everything between a command line and Megatron's `pretrain()`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from megatron_emo.config import OUTPUT_LAYER
from megatron_emo.torch_dist import TRACKER, read_arguments, resolve_checkpoint_dir
from megatron_emo.training import compat, cpu
from megatron_emo.training.arguments import (
    EmoConfig,
    add_emo_arguments,
    check_supported,
    emo_config_from_args,
)

_SCHEDULE_AND_OBJECTIVE = (
    "objective emo_start_iter emo_ramp_iters emo_weight_max emo_half emo_detach_target "
    "emo_ratio_eps emo_scale emo_eta emo_gamma emo_weight_min emo_mixing_ratio"
).split()


def pretrain_gpt(argv: list[str] | None = None, program_start: float | None = None) -> None:
    """Pretrain a GPT model on Megatron's loop with the objective the flags name.

    Args:
        argv: arguments without the program's name; by default those of the process.
        program_start: time.time() before the imports, for Megatron's start-up report.

    Raises:
        ValueError: flags that do not fit together, or a table that does not fit the run.
    """
    sys.argv[1:] = cpu.enable(list(sys.argv[1:] if argv is None else argv))
    # Only now: these imports need CUDA or the stand-ins that `enable` put in its place.
    import megatron.training as megatron_training
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, inprocess_restart
    from megatron.training.arguments import parse_and_validate_args

    from megatron_emo.training import state, steps

    compat.skip_compile_helpers()
    if program_start is not None:
        megatron_training.set_startup_timestamps(
            program_start=program_start, main_entry=program_start
        )
    args = parse_and_validate_args(
        extra_args_provider=add_emo_arguments,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
    check_supported(args)
    config = emo_config_from_args(args)
    args.emo_cost_embedding_id = _cost_embedding_id(
        config, state.check_cost_embedding_before_start(config)
    )
    check_resume(args)
    megatron_training.print_rank_0(_summary(config))

    # After our own parse: it parses again, with Megatron's flags alone, and would answer --help.
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(megatron_training.pretrain)
    model_config = argument_utils.gpt_config_from_args(args)
    pretrain(
        argument_utils.pretrain_cfg_container_from_args(args, model_config),
        steps.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        partial(steps.forward_step, state=state.LossState(config)),
        store=store,
        get_embedding_ranks=steps.get_embedding_ranks,
    )


def _cost_embedding_id(config: EmoConfig, sha256: str) -> str:
    """Return what a checkpoint remembers: the table's sha256, output-layer, or "" if it trains
    nothing."""
    if config.cost_embedding is None or not config.build_objective().uses_cost:
        return ""
    return sha256 or OUTPUT_LAYER


def check_resume(args: argparse.Namespace) -> None:
    """Compare this run's loss with the one its checkpoint was trained with.

    Raises:
        ValueError: another cost embedding; names both. --finetune, a new run from old weights, may
            differ.
    """
    if args.load is None or args.finetune or not Path(args.load, TRACKER).is_file():
        return
    if Path(args.load, TRACKER).read_text().strip() == "release":
        return
    folder = resolve_checkpoint_dir(args.load, args.ckpt_step)
    saved = read_arguments(folder)
    then = getattr(saved, "emo_cost_embedding_id", "") if saved is not None else ""
    now = args.emo_cost_embedding_id
    if then and now and then != now:
        raise ValueError(
            f"--emo-cost-embedding {args.emo_cost_embedding or OUTPUT_LAYER} has id {now}, "
            f"the checkpoint {folder} was trained with "
            f"{saved.emo_cost_embedding or OUTPUT_LAYER}, id {then}; resume with that table, or "
            "add --finetune to start a new run from these weights"
        )
    changed = [
        f"--{name.replace('_', '-')} {getattr(saved, name)} -> {getattr(args, name)}"
        for name in _SCHEDULE_AND_OBJECTIVE
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name)
    ]
    if changed and args.rank == 0:
        print(f"> resuming {folder} with other loss settings: {', '.join(changed)}", flush=True)


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
