"""Tensors whose numbers another rank computes: they have a shape, and get their numbers when somebody needs them.

What is done to one meanwhile, such as a view, a cast or arithmetic, is recorded, and done when the numbers are there.
Everything else asks for the numbers, which is an exchange between ranks: all ranks run the same program on tensors of
the same shapes, so they all ask at the same point, also the one that has computed the numbers itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from omni_sp.errors import ShardingError
from omni_sp.sharding.torch_functions import torchs_own

_aten = torch.ops.aten
_READS = {
    "numpy", "tolist", "item", "data_ptr", "storage", "untyped_storage", "share_memory_", "is_shared", "__array__",
    "__bool__", "__complex__", "__deepcopy__", "__dlpack__", "__float__", "__format__", "__index__", "__int__",
    "__reduce_ex__",
}  # fmt: skip
"""Methods that reach for the numbers without an operator of aten."""
_NEW_LIKE = {
    _aten.zeros_like, _aten.ones_like, _aten.empty_like, _aten.full_like, _aten.randn_like, _aten.rand_like,
    _aten.new_zeros, _aten.new_ones, _aten.new_empty, _aten.new_full, _aten.new_empty_strided,
}  # fmt: skip
"""They look at a tensor's shape alone. Random numbers are drawn at once, as in one process."""
_RECORDED = {
    _aten.view, _aten._unsafe_view, _aten.permute, _aten.transpose, _aten.t, _aten.unsqueeze, _aten.squeeze,
    _aten.expand, _aten.slice, _aten.select, _aten.unbind, _aten.split, _aten.split_with_sizes, _aten.detach,
    _aten.alias, _aten.as_strided, _aten.lift_fresh, _aten._to_copy, _aten.clone, _aten.cat, _aten.stack, _aten.flip,
    _aten.repeat, _aten.constant_pad_nd, _aten.pixel_shuffle, _aten.linalg_vector_norm, _aten.mean, _aten.sum,
    _aten.std, _aten.var, _aten.amax, _aten.amin, _aten.aminmax, _aten.dot, _aten.index, _aten.index_select,
}  # fmt: skip
"""What is recorded beside pointwise operators."""
_REFUSED_TAGS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_SMALL = 64  # elements


class LazyRound:
    """The lazy tensors of one round, and what is done to them until their numbers come.

    Args:
        exchange: gives every tensor that was made here and is used its numbers, by ``receive``; a collective call. It
            gets the reason: the operation that needs them.
    """

    def __init__(self, exchange: Callable[[str], None]) -> None:
        self._exchange = exchange
        self._operations: list[_Operation] = []

    def tensor(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> LazyTensor:
        """A lazy tensor that is to look like this."""
        return LazyTensor(self, shape, strides, dtype, device)

    def complete(self, reason: str) -> None:
        """Get all numbers, and do what was recorded, in its order. A collective call."""
        self._exchange(reason)
        # All of it now: what is written to from here on was read by the operations that came before.
        operations, self._operations = self._operations, []
        for operation in operations:
            operation.run()

    def record(self, func: Any, flat: Sequence[Any], spec: TreeSpec, device: torch.device) -> Any:
        """Record one operation, and return its lazy results; NotImplemented where their shapes cannot be known."""
        metas = [torch.device("meta") if isinstance(x, torch.device) else _meta(x) for x in flat]
        try:
            args, kwargs = tree_unflatten(metas, spec)
            outputs, output_spec = tree_flatten(func(*args, **kwargs))
        except Exception:  # a kernel may lack on the meta device: the numbers decide
            return NotImplemented
        # A plain operand may be written to later.
        kept = [x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, LazyTensor) else x for x in flat]
        device = next((x for x in flat if isinstance(x, torch.device)), device)
        _note_used(flat)
        lazies = [
            LazyTensor(self, x.shape, x.stride(), x.dtype, device) if isinstance(x, torch.Tensor) else x
            for x in outputs
        ]
        self._operations.append(_Operation(func, kept, spec, lazies))
        return tree_unflatten(lazies, output_spec)


