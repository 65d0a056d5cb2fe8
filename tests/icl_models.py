"""Tiny random models with a tokenizer that splits words, for prompts of a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_models import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_TEXTS = ["It is about world. sports. good. bad. Review: the film is so good and so bad it is"] * 3


def save_with_tokenizer(name: str, folder: Path, positions: int = 256, **changes: Any) -> Path:
    """Write the model of hf_models.CONFIGS[name], and a byte-level BPE of 300 tokens, to folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    length = "n_positions" if name.startswith("gpt2") else "max_position_embeddings"
    save_model(name, folder, vocab_size=len(fast), **{length: positions}, **changes)
    fast.save_pretrained(folder)
    return folder
