"""Scaling studies: from a budget to runs, from runs to a law, and of two objectives which pays.

python tools/scaling_study.py plan --plan examples/scaling/plan_isoflop.yaml --device h100
python tools/scaling_study.py compare --csv runs.csv \\
    --columns objective=objective,params=N,tokens=D,loss=loss,seed=seed
python tools/scaling_study.py fit --csv runs.csv --columns params=N,tokens=D,loss=val_loss \\
    --approach 3 --bootstrap 500 --json law.json
python tools/scaling_study.py pictures --csv study/runs.csv --output study/pictures
"""

from __future__ import annotations

from megatron_emo.scaling.command import build_parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser(__doc__).parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"scaling_study {args.task}: {error}") from error


if __name__ == "__main__":
    main()
