"""Threads as ranks that exchange through one store of this process: for tests without a network."""

from __future__ import annotations

import threading

import torch.distributed as dist

from megatron_emo.launch.verdict import StoreExchange


def on_ranks(world_size, body, absent=(), timeout_s=20.0, store=None, prefix=""):
    """Return body(rank, exchange) of every rank, or the exception it raised."""
    store = dist.HashStore() if store is None else store
    results = {}

    def run(rank):
        exchange = StoreExchange(store, rank, world_size, timeout_s=timeout_s, prefix=prefix)
        try:
            results[rank] = body(rank, exchange)
        except Exception as error:
            results[rank] = error

    present = [rank for rank in range(world_size) if rank not in absent]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in present]
