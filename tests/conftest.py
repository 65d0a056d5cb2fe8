"""Fixtures that every tier of the suite shares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Spawned ranks import the pool by name, and inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

from distributed_pool import DistributedPool  # noqa: E402


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict]:
    pools: dict = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def run_distributed(_pools: dict) -> Callable:
    """Return run_distributed(world_size) -> run(fn, **kwargs) on that many gloo ranks."""

    def pool_of(world_size: int) -> Callable[..., None]:
        if world_size not in _pools:
            _pools[world_size] = DistributedPool(world_size)
        return _pools[world_size].run

    return pool_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
