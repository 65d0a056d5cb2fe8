"""A pretrained model, 25,000 sentences of EMO or as many of MLE: which does better on the tasks?

python examples/calibration/run.py --output runs/calibration --text wiki.train.tokens
python examples/calibration/run.py --output runs/calibration --sentences 8000 --limit 100

Goes on where it was stopped; --dry-run shows what is done. README.md says what you should see.
"""

from __future__ import annotations

from megatron_emo.study.calibration.command import build_parser, run_study
from megatron_emo.study.tasks import TaskError


def main(argv: list[str] | None = None) -> None:
    args = build_parser(__doc__).parse_args(argv)
    try:
        table = run_study(args)
    except (ValueError, OSError, TaskError) as error:
        raise SystemExit(f"calibration: {error}") from error
    if table:
        print(table)


if __name__ == "__main__":
    main()
