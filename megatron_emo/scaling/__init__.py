"""Scaling studies: tables of runs in, laws with intervals out. No Megatron at the top here."""
