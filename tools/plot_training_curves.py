"""Draw the curves of training runs side by side and print where each began and ended.

    python tools/plot_training_curves.py --run MLE=runs/mle/tensorboard \\
        --run EMO-1=runs/emo/tensorboard --output runs/curves.png
"""

from __future__ import annotations

import argparse

from megatron_emo.training_curves import (
    DEFAULT_SCALARS,
    plot_training_curves,
    read_scalars,
    summarize,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a run's name and its --tensorboard-dir; repeat for more runs",
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="image to write")
    parser.add_argument(
        "--scalars",
        nargs="+",
        default=list(DEFAULT_SCALARS),
        metavar="KEY",
        help="logged keys, one panel each, with their 'KEY validation' and 'KEY max' where logged "
        f"(default: {', '.join(DEFAULT_SCALARS)})",
    )
    parser.add_argument("--title", default="", help="a line above the panels")
    return parser


def parse_runs(words: list[str]) -> dict[str, str]:
    """Return name -> directory."""
    runs: dict[str, str] = {}
    for word in words:
        name, equals, directory = word.partition("=")
        if not (name and equals and directory) or name in runs:
            raise ValueError(f"--run: expected NAME=DIR with a name of its own, got {word!r}")
        runs[name] = directory
    return runs


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        runs = {name: read_scalars(folder) for name, folder in parse_runs(args.run).items()}
        plot_training_curves(runs, args.output, scalars=args.scalars, title=args.title)
        summary = summarize(runs, args.scalars)
    except (ValueError, OSError) as error:
        raise SystemExit(f"plot_training_curves: {error}") from error
    print(summary)
    print(f"curves: {args.output}")


if __name__ == "__main__":
    main()
