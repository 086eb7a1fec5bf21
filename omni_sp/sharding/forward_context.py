"""One sharded forward that is running: what was sharded so far, its attentions, and what the ranks exchanged.

Lengths are exchanged once per shape and then known. They are cached under *global* keys: the unsharded shapes of the
transformer's inputs, and the call site. A key made of this rank's own lengths would let one rank hit and another miss,
and the rank that missed would wait for ever.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from omni_sp.attention import Strategy, split_evenly
from omni_sp.collectives import gather, gather_ints, require_equal
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.empty_shards import EmptyShardReshape
from omni_sp.sharding.plan import Split

T = TypeVar("T")
MAX_SHAPES = 64
"""Input shapes whose lengths are cached; the oldest is dropped first, on all ranks alike."""

_CURRENT: ContextVar[ShardedForward | None] = ContextVar("omni_sp_sharded_forward", default=None)


def current_forward() -> ShardedForward | None:
    """The sharded forward that is running in this context."""
    return _CURRENT.get()


class LayoutCache:
    """What the ranks exchanged, by input shape and call site."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[Hashable, dict[Hashable, Any]] = OrderedDict()

    def layouts(self, signature: Hashable) -> dict[Hashable, Any]:
        """What is known for this input shape, by call site."""
        layouts = self._layouts.setdefault(signature, {})
        self._layouts.move_to_end(signature)
        while len(self._layouts) > MAX_SHAPES:
            self._layouts.popitem(last=False)
        return layouts


@dataclass
class ShardedForward:
    """The state of one forward.

    Attributes:
        kernel: name of the attention kernel for replicated keys.
        layouts: call site -> what the ranks exchanged there, for this input shape.
        exit_stack: is closed when the forward ends.
        tokens: stream name -> the most tokens that it had, over all ranks.
        gathers: operation -> how often it needed the full tensor of one that is sharded.
        tracked: sharded tensors look like full tensors, see ``tracked``.
        attentions: for each attention module now running, innermost last, how often it reached the core.
        has_sharded: whether any tensor was sharded yet.
        masks: what this forward found out about its attention masks.
    """

    mesh: ParallelMesh
    strategy: Strategy
    kernel: str
    layouts: dict[Hashable, Any]
    exit_stack: ExitStack
    tokens: dict[str, int]
    gathers: dict[str, int]
    tracked: bool = False
    attentions: list[int] = field(default_factory=list)
    has_sharded: bool = False
    masks: dict[Hashable, Any] = field(default_factory=dict)
    _has_empty_shard: bool = False
    _visits: defaultdict[Hashable, int] = field(default_factory=lambda: defaultdict(int))

    def count_attention(self) -> None:
        """Note that the innermost running attention module reached the core."""
        if self.attentions:
            self.attentions[-1] += 1

    def count_gather(self, operation: str) -> None:
        """Note that an operation needed a full tensor."""
        self.gathers[operation] = self.gathers.get(operation, 0) + 1

    def call_site(self, *name: Hashable) -> Hashable:
        """A key for the n-th time that the program runs the code of this name."""
        self._visits[name] += 1
        return (*name, self._visits[name])

    def get_or_exchange(self, call_site: Hashable, exchange: Callable[[], T]) -> T:
        """What the ranks exchanged at this call site; ``exchange`` is called on the first forward of a shape only."""
        if call_site not in self.layouts:
            self.layouts[call_site] = exchange()
        value: T = self.layouts[call_site]
        return value

    def record_shard(self, location: str, full: torch.Tensor, num_tokens: int, num_local: int) -> None:
        """Remember how long a stream is, and let the model's code run where this rank has none of its tokens."""
        self.has_sharded = True
        if full.is_floating_point() and (full.ndim == 3 or self.tracked):
            stream = location.rsplit(".", 1)[-1]
            self.tokens[stream] = max(num_tokens, self.tokens.get(stream, 0))
        if num_local == 0 and num_tokens > 0 and not self._has_empty_shard and not self.tracked:
            self._has_empty_shard = True
            self.exit_stack.enter_context(EmptyShardReshape())

    def gather_output(self, shard: torch.Tensor, dim: int, location: str) -> torch.Tensor:
        """The full tensor whose shards lie on the ranks."""
        axis, length = self.mesh.sequence, shard.shape[dim]
        call_site = self.call_site("gather", location)
        lengths = self.get_or_exchange(call_site, lambda: [of_rank for (of_rank,) in gather_ints([length], axis)])
        if lengths[axis.rank] != length:
            raise ShardingError(
                f"{location}: this rank's piece is {length} long, on the first forward of this shape it was "
                f"{lengths[axis.rank]}"
            )
        return gather(shard, lengths, dim, axis)


OnShard = Callable[[str, torch.Tensor, int, int], None]
"""Is called whenever a tensor is sharded: location, the full tensor, its tokens, and this rank's tokens."""


def shard_plain(value: Any, split: Split, mesh: ParallelMesh, location: str, on_shard: OnShard | None) -> Any:
    """This rank's shard of a tensor, or of each tensor of a list, as a plain tensor; None stays None."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return type(value)([shard_plain(item, split, mesh, location, on_shard) for item in value])
    if not isinstance(value, torch.Tensor):
        raise ShardingError(f"{location} is a {type(value).__name__}, its plan wants a tensor to cut")
    if split.ndim is not None and value.ndim != split.ndim:
        if split.replicate_if_ndim_differs:
            return value
        raise ShardingError(f"{location} has shape {tuple(value.shape)}, its plan wants {split.ndim} dims")
    axis = mesh.sequence
    lengths = split_evenly(value.shape[split.dim], axis.size)
    num_local = lengths[axis.rank]
    if on_shard is not None:
        on_shard(location, value, value.shape[split.dim], num_local)
    return value.narrow(split.dim, sum(lengths[: axis.rank]), num_local).contiguous()


@contextmanager
def activate(forward: ShardedForward, signature: Hashable) -> Iterator[None]:
    """Make ``forward`` the running one; nesting is refused."""
    if _CURRENT.get() is not None:
        raise ShardingError(
            "a sharded transformer was called inside another sharded transformer's forward; if that one was "
            "interrupted, remove() its handle"
        )
    if forward.mesh.check:
        _check_same_call(signature, forward.mesh)
    token = _CURRENT.set(forward)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _check_same_call(signature: Hashable, mesh: ParallelMesh) -> None:
    """Raise where the ranks call the transformer with inputs of different shapes."""
    escaped = f"{signature}".replace("{", "{{").replace("}", "}}")
    require_equal(
        mesh.sequence,
        f"the ranks call the transformer with different inputs: rank {mesh.rank} with {escaped}; every rank must run "
        "the same program on the same inputs",
        signature=signature,
    )


def signature_of(value: Any) -> Hashable:
    """Shapes and plain values of a call's arguments: equal on all ranks, since all run the same call."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(signature_of(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, signature_of(item)) for name, item in sorted(value.items(), key=lambda pair: str(pair[0])))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__qualname__
