"""Check a .bin/.idx pair: sizes, pointers, and that its tokens fit the vocabulary.

python tools/check_data.py --data-path runs/demo/data_text_document --vocab-size 2048
"""

from __future__ import annotations

import argparse

from megatron_emo.data.check import check_indexed_dataset


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data-path",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="paths of the pairs, without .bin or .idx",
    )
    add("--vocab-size", required=True, type=int, metavar="N", help="the tokenizer's size in tokens")
    args = parser.parse_args(argv)
    for prefix in args.data_path:
        try:
            found = check_indexed_dataset(prefix, args.vocab_size, max_tokens_checked=None)
        except (ValueError, OSError) as error:
            raise SystemExit(f"check_data: {error}") from error
        print(
            f"{prefix}: {found.num_documents} documents, {found.num_tokens} tokens of "
            f"{found.dtype}, largest id {found.max_token}"
        )


if __name__ == "__main__":
    main()
