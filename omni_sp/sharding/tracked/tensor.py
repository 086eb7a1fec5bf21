"""A tensor whose tokens are sharded over the ranks, and which looks like the full tensor to a model's code.

Its shape is the global one. Operations that treat tokens one by one work on the shards (``compute_rules``,
``view_rules``), attention goes through the core (``attention``), and every other operation is done on the full tensor,
which is gathered for it: that is slower, and exact all the same. So a model's own, unmodified code runs over shards
without a description of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.sharding.torch_functions import torchs_own
from omni_sp.sharding.tracked.exchanges import fetch_plan, fetch_ranges, gather_shards
from omni_sp.sharding.tracked.placement import Placement, Range, local_shard
from omni_sp.sharding.tracked.recording import as_one_operation

T = TypeVar("T")
Rule = Callable[..., Any]
FUNCTION_RULES: dict[Any, Rule] = {}
"""Rules for torch functions, tried before torch decomposes the function into operators: ``rule(*args, **kwargs)``."""
OPERATOR_RULES: dict[Any, Rule] = {}
"""Rules for aten operators that torch does not decompose: ``rule(func, *args, **kwargs)``.

A rule returns NotImplemented for arguments that it does not handle.
"""


class TokenTensor(torch.Tensor):
    """A sharded tensor: one shard on each rank.

    Attributes:
        shard_dim: the dim that is sharded.
        placement: which rank holds which indices of that dim.
        is_copy: in one process this tensor would be a view of another one, but its shard is a copy, so that a write
            would be lost.
        writes: how often its memory was written to; tensors that share memory share this list of one number.
    """

    shard_dim: int
    placement: Placement
    axis: Axis
    is_copy: bool
    writes: list[int]
    _local: torch.Tensor
    _writes_seen: int | None

    @staticmethod
    def __new__(
        cls, local: torch.Tensor, dim: int, placement: Placement, axis: Axis, strides: Sequence[int] | None = None
    ) -> TokenTensor:
        """Make a sharded tensor of this rank's shard. ``strides`` are those of the full tensor, None if contiguous."""
        shape = list(local.shape)
        shape[dim] = placement.size
        sharded = torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=local.dtype, device=local.device)
        sharded._local, sharded.shard_dim, sharded.placement, sharded.axis = local, dim, placement, axis
        sharded.is_copy, sharded.writes, sharded._writes_seen = False, [0], None
        return sharded

    @property
    def local(self) -> torch.Tensor:
        """This rank's shard.

        Raises:
            ShardingError: the shard is the copy of a view, and the viewed tensor was written to since.
        """
        if self._writes_seen is not None and self._writes_seen != self.writes[0]:
            raise ShardingError(
                "a view of a tensor in pieces, whose piece had to be copied, is read after that tensor was written to"
            )
        return self._local

    def wrap(self, local: torch.Tensor, dim: int | None = None, placement: Placement | None = None) -> TokenTensor:
        """A contiguous tensor over the same ranks, by default with this tensor's dim and placement.

        Its shards are contiguous too, so that no view has to copy.
        """
        dim = self.shard_dim if dim is None else dim
        return TokenTensor(local.contiguous(), dim, placement or self.placement, self.axis)

    def wrap_pointwise(self, local: torch.Tensor, dim: int, tensors: Sequence[torch.Tensor]) -> TokenTensor:
        """A tensor computed element by element from ``tensors``, with the strides that torch gives it."""
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
        """A view of this tensor, by default with its dim and placement.

        The strides are those that a view of the full tensor would have; by them torch decides, as in one process,
        whether ``contiguous`` and ``reshape`` copy. None is for those of a contiguous tensor.
        """
        dim = self.shard_dim if dim is None else dim
        view = TokenTensor(local, dim, placement or self.placement, self.axis, strides)
        view.writes, view.is_copy, view._writes_seen = self.writes, self.is_copy, self._writes_seen
        if not self.is_copy and local.numel() and memory_of(local) != memory_of(self._local):
            view.mark_as_copy()
        return view

    def mark_as_copy(self) -> None:
        """Note that this tensor is a copy where one process has a view."""
        self.is_copy, self._writes_seen = True, self.writes[0]

    def full_tensor(self, operation: str | None = None) -> torch.Tensor:
        """All shards gathered, a collective call; counted in the running forward's ``gathers`` under ``operation``."""
        return as_one_operation(gather_shards, self.local, self.shard_dim, self.placement, self.axis, operation)

    def redistribute(self, placement: Placement) -> TokenTensor:
        """The same tensor with another placement: only what changes ranks is sent. A collective call."""
        if placement == self.placement:
            return self
        return self.wrap(self.fetch_ranges(placement.ranges_per_rank), placement=placement)

    def fetch_ranges(self, wanted: Sequence[Sequence[Range]]) -> torch.Tensor:
        """The ranges that this rank wants, ascending, as a plain tensor, also of what others hold. A collective call.

        ``wanted`` holds every rank's ranges, ascending; several ranks may want the same indices.
        """
        plan = fetch_plan(self.placement, tuple(map(tuple, wanted)), self.axis.rank)
        return as_one_operation(fetch_ranges, self.local, self.shard_dim, plan, self.axis)

    def shard_like(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's shard of a replicated tensor, sharded along ``dim`` with the placement of this tensor."""
        return local_shard(value, dim, self.placement, self.axis)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TokenTensor(shape={tuple(self.shape)}, shard_dim={self.shard_dim}, lengths={self.placement.lengths})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        func = torchs_own(func)
        rule = FUNCTION_RULES.get(func)
        result = NotImplemented if rule is None else rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        decompose = _decomposition_of(func)
        if decompose is not None:
            # torch decomposes composite operators by itself, but not in inference mode or for a recording. What is
            # exchanged must not depend on that, since one rank may replay what another follows.
            result = decompose(*args, **kwargs)
        else:
            rule = _rule_for(func)
            result = NotImplemented if rule is None else rule(func, *args, **kwargs)
        return run_on_full_tensors(func, args, kwargs) if result is NotImplemented else result


@cache
def _decomposition_of(func: Any) -> Callable[..., Any] | None:
    """What torch does for a composite operator by itself; None for others.

    Where it also has another decomposition, written in Python for compilers, that may do more: of a dropout that does
    nothing it makes a copy.
    """
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
        return partial(func._op_dk, composite)
    return func.decompose if func._can_decompose() else None


@cache
def _rule_for(func: Any) -> Rule | None:
    if any(argument.kwarg_only and argument.is_write for argument in func._schema.arguments):
        return None  # out= variants are always done on the full tensors
    rule = OPERATOR_RULES.get(func) or OPERATOR_RULES.get(func.overloadpacket)
    if rule is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
        rule = OPERATOR_RULES["pointwise"]
    return rule


def run_on_full_tensors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the full tensors. All ranks run this code, since all see the same shapes.

    It is refused where it would write to a view whose shard is a copy, or change a tensor's shape in place.
    """
    written = _written_tensors(TokenTensor, func, args, kwargs)
    if written and torch.Tag.inplace_view in func.tags:
        raise ShardingError(f"{func} changes the shape of a tensor whose tokens lie in pieces on the ranks")
    for x in written:
        require_writable(func, x)
    flat, spec = tree_flatten((tuple(args), kwargs))
    # Arguments that are one tensor are gathered once, and stay one tensor.
    full = {id(x): _with_strides(x.full_tensor(str(func)), x.stride()) for x in flat if isinstance(x, TokenTensor)}
    args, kwargs = tree_unflatten([full.get(id(x), x) for x in flat], spec)
    result = func(*args, **kwargs)
    for x in written:
        if full[id(x)].shape != x.shape:
            raise ShardingError(f"{func} changes the shape of a tensor whose tokens lie in pieces on the ranks")
        x.local.copy_(x.shard_like(full[id(x)], x.shard_dim))
        x.writes[0] += 1
        result = x if result is full[id(x)] else result
    if not _returns_view(func):
        return result
    base = next(x for x in flat if isinstance(x, TokenTensor))
    return _wrap_gathered_views(result, full[id(base)], base, [base.writes[0]])


def _with_strides(full: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A full tensor with the strides that the model sees: torch computes views from them."""
    if full.stride() == strides or 0 in strides:
        return full
    return torch.empty_strided(full.shape, strides, dtype=full.dtype, device=full.device).copy_(full)


@cache
def _returns_view(func: Any) -> bool:
    """Whether an operator writes nothing, and may return tensors that share memory with its arguments."""
    schema = func._schema
    return not any(x.is_write for x in schema.arguments) and any(x.alias_info is not None for x in schema.returns)


def _written_tensors(kind: type[T], func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[T]:
    """The tensors of one class that an operator writes to, by its schema."""
    found: list[T] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_flatten(value)[0] if isinstance(x, kind)]
    return found


class GatheredView(torch.Tensor):
    """A view of a gathered tensor. In one process it would share memory with a tensor that is sharded here.

    A write to the view also goes to the sharded tensor; reading the view after the sharded tensor was written to is
    refused. Results computed from the view are plain tensors.

    Attributes:
        plain: the view as a plain tensor.
        full: the gathered tensor that it is a view of.
        writes_seen: the ``writes`` of ``base`` when it was gathered; all views of one gathered tensor share this list.
    """

    plain: torch.Tensor
    full: torch.Tensor
    base: TokenTensor
    writes_seen: list[int]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls, plain: torch.Tensor, full: torch.Tensor, base: TokenTensor, writes_seen: list[int]
    ) -> GatheredView:
        view = torch.Tensor._make_subclass(cls, plain)
        view.plain, view.full, view.base, view.writes_seen = plain, full, base, writes_seen
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written_tensors(GatheredView, func, args, kwargs)
        flat, spec = tree_flatten((tuple(args), kwargs))
        views = [x for x in flat if isinstance(x, GatheredView)]
        if any(x.base.writes[0] != x.writes_seen[0] for x in views):
            raise ShardingError(
                f"{func} reads a view of a tensor whose tokens lie in pieces on the ranks, and which was written to"
            )
        for x in written:
            require_writable(func, x.base)
            if torch.Tag.inplace_view in func.tags:
                raise ShardingError(f"{func} changes the shape of a view of a tensor in pieces")
        args, kwargs = tree_unflatten([x.plain if isinstance(x, GatheredView) else x for x in flat], spec)
        result = func(*args, **kwargs)
        for x in written:
            x.base.local.copy_(x.base.shard_like(x.full, x.base.shard_dim))
            x.base.writes[0] += 1
            x.writes_seen[0] = x.base.writes[0]
            result = x if result is x.plain else result
        if not _returns_view(func):
            return result
        return _wrap_gathered_views(result, views[0].full, views[0].base, views[0].writes_seen)


