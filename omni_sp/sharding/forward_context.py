"""One sharded forward under way: what was cut so far, which attention is running, and what the ranks agreed on.

Lengths are learned once per shape and then known. What they are kept under is *global*: the uncut shapes of the
transformer's inputs and the place in the program. A key made of this rank's own lengths would let one rank hit and
another miss, and the one that missed would wait for ever.
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
"""Input shapes whose lengths are kept; the oldest goes first, on all ranks alike."""

_CURRENT: ContextVar[ShardedForward | None] = ContextVar("omni_sp_sharded_forward", default=None)


def current_forward() -> ShardedForward | None:
    """The sharded forward that is running in this context."""
    return _CURRENT.get()


class LayoutCache:
    """What the ranks learned from each other, by input shape and place in the program."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, dict[Hashable, Any]] = OrderedDict()

    def layouts(self, signature: Hashable) -> dict[Hashable, Any]:
        """What is known for this input shape."""
        layouts = self._tables.setdefault(signature, {})
        self._tables.move_to_end(signature)
        while len(self._tables) > MAX_SHAPES:
            self._tables.popitem(last=False)
        return layouts


@dataclass
class ShardedForward:
    """The state of one forward.

    Attributes:
        mesh: the ranks. strategy: carries out attention over all ranks. kernel: name of the kernel for whole keys.
        table: what the ranks know about this input shape.
        tracked: streams are tensors in pieces that look whole (see ``tracked``).
        exit_stack: what is to be closed when the forward ends.
        tokens: stream name -> the most tokens that it had, over all ranks.
        gathers: operation -> how often it needed the full tensor of one that is tracked.
        attentions: for each attention module now running, innermost last, how often it came to the core.
        has_sharded: whether anything was cut yet.
        masks: what was found out about masks in this forward.
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
        """Note that the innermost running attention module came to the core."""
        if self.attentions:
            self.attentions[-1] += 1

    def call_site(self, *name: Hashable) -> Hashable:
        """A key for "the n-th time that the program comes by here"."""
        self._visits[name] += 1
        return (*name, self._visits[name])

    def get_or_exchange(self, call_site: Hashable, ask: Callable[[], T]) -> T:
        """What the ranks agreed on at this place; ``ask`` exchanges, on the first forward of a shape only."""
        if call_site not in self.layouts:
            self.layouts[call_site] = ask()
        value: T = self.layouts[call_site]
        return value

    def record_shard(self, where: str, whole: torch.Tensor, num_tokens: int, num_own: int) -> None:
        """Remember how long a stream is, and let the model's code run where this rank has none of it."""
        self.has_sharded = True
        if whole.is_floating_point() and (whole.ndim == 3 or self.tracked):
            stream = where.rsplit(".", 1)[-1]
            self.tokens[stream] = max(num_tokens, self.tokens.get(stream, 0))
        if num_own == 0 and num_tokens > 0 and not self._has_empty_shard and not self.tracked:
            self._has_empty_shard = True
            self.exit_stack.enter_context(EmptyShardReshape())

    def join(self, value: torch.Tensor, dim: int, where: str) -> torch.Tensor:
        """The whole of a tensor whose pieces lie on the ranks."""
        axis = self.mesh.sequence
        call_site = self.call_site("join", where)
        lengths = self.get_or_exchange(call_site, lambda: [row[0] for row in gather_ints([value.shape[dim]], axis)])
        if lengths[axis.rank] != value.shape[dim]:
            raise ShardingError(
                f"{where}: this rank's piece is {value.shape[dim]} long, on the first forward of this shape it was "
                f"{lengths[axis.rank]}"
            )
        return gather(value, lengths, dim, axis)


OnShard = Callable[[str, torch.Tensor, int, int], None]
"""Told of every cut: where, the whole tensor, its tokens, and this rank's."""


def shard_plain(value: Any, split: Split, mesh: ParallelMesh, where: str, on_shard: OnShard | None) -> Any:
    """This rank's piece of a tensor, or of each tensor of a list; None stays None."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return type(value)([shard_plain(item, split, mesh, where, on_shard) for item in value])
    if not isinstance(value, torch.Tensor):
        raise ShardingError(f"{where} is a {type(value).__name__}, its plan wants a tensor to cut")
    if split.ndim is not None and value.ndim != split.ndim:
        if split.replicate_if_ndim_differs:
            return value
        raise ShardingError(f"{where} has shape {tuple(value.shape)}, its plan wants {split.ndim} dims")
    axis = mesh.sequence
    sizes = split_evenly(value.shape[split.dim], axis.size)
    own = sizes[axis.rank]
    if on_shard is not None:
        on_shard(where, value, value.shape[split.dim], own)
    return value.narrow(split.dim, sum(sizes[: axis.rank]), own).contiguous()


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
    own = f"{signature}".replace("{", "{{").replace("}", "}}")
    require_equal(
        mesh.sequence,
        f"the ranks call the transformer with different inputs: rank {mesh.rank} with {own}; every rank must run the "
        "same program on the same inputs",
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
