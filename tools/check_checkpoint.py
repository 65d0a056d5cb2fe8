"""Check that a checkpoint, or the checkpoints of a run's folder, are whole: files against their
manifest by size and SHA-256.

python tools/check_checkpoint.py verify runs/demo/checkpoints

Ends with 0 if the checkpoint, or the latest of the run's, is whole, and with 74 if not.
"""

from __future__ import annotations

import argparse

from megatron_emo.checkpoints.command import verify
from megatron_emo.launch.exit_codes import ExitCode


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="say what is whole, and of the rest what is wrong")
    command.add_argument(
        "folder", metavar="DIR", help="a run's --save folder, or one iteration's in it"
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="compare names and sizes alone, and read no shard; otherwise about a GB a second",
    )
    args = parser.parse_args(argv)
    raise SystemExit(0 if verify(args.folder, not args.quick) else int(ExitCode.IO))


if __name__ == "__main__":
    main()
