"""Compare the time, memory and exactness of the output layer under several losses, in one run.

OMP_NUM_THREADS=2 python tools/benchmark_loss.py --text corpus.txt --tokenizer tokenizer.json
python tools/benchmark_loss.py --sweep-tokens 512 1024 2048 --variants emo1-fused-recompute
python tools/benchmark_loss.py --steps 12 --objectives mle emo1 -- [flags of pretrain_gpt_emo.py]
"""

from __future__ import annotations

import argparse
import sys

from megatron_emo.benchmark import command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    # Behind -- stand the flags of another program.
    end = argv.index("--") if "--" in argv else len(argv)
    args = build_parser().parse_args(argv[:end])
    try:
        print(command.run(args, tuple(argv[end + 1 :]), lambda line: print(line, file=sys.stderr)))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"benchmark_loss: {error}") from error


if __name__ == "__main__":
    main()
