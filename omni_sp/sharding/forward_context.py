"""One sharded forward that is running: what was sharded so far, and what it found out about its masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from omni_sp.attention import Strategy
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh

_CURRENT: ContextVar[ShardedForward | None] = ContextVar("omni_sp_sharded_forward", default=None)


def current_forward() -> ShardedForward | None:
    """The sharded forward that is running in this context."""
    return _CURRENT.get()


@dataclass
class ShardedForward:
    """The state of one forward.

    Attributes:
        strategy: carries out attention over all ranks; None where each rank attends from its own tokens to all of them.
        tokens: stream name -> the most tokens that it had, over all ranks.
        gathers: operation -> how often it needed the full tensor of one that is sharded.
        has_sharded: whether any tensor was sharded yet.
        masks: what this forward found out about its attention masks.
        splits_tokens: whether the token streams are sharded where they begin; False where another dim is.
    """

    mesh: ParallelMesh
    strategy: Strategy | None
    tokens: dict[str, int]
    gathers: dict[str, int]
    has_sharded: bool = False
    masks: dict[Hashable, Any] = field(default_factory=dict)
    splits_tokens: bool = True

    def count_gather(self, operation: str) -> None:
        """Note that an operation needed a full tensor."""
        self.gathers[operation] = self.gathers.get(operation, 0) + 1

    def record_shard(self, location: str, full: torch.Tensor, num_tokens: int) -> None:
        """Remember how long a stream is."""
        self.has_sharded = True
        if full.is_floating_point():
            stream = location.rsplit(".", 1)[-1]
            self.tokens[stream] = max(num_tokens, self.tokens.get(stream, 0))


OnShard = Callable[[str, torch.Tensor, int], None]
"""Is called whenever a tensor is sharded: location, the full tensor, and its tokens."""


@contextmanager
def activate(forward: ShardedForward) -> Iterator[None]:
    """Make ``forward`` the running one; nesting is refused."""
    if _CURRENT.get() is not None:
        raise ShardingError(
            "a sharded transformer was called inside another sharded transformer's forward; if that one was "
            "interrupted, remove() its handle"
        )
    token = _CURRENT.set(forward)
    try:
        yield
    finally:
        _CURRENT.reset(token)
