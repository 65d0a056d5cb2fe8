"""Scaling studies: from a budget to runs, from runs to a law, and of two objectives which pays.

python tools/scaling_study.py plan --plan study.yaml --device h100
python tools/scaling_study.py run --plan study.yaml --output study --jobs 2
python tools/scaling_study.py score --output study
python tools/scaling_study.py fit --csv study/runs.csv --where label=mle \\
    --columns params=params,tokens=tokens,loss=loss --approach 3 --bootstrap 500 --json law.json
python tools/scaling_study.py compare --csv study/runs.csv \\
    --columns objective=label,params=params,tokens=tokens,loss=loss,seed=seed
python tools/scaling_study.py pictures --csv study/runs.csv --output study/pictures
python tools/scaling_study.py throughput --plan layouts.yaml --output speed
python tools/scaling_study.py estimate --plan layouts.yaml --device h100 --gpus 1024
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
