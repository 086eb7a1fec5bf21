"""Rules for operators that move numbers without changing them: views, slices, concatenations, permutations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from omni_sp.sharding.tracked.placement import Placement, concatenated, even_placement, local_shard
from omni_sp.sharding.tracked.tensor import OPERATOR_RULES, Rule, TokenTensor

aten = torch.ops.aten


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators (all of their overloads)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            OPERATOR_RULES[operator] = function
        return function

    return register


def positive_dim(dim: int, ndim: int) -> int:
    """A dim counted from the front."""
    return dim % ndim if ndim else 0


@lru_cache(maxsize=4096)
def reshape_placement(
    before: tuple[int, ...], shard_dim: int, placement: Placement, after: tuple[int, ...]
) -> tuple[int, Placement] | None:
    """The sharded dim after a reshape between two full shapes, and its placement; None where the shards do not fit."""
    i = j = 0
    while i < len(before) or j < len(after):
        # The shortest run of old dims and of new dims with the same number of elements.
        first_old, first_new = i, j
        old = new = 1
        while True:
            if i > first_old and j > first_new and old == new:
                break
            if (old <= new and i < len(before)) or j >= len(after):
                if i >= len(before):
                    break
                old *= before[i]
                i += 1
            else:
                new *= after[j]
                j += 1
        if not first_old <= shard_dim < i:
            continue
        flat = placement.flatten_dims(math.prod(before[first_old:shard_dim]), math.prod(before[shard_dim + 1 : i]))
        # Of several dims that fit, one with the size of the sharded dim is the most natural.
        for dim in sorted(range(first_new, j), key=lambda dim: after[dim] != placement.size):
            found = flat.unflatten_dims(math.prod(after[first_new:dim]), after[dim], math.prod(after[dim + 1 : j]))
            if found is not None and (after[dim] != 1 or flat.size == 1):
                return dim, found
        return None
    return None


@rule(aten.view, aten._unsafe_view)
def _view(_func: Any, x: Any, size: Any) -> Any:
    if not isinstance(x, TokenTensor) or isinstance(size, torch.dtype) or 0 in x.shape:
        return NotImplemented
    size = list(size)
    if -1 in size:
        size[size.index(-1)] = x.numel() // -math.prod(size)
    found = reshape_placement(tuple(x.shape), x.shard_dim, x.placement, tuple(size))
    if found is None:
        return _view_redistributed(x, size)
    dim, placement = found
    strides = None if x.is_contiguous() else _view_strides(tuple(x.shape), x.stride(), tuple(size))
    size[dim] = placement.lengths[x.axis.rank]
    return x.wrap_view(x.local.reshape(size), strides, dim, placement)


def _view_redistributed(x: TokenTensor, size: Sequence[int]) -> Any:
    """A view whose new dims the shards do not fit, such as rows of a picture: redistribute them so that they do."""
    for dim in range(len(size)):
        if size[dim] < x.axis.size:
            continue
        found = reshape_placement(tuple(size), dim, even_placement(size[dim], x.axis.size), tuple(x.shape))
        if found is not None and found[0] == x.shard_dim:
            placement = even_placement(size[dim], x.axis.size)
            local_size = [placement.lengths[x.axis.rank] if d == dim else n for d, n in enumerate(size)]
            view = x.wrap(x.redistribute(found[1]).local.reshape(local_size), dim, placement)
            # A write to it would not reach x.
            view.writes = x.writes
            view.mark_as_copy()
            return view
    return NotImplemented


@lru_cache(maxsize=4096)
def _view_strides(shape: tuple[int, ...], strides: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a view; where there is no such view, the error is torch's own."""
    return torch.empty_strided(shape, strides, device="meta").view(size).stride()


@rule(aten.permute)
def _permute(_func: Any, x: TokenTensor, dims: Sequence[int]) -> Any:
    dims = [positive_dim(dim, x.ndim) for dim in dims]
    return x.wrap_view(x.local.permute(dims), [x.stride(d) for d in dims], dims.index(x.shard_dim))


@rule(aten.transpose, aten.t)
def _transpose(_func: Any, x: TokenTensor, first: int = 0, second: int = 1) -> Any:
    if x.ndim < 2:
        return x.wrap_view(x.local, x.stride())
    a, b = positive_dim(first, x.ndim), positive_dim(second, x.ndim)
    dim = b if x.shard_dim == a else a if x.shard_dim == b else x.shard_dim
    strides = list(x.stride())
    strides[a], strides[b] = strides[b], strides[a]
    return x.wrap_view(x.local.transpose(a, b), strides, dim)


@rule(aten.unsqueeze)
def _unsqueeze(_func: Any, x: TokenTensor, dim: int) -> Any:
    dim = positive_dim(dim, x.ndim + 1)
    strides = list(x.stride())
    strides.insert(dim, x.shape[dim] * strides[dim] if dim < x.ndim else 1)
    return x.wrap_view(x.local.unsqueeze(dim), strides, x.shard_dim + (dim <= x.shard_dim))


