"""GPT pretraining on Megatron's own loop; the only package here that imports megatron.training."""
