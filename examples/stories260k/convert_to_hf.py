"""llama2.c's model.bin and tokenizer.bin into a Hugging Face folder.

python examples/stories260k/convert_to_hf.py --checkpoint stories260K.bin --tokenizer tok512.bin \
    --output runs/stories260k/hf
"""

from __future__ import annotations

import argparse

from megatron_emo.conversion.llama2c import convert_llama2c


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", required=True, help="llama2.c's .bin, version 0, fp32"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", required=True, help="llama2.c's tokenizer .bin"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    args = parser.parse_args(argv)
    try:
        convert_llama2c(args.checkpoint, args.tokenizer, args.output, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_to_hf: {error}") from error
    print(f"{args.output}: transformers.AutoModelForCausalLM.from_pretrained({args.output!r})")


if __name__ == "__main__":
    main()
