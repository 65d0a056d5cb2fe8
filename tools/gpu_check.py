"""Check on a CUDA device what the test suite cannot on a CPU; exits with 1 where a check failed.

python tools/gpu_check.py --json runs/gpu_check.json
"""

from __future__ import annotations

import argparse
import sys

from megatron_emo.gpu_check.record import Settings
from megatron_emo.gpu_check.report import describe_run, format_markdown, write_json
from megatron_emo.gpu_check.run import CHECKS, describe_check, has_failed, run_checks


def build_parser() -> argparse.ArgumentParser:
    default = Settings.device
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    add("--small", action="store_true", help="sizes for seconds; no bounds on speed and memory")
    add("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(CHECKS)}")
    add("--list", action="store_true", help="say what the checks are, and end")
    add("--json", metavar="FILE", help="write all figures here")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.list:
        for name in CHECKS:
            print(f"{name:16} {describe_check(name)}")
        return 0
    try:
        settings = Settings(args.device, args.small)
        results = run_checks(settings, args.only, lambda line: print(line, file=sys.stderr))
        run = describe_run(settings)
        print(format_markdown(run, results))
        if args.json:
            write_json(args.json, run, results)
    except (ValueError, OSError) as error:
        raise SystemExit(f"gpu_check: {error}") from error
    return 1 if has_failed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
