"""A scaling study on a laptop: budgets x sizes x {mle, emo1} on two corpora, to laws and pictures.

python examples/scaling/run.py --output runs/scaling --jobs 2
python examples/scaling/run.py --output runs/scaling-stories --jobs 2 --corpora tinystories
python examples/scaling/run.py --output runs/scaling-smoke --jobs 2 --smoke

Goes on where it was stopped; --dry-run shows what is done. README.md says what you should see.
"""

from __future__ import annotations

from megatron_emo.study.scaling.command import build_parser, run_study
from megatron_emo.study.tasks import TaskError


def main(argv: list[str] | None = None) -> None:
    args = build_parser(__doc__).parse_args(argv)
    try:
        pages = run_study(args)
    except (ValueError, OSError, TaskError) as error:
        raise SystemExit(f"scaling: {error}") from error
    if pages:
        print(pages)


if __name__ == "__main__":
    main()