def _wrap_gathered_views(result: Any, full: torch.Tensor, base: TokenTensor, writes_seen: list[int]) -> Any:
    """The result of an operator, with a GatheredView for each tensor in it that is a view of ``full``."""
    flat, spec = tree_flatten(result)
    is_view = [type(x) is torch.Tensor and memory_of(x) == memory_of(full) for x in flat]
    wrapped = [GatheredView(x, full, base, writes_seen) if view else x for x, view in zip(flat, is_view, strict=True)]
    return tree_unflatten(wrapped, spec)


def require_writable(func: Any, written: TokenTensor) -> None:
    """Raise where a write would be lost."""
    if written.is_copy:
        raise ShardingError(
            f"{func} writes to a view of a tensor in pieces whose piece had to be copied: it would be lost"
        )


@lru_cache(maxsize=4096)
def _pointwise_strides(*layouts: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...] | None:
    """The strides that torch gives to what it computes element by element from tensors of these shapes and strides."""
    tensors = [torch.empty_strided(*layout, device="meta") for layout in layouts]
    operations: dict[int, Callable[..., torch.Tensor]] = {1: torch.clone, 2: torch.add, 3: torch.addcmul}
    return operations[len(tensors)](*tensors).stride() if len(tensors) in operations else None


def _refuse_data(*_args: Any) -> Any:
    raise ShardingError("x.data = y exchanges a tensor's memory, which here lies in pieces on the ranks")


FUNCTION_RULES[torch.Tensor.data.__set__] = _refuse_data  # type: ignore[attr-defined]


def memory_of(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory, fake ones too: the identity of the storage, not its address."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def to_full_tensors(value: Any) -> Any:
    """A result with the full tensor for every sharded one in it (tuples, lists, dicts, dataclass-like outputs)."""
    flat, spec = tree_flatten(value)
    if not any(isinstance(item, (TokenTensor, GatheredView)) for item in flat):
        return value
    flat = [item.full_tensor() if isinstance(item, TokenTensor) else item for item in flat]
    return tree_unflatten([item.clone() if isinstance(item, GatheredView) else item for item in flat], spec)
