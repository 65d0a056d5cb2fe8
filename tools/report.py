"""Lay out measurement records as tables, pictures and one page, and check documents on them.

python tools/report.py --records results/ --html report.html --markdown report.md --png pictures/
python tools/report.py --records results/ --rows objective --columns domain,metric --metric mauve
python tools/report.py --check docs/results.md
python tools/report.py --study study/ --html study/report.html

Records are what tools/evaluate.py --json writes. Those that differ in their seed alone are shown as
mean ± standard deviation. What --check reads is said in megatron_emo/report/trace.py. A study is a
folder with what `scaling_study.py pictures` wrote.
"""

from __future__ import annotations

from megatron_emo.report.command import build_parser, run_command


def main(argv: list[str] | None = None) -> None:
    args = build_parser(__doc__).parse_args(argv)
    try:
        lines = run_command(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"report: {error}") from error
    print("\n".join(lines))


if __name__ == "__main__":
    main()
