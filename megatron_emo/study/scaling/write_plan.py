"""A plan's file with the data of one corpus, so that one plan serves several.

python -m megatron_emo.study.scaling.write_plan --template plan_laptop.yaml --output plan.yaml \\
    --path data/train_text_document --tokenizer model --held-out data/held_out.jsonl \\
    --cost-embedding cost_embedding.safetensors
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_emo.whole_files import write_whole


def add_data(template: str, data: Mapping[str, str]) -> str:
    """Return the plan's text with a section `data:` behind it.

    Raises:
        ValueError: there is one already, or the text is no mapping.
    """
    content = yaml.safe_load(template)
    if not isinstance(content, dict):
        raise ValueError("--template: expected keys and values")
    if "data" in content:
        raise ValueError("--template: expected no section data:, found one")
    return template.rstrip("\n") + "\n" + yaml.safe_dump({"data": dict(data)}, sort_keys=False)


def main(argv: list[str] | None = None) -> None:
    """Write the plan; its paths are relative to it, so that the folder can be moved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--template", type=Path, required=True, metavar="FILE", help="a plan without data:")
    add("--output", type=Path, required=True, metavar="FILE")
    add("--path", type=Path, required=True, metavar="PREFIX", help="of the training tokens")
    add("--tokenizer", type=Path, required=True, metavar="HF_DIR")
    add("--held-out", type=Path, required=True, metavar="FILE")
    add("--cost-embedding", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)

    def relative(path: Path) -> str:
        # The dot says that it is a path: a bare word could be a name that Hugging Face knows.
        return os.path.join(".", os.path.relpath(path, args.output.parent))

    data = {
        "path": relative(args.path),
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": relative(args.tokenizer),
        "held_out": relative(args.held_out),
        "cost_embedding": relative(args.cost_embedding),
    }
    try:
        text = add_data(args.template.read_text(encoding="utf-8"), data)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"write_plan: {args.template}: {error}") from error
    write_whole(args.output, text)


if __name__ == "__main__":
    main()
