"""Look at what a pretraining run would start on, without starting it.

    torchrun --nproc-per-node 8 tools/doctor.py [--timeout-s S] [the flags of pretrain_gpt_emo.py]

Prints versions, environment, hosts and devices, times an all-reduce in every group of ranks, and
ends with 0, or with 78 and the reason why the run would not start. Without pretraining flags only
versions, environment and network are looked at; without torchrun, one process.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from megatron_emo.launch.doctor import diagnose
from megatron_emo.launch.exit_codes import run_and_exit

DEFAULT_TIMEOUT_S = 60.0


def main(argv: list[str] | None = None) -> int:
    """Print the report and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds for which ranks wait for each other, and for a group's all-reduces. "
        "Default: %(default)g",
    )
    own, flags = parser.parse_known_args(argv)
    if not flags:
        return diagnose(own.timeout_s)
    from megatron_emo.training.run import check_only

    return diagnose(own.timeout_s, partial(check_only, flags, own.timeout_s))


def _main_and_exit() -> None:
    code = main()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_and_exit(_main_and_exit)
