"""Compare the time, memory and exactness of the output layer under several losses, in one run.

OMP_NUM_THREADS=2 python tools/benchmark_loss.py --text corpus.txt --tokenizer tokenizer.json
"""

from __future__ import annotations

import argparse
import sys

from megatron_emo.benchmark.measure import DTYPES, BenchmarkConfig, run_benchmark
from megatron_emo.benchmark.report import (
    describe_run,
    format_report,
    load_average,
    write_json,
    write_png,
)
from megatron_emo.benchmark.tokens import load_target
from megatron_emo.benchmark.variants import VARIANTS


def build_parser() -> argparse.ArgumentParser:
    default = BenchmarkConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name in ("num_tokens", "vocab_size", "hidden_size", "cost_dim", "rounds", "warmup", "seed"):
        flag, value = "--" + name.replace("_", "-"), getattr(default, name)
        add(flag, type=int, default=value, metavar="N", help="default: %(default)s")
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
    add("--tokens", metavar="FILE", help="target ids: a .npy file, or a .bin/.idx prefix")
    add("--text", metavar="FILE", help="target ids from a text, with --tokenizer")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json")
    add("--json", metavar="FILE", help="write all figures here")
    add("--png", metavar="FILE", help="draw time and memory here")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = vars(build_parser().parse_args(argv))
    files = {name: args.pop(name) for name in ("tokens", "text", "tokenizer")}
    json_path, png_path = args.pop("json"), args.pop("png")
    try:
        config = BenchmarkConfig(**args | {"variants": tuple(args["variants"])})
        target = load_target(config.num_tokens, config.vocab_size, config.seed, **files)
        load_before = load_average()
        results = run_benchmark(config, target.ids, lambda line: print(line, file=sys.stderr))
        run = describe_run(config, target, load_before)
        print(format_report(run, results))
        if json_path:
            write_json(json_path, run, results)
        if png_path:
            write_png(png_path, run, results)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"benchmark_loss: {error}") from error


if __name__ == "__main__":
    main()
