"""A tensor whose tokens lie in pieces on the ranks, and which is to a model's code the whole tensor.

Its shape is the global one. Operations that treat tokens one by one work on the pieces (``rules``), attention goes
through the core (``attention``), and whatever else happens to it is done on the whole, which is gathered for that:
slower, and exact all the same. So a model's own, unmodified code runs over pieces without anybody describing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.collectives import exchange, gather
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.sharding.forward_context import current_forward
from omni_sp.sharding.tracked.placement import Placement, Range, gather_order, intersect

T = TypeVar("T")
Rule = Callable[..., Any]
FUNCTION_RULES: dict[Any, Rule] = {}
"""torch functions that are understood as a whole, before torch takes them apart: ``rule(*args, **kwargs)``."""
OPERATOR_RULES: dict[Any, Rule] = {}
"""aten operators: ``rule(func, *args, **kwargs)``. A rule returns NotImplemented for what it does not know."""


class TokenTensor(torch.Tensor):
    """Pieces of a tensor, one on each rank.

    Attributes:
        local: this rank's piece; reading a copied one after the tensor that it views was written to raises.
        shard_dim: the dim that is cut. spans: who holds which indices of it. axis: the ranks.
        copied: in one process it would be a view of another tensor, but its piece is a copy: a write would be lost.
        writes: how often its memory was written to; tensors that share memory share this count.
    """

    shard_dim: int
    placement: Placement
    axis: Axis
    copied: bool
    writes: list[int]
    _local: torch.Tensor
    _seen: int | None

    @staticmethod
    def __new__(  # noqa: D102
        cls, local: torch.Tensor, dim: int, placement: Placement, axis: Axis, strides: Sequence[int] | None = None
    ) -> TokenTensor:
        shape = list(local.shape)
        shape[dim] = placement.size
        whole = torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=local.dtype, device=local.device)
        whole._local, whole.shard_dim, whole.placement, whole.axis = local, dim, placement, axis
        whole.copied, whole.writes, whole._seen = False, [0], None
        return whole

    @property
    def local(self) -> torch.Tensor:
        """This rank's piece."""
        if self._seen is not None and self._seen != self.writes[0]:
            raise ShardingError(
                "a view of a tensor in pieces, whose piece had to be copied, is read after that tensor was written to"
            )
        return self._local

    def wrap(self, local: torch.Tensor, dim: int | None = None, placement: Placement | None = None) -> TokenTensor:
        """Another tensor in pieces on the same ranks, contiguous. Its pieces are so too: then no view has to copy."""
        return TokenTensor(
            local.contiguous(), self.shard_dim if dim is None else dim, placement or self.placement, self.axis
        )

    def wrap_pointwise(self, local: torch.Tensor, dim: int, tensors: Sequence[torch.Tensor]) -> TokenTensor:
        """A new tensor in pieces, computed element by element from ``tensors``: it lies in memory as torch has it."""
        if all(x.is_contiguous() for x in tensors):
            return self.wrap(local, dim)
        strides = _pointwise_strides(*((tuple(x.shape), x.stride()) for x in tensors))
        return TokenTensor(local, dim, self.placement, self.axis, strides)

    def wrap_view(
        self,
        local: torch.Tensor,
        strides: Sequence[int] | None,
        dim: int | None = None,
        placement: Placement | None = None,
    ) -> TokenTensor:
        """A view of this tensor. ``strides`` are those that a view of the whole would have: by them torch decides
        whether ``contiguous`` and ``reshape`` copy, here as in one process.
        """
        view = TokenTensor(
            local, self.shard_dim if dim is None else dim, placement or self.placement, self.axis, strides
        )
        view.writes, view.copied, view._seen = self.writes, self.copied, self._seen
        if not self.copied and local.numel() and _storage_pointer(local) != _storage_pointer(self._local):
            view.mark_as_copy()
        return view

    def mark_as_copy(self) -> None:
        """Note that this should be a view, and is a copy."""
        self.copied, self._seen = True, self.writes[0]

    def full_tensor(self, operation: str | None = None) -> torch.Tensor:
        """All shards gathered; every rank gets the same. A collective call.

        Args:
            operation: what needs the full tensor, counted in the ``gathers`` of the running forward; None counts
                nothing.
        """
        forward = current_forward()
        if forward is not None and operation is not None:
            forward.gathers[operation] = forward.gathers.get(operation, 0) + 1
        joined = gather(self.local, self.placement.lengths, self.shard_dim, self.axis)
        if self.placement.in_rank_order:
            return joined
        return joined.index_select(self.shard_dim, gather_order(self.placement).to(joined.device))

    def redistribute(self, placement: Placement) -> TokenTensor:
        """The same tensor dealt out otherwise: only what changes hands is sent. A collective call."""
        return (
            self
            if placement == self.placement
            else self.wrap(self.fetch_ranges(placement.ranges_per_rank), placement=placement)
        )

    def fetch_ranges(self, wanted: Sequence[Sequence[Range]]) -> torch.Tensor:
        """The spans that each rank wants, ascending, also of what others hold. A collective call.

        Args:
            wanted: for every rank its spans; ranks may want the same.
        """
        me, ranks = self.axis.rank, range(self.axis.size)
        if self.axis.size == 1:
            pieces = [self.local.narrow(self.shard_dim, start, stop - start) for start, stop in wanted[0]]
            return torch.cat(pieces, self.shard_dim) if pieces else self.local.narrow(self.shard_dim, 0, 0)
        rows = self.local.movedim(self.shard_dim, 0)
        going = [intersect(self.placement.ranges_per_rank[me], wanted[rank]) for rank in ranks]
        coming = [intersect(self.placement.ranges_per_rank[rank], wanted[me]) for rank in ranks]
        width = math.prod(rows.shape[1:])
        leaving, arriving = [[width * sum(b - a for a, b in part) for part in parts] for parts in (going, coming)]
        pending = exchange(leaving, arriving, rows.dtype, rows.device, self.axis)
        for place, part in zip(pending.send_buffers, going, strict=True):
            if place.numel():
                starts = [(self.placement.local_offset(me, a), b - a) for a, b in part]
                torch.cat([rows.narrow(0, *start) for start in starts], out=place.view(-1, *rows.shape[1:]))
        pending.start()
        came = [span for part in coming for span in part]
        arrived = pending.wait().view(sum(b - a for a, b in came), *rows.shape[1:])
        # They come rank by rank and belong in ascending order.
        order = sorted(zip(came, arrived.split([b - a for a, b in came]), strict=True), key=lambda pair: pair[0])
        local = torch.cat([part for _, part in order]) if order else arrived
        return local.movedim(0, self.shard_dim)

    def shard_like(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's piece of a tensor that every rank holds whole, cut along ``dim`` as this one is."""
        return local_shard(value, dim, self.placement, self.axis)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TokenTensor(shape={tuple(self.shape)}, dim={self.shard_dim}, pieces={self.placement.lengths})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTION_RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _rule_for(func)
        if rule is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func._can_decompose():
            # In inference mode composite operators arrive as they are.
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return run_on_full_tensors(func, args, kwargs)


@cache
def _rule_for(func: Any) -> Rule | None:
    if any(argument.kwarg_only and argument.is_write for argument in func._schema.arguments):
        return None  # out= variants are never done on pieces
    rule = OPERATOR_RULES.get(func) or OPERATOR_RULES.get(func.overloadpacket)
    if rule is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
        rule = OPERATOR_RULES["pointwise"]
    return rule


def run_on_full_tensors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do something to the whole tensors. All ranks come by here, since all see the same shapes.

    Raises:
        ShardingError: it would write to a view that one process shares with another tensor and this one does not, or
            change a tensor's shape in place.
    """
    written = _written_tensors(TokenTensor, func, args, kwargs)
    if written and torch.Tag.inplace_view in func.tags:
        raise ShardingError(f"{func} changes the shape of a tensor whose tokens lie in pieces on the ranks")
    for piece in written:
        require_writable(func, piece)
    flat, spec = tree_flatten((tuple(args), kwargs))
    # One whole for one tensor, however often it is named.
    wholes = {id(x): _with_strides(x.full_tensor(str(func)), x.stride()) for x in flat if isinstance(x, TokenTensor)}
    args, kwargs = tree_unflatten([wholes.get(id(x), x) for x in flat], spec)
    result = func(*args, **kwargs)
    for piece in written:
        whole = wholes[id(piece)]
        if whole.shape != piece.shape:
            raise ShardingError(f"{func} changes the shape of a tensor whose tokens lie in pieces on the ranks")
        piece.local.copy_(piece.shard_like(whole, piece.shard_dim))
        piece.writes[0] += 1
        result = piece if result is whole else result
    if not _returns_view(func):
        return result
    base = next(x for x in flat if isinstance(x, TokenTensor))
    return _wrap_gathered_views(result, wholes[id(base)], base, [base.writes[0]])


def _with_strides(whole: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Views of a whole are worked out from the strides that a tensor in pieces tells."""
    if whole.stride() == strides or 0 in strides:
        return whole
    return torch.empty_strided(whole.shape, strides, dtype=whole.dtype, device=whole.device).copy_(whole)


@cache
def _returns_view(func: Any) -> bool:
    """Whether an operator that writes nothing may return what shares memory with its arguments."""
    schema = func._schema
    return not any(x.is_write for x in schema.arguments) and any(x.alias_info is not None for x in schema.returns)


def _written_tensors(kind: type[T], func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[T]:
    """The tensors of one kind that an operator writes to, by its schema."""
    found: list[T] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_flatten(value)[0] if isinstance(x, kind)]
    return found


class GatheredView(torch.Tensor):
    """A view of a whole that was gathered. In one process it would share memory with a tensor that here lies in pieces.

    What is written to it goes to that tensor too; reading it after that tensor was written to is refused. What is
    computed from it is plain.

    Attributes:
        plain: the view. full_tensor: what it is a view of. base: the tensor in pieces.
        seen: its writes when it was gathered.
    """

    plain: torch.Tensor
    full_tensor: torch.Tensor
    base: TokenTensor
    seen: list[int]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls, plain: torch.Tensor, whole: torch.Tensor, base: TokenTensor, seen: list[int]
    ) -> GatheredView:
        view = torch.Tensor._make_subclass(cls, plain)
        view.plain, view.full_tensor, view.base, view.seen = plain, whole, base, seen
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        changed = _written_tensors(GatheredView, func, args, kwargs)
        flat, spec = tree_flatten((tuple(args), kwargs))
        glimpses = [x for x in flat if isinstance(x, GatheredView)]
        if any(x.base.writes[0] != x.seen[0] for x in glimpses):
            raise ShardingError(
                f"{func} reads a view of a tensor whose tokens lie in pieces on the ranks, and which was written to"
            )
        for x in changed:
            require_writable(func, x.base)
            if torch.Tag.inplace_view in func.tags:
                raise ShardingError(f"{func} changes the shape of a view of a tensor in pieces")
        args, kwargs = tree_unflatten([x.plain if isinstance(x, GatheredView) else x for x in flat], spec)
        result = func(*args, **kwargs)
        for x in changed:
            x.base.local.copy_(x.base.shard_like(x.full_tensor, x.base.shard_dim))
            x.base.writes[0] += 1
            x.seen[0] = x.base.writes[0]
            if result is x.plain:
                result = x
        return (
            _wrap_gathered_views(result, glimpses[0].full_tensor, glimpses[0].base, glimpses[0].seen)
            if _returns_view(func)
            else result
        )


