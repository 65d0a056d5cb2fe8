"""From text to what Megatron reads: demo corpus, tokenizer, .bin/.idx files and their check."""
