"""What one process computes, by one of the ranks of a test and for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from omni_sp import ParallelMesh

T = TypeVar("T")


def by_one_rank(mesh: ParallelMesh, compute: Callable[[], T]) -> T:
    """What ``compute`` gives on the first rank, while the others wait and leave it their cores.

    A reference that each rank computed for itself would be most of the work of a test, and the same every time.

    Args:
        mesh: of all ranks that need the result; all call this at the same place.
        compute: gives anything that can be pickled. It knows nothing of the ranks, and leaves no trace: what it draws
            from torch's generator, the others do not.
    """
    found: list[T | None] = [None]
    if mesh.rank == 0:
        with torch.random.fork_rng(devices=[]):
            found[0] = compute()
    if mesh.world_size > 1:
        dist.broadcast_object_list(found, src=mesh.ranks[0], group=mesh.world.group)
    result: T = found[0]  # type: ignore[assignment]
    return result
