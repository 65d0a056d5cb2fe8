"""The flags of tools/benchmark_loss.py and what each mode does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from megatron_emo.benchmark import steps, sweep
from megatron_emo.benchmark.config import DTYPES, BenchmarkConfig
from megatron_emo.benchmark.measure import Report, run_benchmark
from megatron_emo.benchmark.report import (
    describe_machine,
    describe_run,
    format_report,
    load_average,
    write_json,
    write_png,
)
from megatron_emo.benchmark.tokens import IDS, Target, load_target
from megatron_emo.benchmark.variants import VARIANTS

_SIZES = ("num_tokens", "vocab_size", "hidden_size", "cost_dim", "warmup", "seed", "workspace_mb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags; their defaults are those of `BenchmarkConfig` and `StepsConfig`."""
    default = BenchmarkConfig()
    add = parser.add_argument
    for name in _SIZES:
        flag, value = "--" + name.replace("_", "-"), getattr(default, name)
        add(flag, type=int, default=value, metavar="N", help="default: %(default)s")
    add("--rounds", type=int, metavar="N", help=f"default: {default.rounds}; with --steps 3")
    add("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default=default.device, help="default: %(default)s")
    add(
        "--variants",
        nargs="+",
        default=list(default.variants),
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}; all for all that can run here; "
        f"default: {' '.join(default.variants)}",
    )
    add("--ids", choices=IDS, default=IDS[0], help="distinct: no target twice; default: real")
    add("--tokens", metavar="FILE", help="target ids: a .npy file, or a .bin/.idx prefix")
    add("--text", metavar="FILE", help="target ids from a text, with --tokenizer")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json")
    add(
        "--tensor-parallel",
        type=int,
        default=default.tensor_parallel,
        metavar="P",
        help="also count collectives and their bytes over P gloo ranks",
    )
    add("--json", metavar="FILE", help="write all figures here")
    add("--png", metavar="FILE", help="draw them here; not with --steps")
    _add_modes(parser)


def _add_modes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("instead of times: peak memory over sizes")
    for name, size in (("tokens", "num-tokens"), ("vocab", "vocab-size")):
        flag, text = f"--sweep-{name}", f"values of --{size}"
        group.add_argument(flag, nargs="+", type=int, default=[], metavar="N", help=text)
    default = steps.StepsConfig()
    group = parser.add_argument_group(
        "instead of the layer alone: whole training steps; flags of pretrain_gpt_emo.py follow "
        "behind --, by default the quickstart's model on mock data"
    )
    add = group.add_argument
    add("--steps", type=int, metavar="N", help="iterations a run, of which 3 are dropped")
    text = "the first is what others are compared with; default: mle emo1"
    add("--objectives", nargs="+", default=list(default.objectives), metavar="NAME", help=text)
    text = "ranks under torch.distributed.run; default: one, without it"
    add("--nproc-per-node", type=int, metavar="N", help=text)


def run(args: argparse.Namespace, flags: tuple[str, ...], report: Report) -> str:
    """Do what the arguments ask for, write the files they name, and return what to print.

    Args:
        flags: those of pretrain_gpt_emo.py, for --steps.

    Raises:
        ValueError, OSError, RuntimeError: naming the flag, or what failed.
    """
    load_before = load_average()
    if args.steps is not None:
        return _run_steps(args, flags, load_before, report)
    if flags:
        raise ValueError(f"{flags[0]}: flags behind -- are for --steps, which was not given")
    names = (*_SIZES, "dtype", "device", "tensor_parallel")
    values = {name: getattr(args, name) for name in names}
    if args.rounds is not None:
        values["rounds"] = args.rounds
    config = BenchmarkConfig(**values, variants=tuple(args.variants))
    load = partial(
        load_target,
        seed=config.seed,
        **{name: getattr(args, name) for name in ("ids", "tokens", "text", "tokenizer")},
    )
    if args.sweep_tokens or args.sweep_vocab:
        return _run_sweep(args, config, load, load_before, report)
    target = load(config.num_tokens, config.vocab_size)
    results = run_benchmark(config, target.ids, report)
    run_info = describe_run(config, target, load_before)
    if args.json:
        write_json(args.json, run_info, results)
    if args.png:
        write_png(args.png, run_info, results)
    return format_report(run_info, results)


def _run_sweep(
    args: argparse.Namespace,
    config: BenchmarkConfig,
    load: Callable[[int, int], Target],
    load_before: list[float],
    report: Report,
) -> str:
    if config.tensor_parallel > 1:
        raise ValueError("--tensor-parallel: counts beside times; expected no --sweep-*")
    sources = set()

    def load_ids(num_tokens: int, vocab_size: int) -> Tensor:
        target = load(num_tokens, vocab_size)
        sources.add(target.source)
        return target.ids

    sweeps = sweep.run_sweep(config, args.sweep_tokens, args.sweep_vocab, load_ids, report)
    run_info = {
        "mode": "peak memory over sizes",
        "config": asdict(config),
        "source": ", ".join(sources),
        **describe_machine(config.device, load_before),
    }
    if args.json:
        write_json(args.json, run_info, sweeps)
    if args.png:
        sweep.write_sweep_png(args.png, run_info, sweeps)
    return sweep.format_sweep(run_info, sweeps)


def _run_steps(
    args: argparse.Namespace, flags: tuple[str, ...], load_before: list[float], report: Report
) -> str:
    if args.png:
        raise ValueError("--png: draws the layer alone; expected no --steps")
    config = steps.StepsConfig(
        args.steps,
        tuple(args.objectives),
        steps.StepsConfig.rounds if args.rounds is None else args.rounds,
        args.nproc_per_node,
        flags,
    )
    results = steps.time_steps(config, report)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run_info = {**steps.describe_steps(config), **describe_machine(device, load_before)}
    if args.json:
        write_json(args.json, run_info, results)
    return steps.format_steps(run_info, results)
