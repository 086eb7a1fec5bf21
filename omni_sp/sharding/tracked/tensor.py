"""A tensor whose tokens lie in pieces on the ranks, and which is to a model's code the whole tensor.

Its shape is the global one. Operations that treat tokens one by one work on the pieces (``rules``), attention goes
through the core (``attention``), and whatever else happens to it is done on the whole, which is gathered for that:
slower, and exact all the same. So a model's own, unmodified code runs over pieces without anybody describing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.collectives import gather
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.sharding.tracked.spans import Spans, order_of

Rule = Callable[..., Any]
FUNCTION_RULES: dict[Any, Rule] = {}
"""torch functions that are understood as a whole, before torch takes them apart: ``rule(*args, **kwargs)``."""
OPERATOR_RULES: dict[Any, Rule] = {}
"""aten operators: ``rule(func, *args, **kwargs)``. A rule returns NotImplemented for what it does not know."""

GATHERED: ContextVar[Counter[str] | None] = ContextVar("omni_sp_gathered", default=None)
"""Counts operations that needed the whole tensor, while set."""


class TokenTensor(torch.Tensor):
    """Pieces of a tensor, one on each rank.

    Attributes:
        local: this rank's piece. cut_dim: the dim that is cut. spans: who holds which indices of it. axis: the ranks.
        copied: in one process it would be a view of another tensor, but its piece is a copy: a write would be lost.
    """

    local: torch.Tensor
    cut_dim: int
    spans: Spans
    axis: Axis
    copied: bool

    @staticmethod
    def __new__(cls, local: torch.Tensor, dim: int, spans: Spans, axis: Axis) -> TokenTensor:  # noqa: D102
        shape = list(local.shape)
        shape[dim] = spans.size
        whole = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        whole.local, whole.cut_dim, whole.spans, whole.axis, whole.copied = local, dim, spans, axis, False
        return whole

    def like(self, local: torch.Tensor, dim: int | None = None, spans: Spans | None = None) -> TokenTensor:
        """Another tensor in pieces on the same ranks."""
        return TokenTensor(local, self.cut_dim if dim is None else dim, spans or self.spans, self.axis)

    def seen_as(self, local: torch.Tensor, dim: int | None = None, spans: Spans | None = None) -> TokenTensor:
        """A view of this tensor."""
        view = self.like(local, dim, spans)
        view.copied = self.copied
        return view

    def whole(self, why: str | None = None) -> torch.Tensor:
        """All pieces joined; every rank gets the same. A collective call. ``why`` is counted, see GATHERED."""
        counter = GATHERED.get()
        if counter is not None and why is not None:
            counter[why] += 1
        joined = gather(self.local, self.spans.lengths, self.cut_dim, self.axis)
        if self.spans.in_rank_order:
            return joined
        return joined.index_select(self.cut_dim, order_of(self.spans).to(joined.device))

    def cut_alike(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's piece of a tensor that every rank holds whole, cut along ``dim`` as this one is."""
        return cut(value, dim, self.spans, self.axis)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TokenTensor(shape={tuple(self.shape)}, dim={self.cut_dim}, pieces={self.spans.lengths})"

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
        return on_the_whole(func, args, kwargs)


@cache
def _rule_for(func: Any) -> Rule | None:
    if any(argument.kwarg_only and argument.is_write for argument in func._schema.arguments):
        return None  # out= variants are never done on pieces
    rule = OPERATOR_RULES.get(func) or OPERATOR_RULES.get(func.overloadpacket)
    if rule is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
        rule = OPERATOR_RULES["pointwise"]
    return rule


def on_the_whole(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do something to the whole tensors. All ranks come by here, since all see the same shapes.

    Raises:
        ShardingError: it would write to a view that one process shares with another tensor and this one does not, or
            change a tensor's shape in place.
    """
    written = _written_pieces(func, args, kwargs)
    if written and torch.Tag.inplace_view in func.tags:
        raise ShardingError(f"{func} changes the shape of a tensor whose tokens lie in pieces on the ranks")
    for piece in written:
        require_writable(func, piece)
    flat, spec = tree_flatten((tuple(args), kwargs))
    # A tensor in pieces says that it is contiguous: views and strides are worked out from that.
    wholes = [x.whole(str(func)).contiguous() if isinstance(x, TokenTensor) else x for x in flat]
    args, kwargs = tree_unflatten(wholes, spec)
    result = func(*args, **kwargs)
    for piece in written:
        whole = next(whole for x, whole in zip(flat, wholes, strict=True) if x is piece)
        if whole.shape != piece.shape:
            raise ShardingError(f"{func} changes the shape of a tensor whose tokens lie in pieces on the ranks")
        piece.local.copy_(piece.cut_alike(whole, piece.cut_dim))
        result = piece if result is whole else result
    return result


def _written_pieces(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[TokenTensor]:
    """The tensors in pieces that an operator writes to, by its schema."""
    found: list[TokenTensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_flatten(value)[0] if isinstance(x, TokenTensor)]
    return found


def require_writable(func: Any, piece: TokenTensor) -> None:
    """Raise where a write would be lost."""
    if piece.copied:
        raise ShardingError(
            f"{func} writes to a view of a tensor in pieces whose piece had to be copied: it would be lost"
        )


def cut(value: torch.Tensor, dim: int, spans: Spans, axis: Axis) -> torch.Tensor:
    """This rank's piece of a tensor that every rank holds whole."""
    held = spans.held[axis.rank]
    if len(held) == 1:
        return value.narrow(dim, held[0][0], held[0][1] - held[0][0])
    if not held:
        return value.narrow(dim, 0, 0)
    return torch.cat([value.narrow(dim, start, stop - start) for start, stop in held], dim=dim)


def unwrapped(value: Any) -> Any:
    """A result with every TokenTensor in it (tuples, lists, dicts, dataclass-like outputs) made whole."""
    flat, spec = tree_flatten(value)
    if not any(isinstance(item, TokenTensor) for item in flat):
        return value
    return tree_unflatten([item.whole() if isinstance(item, TokenTensor) else item for item in flat], spec)
