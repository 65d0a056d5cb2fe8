"""Pictures of a study, each with the CSV of what it shows, and what `report.py --study` reads.

python tools/scaling_study.py pictures --csv study/runs.csv --output study/pictures
python tools/report.py --study study --html study/report.html

Drawn are IsoFLOP curves, best sizes and tokens, the frontier with a budget left out, residuals,
and, of two objectives, their frontiers, paired differences of loss and effective speedups;
with --throughput, throughput and efficiency against GPUs. What the runs do not suffice for is
refused by name, and the others are drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_emo.scaling.comparison.pairs import ROLES
from megatron_emo.scaling.pictures.album import format_album, make_album, write_album
from megatron_emo.scaling.pictures.drawing import FORMATS
from megatron_emo.scaling.pictures.study import (
    DEFAULT_COLUMNS,
    PictureSettings,
    Study,
    read_study,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = parser.add_argument, PictureSettings()
    add("--csv", metavar="FILE", help="a row for each finished run")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the pictures")
    names = ", ".join(f"{role}={'|'.join(names)}" for role, names in DEFAULT_COLUMNS)
    add(
        "--columns",
        metavar="ROLE=NAME,...",
        help=f"as of compare or, without objective=, of fit (default: of runs.csv, {names}). "
        + "; ".join(f"{role}: {meaning}" for role, meaning in ROLES.items()),
    )
    add("--baseline", default=default.baseline, help="objective (default: %(default)s)")
    add(
        "--approach",
        choices=("3", "vpnls"),
        default=default.approach,
        help="by which surfaces are fitted (default: %(default)s)",
    )
    add(
        "--bootstrap",
        type=int,
        default=default.draws,
        metavar="N",
        help="draws of each interval, at least 20 (default: %(default)s)",
    )
    add("--level", type=float, default=default.level, help="of intervals (default: %(default)s)")
    add("--seed", type=int, default=default.seed, help="of draws (default: %(default)s)")
    add(
        "--reach",
        type=float,
        default=default.reach,
        metavar="R",
        help="draw frontiers to R times the largest C (default: %(default)g)",
    )
    add(
        "--throughput",
        metavar="JSON",
        help="rows of a throughput study: label, objective, gpus, tokens_per_s_per_gpu, efficiency",
    )
    add("--format", choices=FORMATS, default="png", help="of pictures (default: %(default)s)")


def run(args: argparse.Namespace) -> list[Path]:
    """Draw, write, print and return the paths.

    Raises:
        ValueError: flags out of range, tables that cannot be read, or no picture at all.
        FileNotFoundError: no such file.
    """
    settings = PictureSettings(
        **{"baseline": args.baseline, "approach": args.approach, "draws": args.bootstrap},
        **{"level": args.level, "seed": args.seed, "reach": args.reach},
    )
    if not (args.csv or args.throughput):
        raise ValueError("--csv: expected a file, or --throughput, got neither")
    study = read_study(args.csv, args.columns, settings, _say) if args.csv else None
    if study is not None:
        _check_baseline(study)
    album = make_album(study, args.throughput, _say)
    if not album.pictures:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in album.refused)
        raise ValueError(f"no picture can be drawn:\n{reasons}")
    paths = write_album(album, args.output, study, args.format, args.throughput)
    print("\n".join(format_album(paths, album, study.notes if study else ())))
    return paths


def _check_baseline(study: Study) -> None:
    known = list(study.tables)
    if len(known) > 1 and study.settings.baseline not in known:
        raise ValueError(
            f"--baseline: expected one of {', '.join(known)}, got {study.settings.baseline!r}"
        )


def _say(what: str) -> None:
    print(f"pictures: {what}", file=sys.stderr, flush=True)
