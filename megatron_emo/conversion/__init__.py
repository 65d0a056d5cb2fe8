"""Hugging Face folders to and from Megatron's torch_dist checkpoints.

Nothing here is imported with the package; the modules below say what they need.
"""