@rule(aten.squeeze)
def _squeeze(_func: Any, x: TokenTensor, dim: Any = None) -> Any:
    if dim is None or x.placement.size == 1:
        return NotImplemented
    dims = [positive_dim(d, x.ndim) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    removed = [d for d in dims if x.shape[d] == 1 and d != x.shard_dim]
    return x.wrap_view(
        x.local.squeeze(removed),
        [stride for d, stride in enumerate(x.stride()) if d not in removed],
        x.shard_dim - sum(d < x.shard_dim for d in removed),
    )


@rule(aten.expand)
def _expand(_func: Any, x: TokenTensor, size: Sequence[int], **_kwargs: Any) -> Any:
    size = list(size)
    dim = x.shard_dim + len(size) - x.ndim
    if size[dim] not in (-1, x.placement.size) or (x.placement.size == 1 and size[dim] != 1):
        return NotImplemented
    new = len(size) - x.ndim
    strides = [0] * new + [
        0 if x.shape[d] == 1 and size[new + d] not in (1, -1) else stride for d, stride in enumerate(x.stride())
    ]
    size[dim] = x.local.shape[x.shard_dim]
    return x.wrap_view(x.local.expand(size), strides, dim)


@rule(aten.slice)
def _slice(func: Any, x: TokenTensor, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Any:
    if not isinstance(x, TokenTensor):
        return NotImplemented
    dim = positive_dim(dim, x.ndim)
    if dim != x.shard_dim:
        strides = list(x.stride())
        strides[dim] *= step
        return x.wrap_view(func(x.local, dim, start, stop, step), strides)
    if step != 1:
        return NotImplemented
    first, last, _ = slice(start, stop).indices(x.placement.size)
    return _narrow_sharded(x, first, max(first, last))


def _narrow_sharded(x: TokenTensor, start: int, stop: int) -> TokenTensor:
    me = x.axis.rank
    first, last = x.placement.local_offset(me, start), x.placement.local_offset(me, stop)
    return x.wrap_view(
        x.local.narrow(x.shard_dim, first, last - first), x.stride(), placement=x.placement.narrow(start, stop)
    )


@rule(aten.select)
def _select(_func: Any, x: TokenTensor, dim: int, index: int) -> Any:
    dim = positive_dim(dim, x.ndim)
    if dim == x.shard_dim:
        return NotImplemented
    return x.wrap_view(x.local.select(dim, index), _without_dim(x.stride(), dim), x.shard_dim - (dim < x.shard_dim))


@rule(aten.unbind)
def _unbind(_func: Any, x: TokenTensor, dim: int = 0) -> Any:
    dim = positive_dim(dim, x.ndim)
    if dim == x.shard_dim:
        return NotImplemented
    strides = _without_dim(x.stride(), dim)
    return [x.wrap_view(local, strides, x.shard_dim - (dim < x.shard_dim)) for local in x.local.unbind(dim)]


def _without_dim(strides: Sequence[int], dim: int) -> list[int]:
    return [stride for d, stride in enumerate(strides) if d != dim]


@rule(aten.split, aten.split_with_sizes, aten.unsafe_split)
def _split(func: Any, x: TokenTensor, size: Any, dim: int = 0) -> Any:
    dim = positive_dim(dim, x.ndim)
    if dim != x.shard_dim:
        return [x.wrap_view(local, x.stride()) for local in func(x.local, size, dim)]
    if isinstance(size, int):
        bounds = [*range(0, x.placement.size, size), x.placement.size] if x.placement.size else [0, 0]
    else:
        bounds = [0]
        for length in size:
            bounds.append(bounds[-1] + length)
    return [_narrow_sharded(x, start, stop) for start, stop in pairwise(bounds)]


@rule(aten.cat)
def _cat(_func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    tensors = [x for x in tensors if x.ndim > 1 or x.numel()] if len({x.ndim for x in tensors}) > 1 else tensors
    first = next((x for x in tensors if isinstance(x, TokenTensor)), None)
    if first is None:
        return NotImplemented
    dim = positive_dim(dim, first.ndim)
    if any(isinstance(x, TokenTensor) and x.shard_dim != first.shard_dim for x in tensors):
        return NotImplemented
    if dim != first.shard_dim:
        shards = [
            x.redistribute(first.placement).local
            if isinstance(x, TokenTensor)
            else first.shard_like(x, first.shard_dim)
            for x in tensors
        ]
        return first.wrap(torch.cat(shards, dim))
    # A replicated tensor (a text beside a sharded picture) is sharded: no two ranks may hold the same token.
    return concatenate([x if isinstance(x, TokenTensor) else _shard_evenly(x, dim, first) for x in tensors], dim)


def concatenate(tensors: Sequence[TokenTensor], dim: int) -> TokenTensor:
    """Tensors concatenated along the dim in which all are sharded."""
    placement = concatenated(tuple(x.placement for x in tensors))
    return tensors[0].wrap(torch.cat([x.local for x in tensors], dim), dim, placement)


def _shard_evenly(value: torch.Tensor, dim: int, like: TokenTensor) -> TokenTensor:
    """A replicated tensor, sharded over the ranks of another one."""
    placement = even_placement(value.shape[dim], like.axis.size)
    return TokenTensor(local_shard(value, dim, placement, like.axis), dim, placement, like.axis)


@rule(aten.stack)
def _stack(_func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    first = next((x for x in tensors if isinstance(x, TokenTensor)), None)
    if first is None or any(
        isinstance(x, TokenTensor) and (x.shard_dim, x.placement) != (first.shard_dim, first.placement) for x in tensors
    ):
        return NotImplemented
    dim = positive_dim(dim, first.ndim + 1)
    shards = [x.local if isinstance(x, TokenTensor) else first.shard_like(x, first.shard_dim) for x in tensors]
    return first.wrap(torch.stack(shards, dim), first.shard_dim + (dim <= first.shard_dim))


@rule(aten.repeat)
def _repeat(_func: Any, x: TokenTensor, repeats: Sequence[int]) -> Any:
    dim = x.shard_dim + len(repeats) - x.ndim
    return x.wrap(x.local.repeat(repeats), dim) if repeats[dim] == 1 else NotImplemented


@rule(aten.flip, aten.roll)
def _flip(func: Any, x: TokenTensor, *args: Any) -> Any:
    # roll without dims rolls the flattened tensor.
    dims = args[-1] if len(args) == 2 or func.overloadpacket is aten.flip else []
    if not dims or x.shard_dim in [positive_dim(dim, x.ndim) for dim in dims]:
        return NotImplemented
    return x.wrap(func(x.local, *args))


@rule(aten.view_as_complex)
def _view_as_complex(_func: Any, x: TokenTensor) -> Any:
    if x.shard_dim == x.ndim - 1:
        return NotImplemented
    # A shard with a dim of size 1 may have strides that this view refuses.
    *outer, last = x.local.stride()
    fits = last == 1 and not any(number % 2 for number in (*outer, x.local.storage_offset()))
    local = torch.view_as_complex(x.local if fits else x.local.contiguous())
    return x.wrap_view(local, [stride // 2 for stride in x.stride()[:-1]])


@rule(aten.view_as_real)
def _view_as_real(_func: Any, x: TokenTensor) -> Any:
    return x.wrap_view(torch.view_as_real(x.local), [*(2 * stride for stride in x.stride()), 1])


@rule(aten.detach, aten.alias, aten.lift_fresh)
def _alias(func: Any, x: Any) -> Any:
    return x.wrap_view(func(x.local), x.stride()) if isinstance(x, TokenTensor) else NotImplemented


@rule(aten.clone, aten._to_copy)
def _clone(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, TokenTensor):
        return NotImplemented
    if kwargs.get("memory_format") == torch.contiguous_format:
        return x.wrap(func(x.local, *args, **kwargs))
    kwargs.pop("memory_format", None)
    return x.wrap_pointwise(func(x.local, *args, **kwargs), x.shard_dim, [x])


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)
def _filled_like(func: Any, x: TokenTensor, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    return x.wrap(func(x.local, *args, **kwargs))


@rule(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def _new(func: Any, x: TokenTensor, *args: Any, **kwargs: Any) -> Any:
    return func(x.local, *args, **kwargs)


@rule(aten.index_select)
def _index_select(func: Any, x: Any, dim: int, index: Any) -> Any:
    if not isinstance(x, TokenTensor) or isinstance(index, TokenTensor) or positive_dim(dim, x.ndim) == x.shard_dim:
        return NotImplemented
    return x.wrap(func(x.local, dim, index))


@rule(aten.index)
def _index(func: Any, x: Any, indices: Sequence[Any]) -> Any:
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if not isinstance(x, TokenTensor) or len(given) != 1 or isinstance(given[0][1], TokenTensor):
        return NotImplemented
    dim, index = given[0]
    if index.dtype in (torch.bool, torch.uint8):
        if index.ndim != 1 or index.shape[0] != x.shape[dim]:
            return NotImplemented
        index = index.nonzero().flatten()
    if dim != x.shard_dim:
        return x.wrap(func(x.local, [*[None] * dim, index]), x.shard_dim + (index.ndim - 1) * (dim < x.shard_dim))
    indices_cpu, size = index.cpu(), x.placement.size
    if index.ndim != 1 or not len(indices_cpu) or not -size <= indices_cpu.min() <= indices_cpu.max() < size:
        return NotImplemented
    found = x.placement.select_indices(indices_cpu % size, x.axis.rank)
    if found is None:
        return NotImplemented
    placement, offsets = found
    return x.wrap(x.local.index_select(x.shard_dim, offsets.to(x.local.device)), placement=placement)
