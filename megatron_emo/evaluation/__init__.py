"""What a model is worth: Hugging Face folders and texts in, typed records out. No Megatron here."""
