"""Fixtures for runs through Megatron's real pretrain()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_pool import pool_of
from pretraining import DATA, MODEL, TRAINING, VOCAB_SIZE, pretrain, read_scalars

from megatron_emo.cost_embedding import write_cost_embedding
from megatron_emo.data.files import IndexedDatasetWriter

_MAX_THREADS = 250


@pytest.fixture(scope="package", autouse=True)
def _end_ranks_after_this_folder(_pools) -> Iterator[None]:
    """gloo frees the threads of destroyed groups in part only: runs leave hundreds awake."""
    yield
    for pool in _pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def _renew_ranks_with_many_threads(_pools) -> Iterator[None]:
    """A run leaves some twenty threads; hundreds of them slow every later one."""
    yield
    for pool in _pools.values():
        if pool.num_threads() > _MAX_THREADS:
            pool.close()


@pytest.fixture(scope="session")
def cost_embedding(tmp_path_factory) -> Path:
    """A table with neighbours: random clusters, so that costs spread over (0, 2)."""
    generator = torch.Generator().manual_seed(11)
    centres = torch.randn(12, 10, generator=generator)
    table = centres[torch.randint(0, 12, (VOCAB_SIZE,), generator=generator)]
    table = table + 0.5 * torch.randn(VOCAB_SIZE, 10, generator=generator)
    path = tmp_path_factory.mktemp("table") / "cost_embedding.safetensors"
    write_cost_embedding(path, table, source="test", tokenizer_fingerprint="")
    return path


@pytest.fixture(scope="session")
def initial_checkpoint(_pools, tmp_path_factory) -> Path:
    """Weights that every layout can start from: Megatron's initial ones depend on the layout."""
    folder = tmp_path_factory.mktemp("initial")
    argv = [*MODEL, *TRAINING, *DATA, "--train-iters", "1", "--eval-iters", "0", "--lr", "0"]
    argv += ["--min-lr", "0", "--save", str(folder), "--save-interval", "1", "--no-save-optim"]
    argv += ["--objective", "mle", "--tensorboard-dir", str(folder)]
    pool_of(_pools, 1).run(pretrain, argv=argv)
    return folder


@pytest.fixture
def from_checkpoint(initial_checkpoint) -> list[str]:
    """Flags that start a new run from `initial_checkpoint`."""
    return ["--load", str(initial_checkpoint), "--finetune", "--no-load-rng", "--no-load-optim"]


@pytest.fixture
def run_pretraining(run_distributed, tmp_path, cost_embedding) -> Callable:
    """Return run(world_size, *flags) -> scalars by name and iteration of one run.

    With error=PATTERN the run must end in a ValueError that matches it, on every rank.
    """
    count = 0

    def run(
        world_size: int,
        *flags: str,
        objective: str = "emo1",
        cost: str | None = str(cost_embedding),
        base: list[str] | None = None,
        use_megatron_loss: bool = False,
        error: str | None = None,
    ) -> dict[str, dict[int, float]]:
        nonlocal count
        count += 1
        logs = tmp_path / f"tensorboard_{count}"
        logs.mkdir()
        argv = [*(MODEL + TRAINING + DATA if base is None else base), *flags]
        argv += ["--tensorboard-dir", str(logs)]
        if not use_megatron_loss:
            argv += ["--objective", objective]
            argv += ["--emo-cost-embedding", cost] if cost else []
        run_distributed(world_size)(
            pretrain, argv=argv, use_megatron_loss=use_megatron_loss, error=error
        )
        return read_scalars(logs)

    return run


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory) -> str:
    """Prefix of an indexed data set whose documents are shorter than a sequence, eod last."""
    generator = np.random.default_rng(5)
    prefix = str(tmp_path_factory.mktemp("data") / "short_document")
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for length in generator.integers(4, 17, size=400):
        # A walk: the next token is near the last one, so that there is something to learn.
        walk = np.cumsum(generator.integers(-2, 3, size=length)) % (VOCAB_SIZE - 1)
        writer.add_document(np.append(walk, VOCAB_SIZE - 1).astype(np.uint16))
    writer.finish()
    writer.publish()
    return prefix
