"""A running or dead run at a glance: state, last step, speed, last whole checkpoint, first failure.

    python tools/run_status.py runs/gpt2 [--watch 30]

RUN_DIR is the run's --save folder, its --tensorboard-dir where it had no --save, or the folder of
its event log. Reads files alone. Exit code: 0; 3 if the run failed; 2 if there is no run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

from megatron_emo.launch.status import FAILED, RUNNING, SILENT, read_status
from megatron_emo.launch.status_text import format_status

FAILED_CODE = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's --save folder")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every rank")
    parser.add_argument(
        "--watch",
        type=_seconds,
        metavar="S",
        help="look again every S seconds until the run has ended. Default: look once.",
    )
    args = parser.parse_args(argv)
    while True:
        try:
            status = read_status(args.run_dir)
        except OSError as error:
            print(f"run_status: {error}", file=sys.stderr)
            return 2
        print(json.dumps(status.as_json()) if args.json else format_status(status), flush=True)
        if args.watch is None or status.state not in (RUNNING, SILENT):
            return FAILED_CODE if status.state == FAILED else 0
        time.sleep(args.watch)
        if not args.json:
            print()


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return value


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        sys.exit(main())
