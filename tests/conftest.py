from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from testing.ranks import RankPool

_POOL: list[RankPool] = []


@pytest.fixture
def ranks() -> RankPool:
    """The session's rank processes, started anew after a failure ended them."""
    if not _POOL or not _POOL[-1].alive:
        _POOL.append(RankPool())
    return _POOL[-1]


@pytest.fixture(scope="session", autouse=True)
def _end_ranks() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    for pool in _POOL:
        pool.close()
