"""Fixtures that every tier of the suite shares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Spawned ranks import the pool by name, and inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

from distributed_pool import pool_of  # noqa: E402


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict]:
    pools: dict = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def run_distributed(_pools: dict) -> Callable:
    """Return run_distributed(world_size) -> run(fn, **kwargs) on that many gloo ranks."""

    return lambda world_size: pool_of(_pools, world_size).run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