class LazyTensor(torch.Tensor):
    """A tensor of a `LazyRound`: the shape, strides, dtype and device of what it will be.

    Attributes:
        is_used: whether any operation has taken it. All ranks run the same program, so they answer alike.
        computed: on a rank that has the numbers already, these, until all ranks get them.
    """

    is_used: bool
    computed: torch.Tensor | None
    _round: LazyRound
    _numbers: torch.Tensor | None

    @staticmethod
    def __new__(  # noqa: D102
        cls: type[LazyTensor],
        round_: LazyRound,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyTensor:
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        made._round, made._numbers = round_, None
        made.is_used, made.computed = False, None
        return made

    # torch.Tensor has one with other arguments.
    def __init__(self, *_: Any) -> None:
        super().__init__()

    @property
    def is_waiting(self) -> bool:
        """Whether the numbers are still to come."""
        return self._numbers is None

    def receive(self, numbers: torch.Tensor) -> None:
        """Give this tensor its numbers."""
        self._numbers, self.computed = numbers, None

    def full(self, reason: str) -> torch.Tensor:
        """The plain tensor; a collective call where the numbers are still to come.

        Raises:
            ShardingError: they never come, because the call that they belong to was left.
        """
        if self._numbers is None:
            self.is_used = True
            self._round.complete(reason)
        if self._numbers is None:
            raise ShardingError("another rank's result was read after the call that it belongs to had been left")
        return self._numbers

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self._numbers) if self._numbers is not None else f"LazyTensor(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, kwargs = torchs_own(func), kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS:
            return func(*full_tensors(args, name), **full_tensors(kwargs, name))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat, spec = tree_flatten((tuple(args), kwargs or {}))
        rounds = {id(x._round): x for x in flat if isinstance(x, LazyTensor) and x.is_waiting}
        if len(rounds) == 1 and not func._schema.is_mutable:
            result = _without_numbers(func, flat, spec, next(iter(rounds.values())))
            if result is not NotImplemented:
                return result
        if torch.Tag.inplace_view in func.tags:
            raise ShardingError(f"{func} changes the shape of a result that another rank computes: clone it first")
        args, kwargs = tree_unflatten([x.full(str(func)) if isinstance(x, LazyTensor) else x for x in flat], spec)
        return func(*args, **kwargs)


def full_tensors(tree: Any, reason: str) -> Any:
    """A structure with plain tensors in the place of lazy ones; a collective call where any is waiting."""
    leaves = tree_flatten(tree)[0]
    if not any(isinstance(x, LazyTensor) for x in leaves):
        return tree  # and not a copy of its lists and dicts, which somebody may write to
    _note_used(leaves)
    return tree_map(lambda x: x.full(reason) if isinstance(x, LazyTensor) else x, tree)


class _Operation:
    """One recorded operation. Nobody may need its results any more when their numbers come."""

    def __init__(self, func: Any, kept: list[Any], spec: TreeSpec, results: Sequence[Any]) -> None:
        self._func, self._kept, self._spec = func, kept, spec
        self._results = [weakref.ref(x) if isinstance(x, LazyTensor) else None for x in results]

    def run(self) -> None:
        results = [None if result is None else result() for result in self._results]
        inputs = [x._numbers if isinstance(x, LazyTensor) else x for x in self._kept]
        is_left = any(x is None and kept is not None for x, kept in zip(inputs, self._kept, strict=True))
        if any(result is not None for result in results) and not is_left:
            args, kwargs = tree_unflatten(inputs, self._spec)
            for result, numbers in zip(results, tree_flatten(self._func(*args, **kwargs))[0], strict=True):
                if result is not None:
                    result.receive(numbers)
        self._kept = []  # which keeps the operation's inputs no longer


def _without_numbers(func: Any, flat: list[Any], spec: TreeSpec, lazy: LazyTensor) -> Any:
    """The result of an operation that needs no numbers yet; NotImplemented for one that does."""
    packet = func.overloadpacket
    if packet is _aten.index:
        flat, spec = _with_positions(flat, spec)
    if packet in _NEW_LIKE:
        args, kwargs = tree_unflatten([_empty(x) if isinstance(x, LazyTensor) else x for x in flat], spec)
        return func(*args, **kwargs)
    is_refused = not _REFUSED_TAGS.isdisjoint(func.tags) and packet is not _aten.index
    if (packet in _RECORDED or torch.Tag.pointwise in func.tags) and not is_refused:
        # What is large beside the results, such as weights, is not cloned.
        plain = sum(x.numel() for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, LazyTensor))
        if plain <= 4 * lazy.numel() + _SMALL:
            return lazy._round.record(func, flat, spec, lazy.device)
        return NotImplemented
    if func._can_decompose():
        # In inference mode torch does not decompose composite operators by itself.
        args, kwargs = tree_unflatten(flat, spec)
        return func.decompose(*args, **kwargs)
    return NotImplemented


def _with_positions(flat: list[Any], spec: TreeSpec) -> tuple[list[Any], TreeSpec]:
    """The arguments of an indexing with the positions in masks that are known here: the result has a shape then."""
    (x, indices), kwargs = tree_unflatten(flat, spec)
    positions: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        positions += index.nonzero(as_tuple=True) if is_mask and not isinstance(index, LazyTensor) else (index,)
    return tree_flatten(((x, positions), kwargs))


def _note_used(items: Sequence[Any]) -> None:
    for x in items:
        if isinstance(x, LazyTensor):
            x.is_used = True


def _meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
