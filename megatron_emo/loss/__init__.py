"""Losses from logits shards."""