def _wrap_gathered_views(result: Any, whole: torch.Tensor, base: TokenTensor, seen: list[int]) -> Any:
    """What an operator made of a whole, as views of it where they are."""
    flat, spec = tree_flatten(result)
    return tree_unflatten(
        [
            GatheredView(x, whole, base, seen)
            if type(x) is torch.Tensor and _storage_pointer(x) == _storage_pointer(whole)
            else x
            for x in flat
        ],
        spec,
    )


def require_writable(func: Any, piece: TokenTensor) -> None:
    """Raise where a write would be lost."""
    if piece.copied:
        raise ShardingError(
            f"{func} writes to a view of a tensor in pieces whose piece had to be copied: it would be lost"
        )


@lru_cache(maxsize=4096)
def _pointwise_strides(*layouts: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...] | None:
    """The strides that torch gives to what it computes element by element from tensors of these shapes and strides."""
    tensors = [torch.empty_strided(*layout, device="meta") for layout in layouts]
    alike: dict[int, Callable[..., torch.Tensor]] = {1: torch.clone, 2: torch.add, 3: torch.addcmul}
    return alike[len(tensors)](*tensors).stride() if len(tensors) in alike else None


def _refuse_data(*_args: Any) -> Any:
    raise ShardingError("x.data = y exchanges a tensor's memory, which here lies in pieces on the ranks")


FUNCTION_RULES[torch.Tensor.data.__set__] = _refuse_data  # type: ignore[attr-defined]


def _storage_pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def local_shard(value: torch.Tensor, dim: int, placement: Placement, axis: Axis) -> torch.Tensor:
    """This rank's piece of a tensor that every rank holds whole."""
    ranges = placement.ranges_per_rank[axis.rank]
    if len(ranges) == 1:
        return value.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    if not ranges:
        return value.narrow(dim, 0, 0)
    return torch.cat([value.narrow(dim, start, stop - start) for start, stop in ranges], dim=dim)


def to_full_tensors(value: Any) -> Any:
    """A result with every TokenTensor in it (tuples, lists, dicts, dataclass-like outputs) made whole."""
    flat, spec = tree_flatten(value)
    if not any(isinstance(item, (TokenTensor, GatheredView)) for item in flat):
        return value
    flat = [
        item.full_tensor()
        if isinstance(item, TokenTensor)
        else item.clone()
        if isinstance(item, GatheredView)
        else item
        for item in flat
    ]
    return tree_unflatten(flat, spec)
