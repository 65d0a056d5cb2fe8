"""The story that a Megatron checkpoint tells, the most probable token each time, in its own dtype.

python examples/stories260k/generate_megatron.py --megatron runs/stories260k/megatron \
    --prompt "Lily and Tom" --output story.txt

tools/generate.py turns a checkpoint into a transformers model first. Here it is Megatron's GPTModel
that is asked, with the whole text again for every token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_emo.conversion import megatron_model
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir


def generate(checkpoint: Path, prompt: str, max_new_tokens: int) -> str:
    """Return the prompt and its continuation from what `convert_checkpoint.py import` wrote.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint; a text longer than the model's context.
    """
    from transformers import AutoTokenizer, GenerationConfig

    folder, beside = resolve_checkpoint_dir(checkpoint), checkpoint / "tokenizer"
    args = read_arguments(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        beside, local_files_only=True, trust_remote_code=False
    )
    end = GenerationConfig.from_pretrained(beside, local_files_only=True).eos_token_id
    ids = tokenizer(prompt)["input_ids"]
    room = args.max_position_embeddings - len(ids)
    if not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: expected 1 to {room}, the context of "
            f"{args.max_position_embeddings} less {len(ids)} tokens of --prompt"
        )
    with megatron_model.one_process():
        model = megatron_model.build_model(args, len(tokenizer))
        megatron_model.load_checkpoint(model, folder)
        for _ in range(max_new_tokens):
            logits = megatron_model.model_logits(model, torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == end:
                break
    return tokenizer.decode(ids, skip_special_tokens=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megatron", metavar="DIR", required=True, help="what convert_checkpoint.py import wrote"
    )
    parser.add_argument("--prompt", default="", help="text to go on from; default none")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=256, help="default %(default)s"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="for the text alone, as Megatron prints too; default none"
    )
    args = parser.parse_args(argv)
    try:
        text = generate(Path(args.megatron), args.prompt, args.max_new_tokens)
        if args.output is not None:
            Path(args.output).write_text(f"{text}\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"generate_megatron: {error}") from error
    print(text)


if __name__ == "__main__":
    main()
