"""Write a small English corpus from the Python standard library, without any download.

python tools/make_demo_corpus.py --output runs/demo/corpus.jsonl
"""

from __future__ import annotations

import argparse

from megatron_emo.data.demo_corpus import write_demo_corpus


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help='JSON lines file to write, {"text": ...} per line (about 2 MB); replaced if it exists',
    )
    args = parser.parse_args(argv)
    try:
        summary = write_demo_corpus(args.output)
    except OSError as error:
        raise SystemExit(f"make_demo_corpus: {error}") from error
    print(
        f"{summary.path}: {summary.num_documents} documents, "
        f"{summary.num_text_bytes / 1e6:.2f} MB of text, "
        f"{summary.num_duplicates} duplicates left out"
    )


if __name__ == "__main__":
    main()
