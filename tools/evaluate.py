"""Measure models and texts: Hugging Face folders and text files in, JSON records out.

python tools/evaluate.py perplexity --model smollm2-emo/ --texts wiki.jsonl --json ppl.json
python tools/evaluate.py text --texts samples.jsonl --metrics diversity,rep --json text.json
python tools/evaluate.py mauve --p human.jsonl --q samples.jsonl --featurizer smollm2/
python tools/evaluate.py icl --model smollm2-emo/ --task sst2 --json sst2.json
"""

from __future__ import annotations

from megatron_emo.evaluation.command import build_parser, run_command


def main(argv: list[str] | None = None) -> None:
    args = build_parser(__doc__).parse_args(argv)
    try:
        run_command(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"evaluate {args.task}: {error}") from error


if __name__ == "__main__":
    main()
