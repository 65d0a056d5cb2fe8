"""`main` and `pretrain_gpt`: everything between a command line and Megatron's `pretrain()`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from typing import NoReturn

import torch

from megatron_emo.launch.exit_codes import CheckpointError, ConfigError, run_and_exit
from megatron_emo.launch.verdict import all_or_none, exchange_of_run, roll_call
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


def main(program_start: float | None = None) -> NoReturn:
    """Pretrain as `pretrain_gpt` and end the process with a code of `launch/exit_codes.py`."""
    run_and_exit(
        partial(pretrain_gpt, program_start=program_start),
        find_lost=roll_call,
        on_fault=_record_fault,
        on_end=_record_end,
    )


def pretrain_gpt(argv: list[str] | None = None, program_start: float | None = None) -> None:
    """Pretrain a GPT model on Megatron's loop with the objective the flags name.

    Args:
        argv: arguments without the program's name; by default those of the process.
        program_start: time.time() before the imports, for Megatron's start-up report.

    Raises:
        VerdictError: on every rank, a ValueError: flags that do not fit together, ranks that do
            not agree, files that do not fit the run.
        CheckpointError: a checkpoint that Megatron could not read.
        SystemExit: with code 0 where Megatron ends a run early, or prints --help.
    """
    args, config = _parse_alike(argv)
    # Only now: these imports need CUDA or the stand-ins that `parse` put in its place.
    import megatron.training as megatron_training
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, inprocess_restart

    from megatron_emo.training import (
        checkpointing,
        finite,
        loss_time,
        preflight,
        recording,
        result,
        signals,
        state,
        steps,
    )

    if program_start is not None:
        megatron_training.set_startup_timestamps(
            program_start=program_start, main_entry=program_start
        )
    timeout_s = 60.0 * args.distributed_timeout_minutes
    exchange = exchange_of_run(timeout_s)
    preflight.check_before_start(args, config, exchange)
    megatron_training.print_rank_0(_summary(config))
    for part in (recording, signals, finite, result, loss_time):
        part.install(args)
    checkpointing.prepare(args)
    preflight.check_resume(args, exchange)

    owns_process_group = not torch.distributed.is_initialized()
    # After our own parse: it parses again, with Megatron's flags alone, and would answer --help.
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(megatron_training.pretrain)
    model_config = model_config_from_args(args)
    with (
        _bare_exits_are_errors(args),
        preflight.after_groups(lambda: preflight.check_network(exchange, timeout_s)),
    ):
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
    result.write_at_end(args)
    if owns_process_group:
        # Threads of groups still alive at interpreter exit can abort a finished run.
        torch.distributed.destroy_process_group()


def check_only(argv: list[str], timeout_s: float) -> list[str]:
    """Make every check that `pretrain_gpt` makes before it builds a model, and no run.

    Initialises Megatron, and returns in words what was found, on every rank.

    Args:
        timeout_s: for which ranks wait for each other, and for the all-reduces of a group.

    Raises:
        VerdictError: on every rank, as `pretrain_gpt`.
    """
    exchange_of_run(timeout_s)
    args, config = _parse_alike(argv)
    import megatron.training.training as training_loop

    from megatron_emo.training import preflight, steps

    exchange = exchange_of_run()
    summary = preflight.check_before_start(args, config, exchange)
    preflight.check_resume(args, exchange)
    # Under the name that `pretrain` calls, behind which the stand-in without CUDA lies.
    training_loop.initialize_megatron(get_embedding_ranks=steps.get_embedding_ranks)
    report = preflight.check_network(exchange, timeout_s)
    return [summary, *(report.lines if report is not None else ["one process: no network"])]


def _parse_alike(argv: list[str] | None) -> tuple[argparse.Namespace, EmoConfig]:
    return all_or_none(lambda: parse(argv), "arguments", exchange=exchange_of_run())


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, EmoConfig]:
    """Return the checked arguments, which become Megatron's, and the loss they describe.

    Leaves the flags in sys.argv, where Megatron looks for them. No collective.

    Raises:
        ValueError: flags that do not fit together, Megatron's own assertions among them.
        SystemExit: after --help, with code 0.
    """
    argv = with_checkpoint_arguments(list(sys.argv[1:] if argv is None else argv))
    sys.argv[1:] = cpu.enable(argv)
    from megatron.training.arguments import parse_and_validate_args

    compat.apply_repairs()
    try:
        args = parse_and_validate_args(
            extra_args_provider=lambda parser: compat.repair_help(_add_arguments(parser)),
            args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        )
    except AssertionError as error:
        raise ConfigError(_assertion_in_words(error)) from error
    except SystemExit as error:
        if error.code == 0:
            raise
        raise ConfigError(f"flags that Megatron refuses ({_place(error)}); see above") from error
    except (ImportError, OSError, RuntimeError) as error:  # a tokenizer, a folder, a package
        raise ConfigError(f"{type(error).__name__}: {error} ({_place(error)})") from error
    check_supported(args)
    check_transformer_engine(args)
    return args, emo_config_from_args(args)


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_emo.training import (
        checkpointing,
        loss_time,
        preflight,
        recording,
        result,
        signals,
    )

    add_model_arguments(add_emo_arguments(parser))
    for part in (preflight, checkpointing, recording, signals, result, loss_time):
        part.add_arguments(parser)
    parser.error = _refuse
    return parser


def _refuse(message: str) -> NoReturn:
    """In the place of argparse's own: a thousand lines of usage, and code 2."""
    raise ConfigError(f"{message}; --help lists all flags")


def _assertion_in_words(error: AssertionError) -> str:
    """Megatron checks its arguments by assertions, some of them without a word."""
    return f"{str(error) or 'an assertion of Megatron failed'} ({_place(error)})"


def _place(error: BaseException) -> str:
    """The file, line and source line an error comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = "/".join(last.filename.split("/")[-3:])
    return f"{file}:{last.lineno}: {last.line}"


@contextlib.contextmanager
def _bare_exits_are_errors(args: argparse.Namespace) -> Iterator[None]:
    """Raise CheckpointError in the place of a sys.exit() without a code.

    megatron/training/checkpointing.py leaves so where it cannot read a checkpoint, 0.19.2; after a
    conversion between formats, which --ckpt-convert-format asks for, it is done.
    """
    try:
        yield
    except SystemExit as error:
        if error.code is not None or args.ckpt_convert_format is not None:
            raise
        raise CheckpointError(
            f"--load {args.load}: Megatron could not read the checkpoint, and says why above "
            f"({_place(error)})"
        ) from error


def _record_fault(error: BaseException) -> None:
    recording = sys.modules.get("megatron_emo.training.recording")
    if recording is not None:
        recording.fault(error)


def _record_end(code: int) -> None:
    recording = sys.modules.get("megatron_emo.training.recording")
    if recording is not None:
        recording.end(code)


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
