"""Rules for tensors that are one row of a batch, which one rank holds: a batch that is a list is followed by them.

They hold only where rows of a batch are followed, see `omni_sp.sharding.batch_rows`: elsewhere what one rank holds
alone is better gathered, since the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_sp.mesh import Axis
from omni_sp.sharding.forward_context import current_forward
from omni_sp.sharding.tracked.placement import Placement, concatenated, contiguous_placement, even_placement
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, OPERATOR_RULES, TokenTensor
from omni_sp.sharding.tracked.view_rules import positive_dim

aten = torch.ops.aten
_views = {operator: OPERATOR_RULES[operator] for operator in (aten.select, aten.unbind, aten.repeat)}


def held_by(rank: int, size: int, axis: Axis) -> Placement:
    """The placement of a dim that one rank holds whole."""
    return contiguous_placement([size if index == rank else 0 for index in range(axis.size)])


def _are_rows_followed() -> bool:
    forward = current_forward()
    return forward is not None and not forward.splits_tokens


def _select(func: Any, x: TokenTensor, dim: int, index: int) -> Any:
    """A row of a batch."""
    if positive_dim(dim, x.ndim) != x.shard_dim or not _are_rows_followed() or x.ndim < 2:
        return _views[aten.select](func, x, dim, index)
    index, me, held = index % x.placement.size, x.axis.rank, max(x.ndim - 3, 0)
    owner = next(
        rank for rank, ranges in enumerate(x.placement.ranges_per_rank) if any(a <= index < b for a, b in ranges)
    )
    strides = [stride for d, stride in enumerate(x.stride()) if d != x.shard_dim]
    shape = [size for d, size in enumerate(x.shape) if d != x.shard_dim]
    if me == owner:
        local = x.local.select(x.shard_dim, x.placement.local_offset(me, index))
    else:
        local = x.local.new_empty([0 if d == held else size for d, size in enumerate(shape)])
    return x.wrap_view(local, strides, held, held_by(owner, shape[held], x.axis))


def _unbind(func: Any, x: TokenTensor, dim: int = 0) -> Any:
    if positive_dim(dim, x.ndim) != x.shard_dim or not _are_rows_followed():
        return _views[aten.unbind](func, x, dim)
    return [torch.select(x, dim, index) for index in range(x.placement.size)]


def _repeat(func: Any, x: TokenTensor, repeats: Sequence[int]) -> Any:
    dim = x.shard_dim + len(repeats) - x.ndim
    if repeats[dim] < 1 or not _are_rows_followed():
        return _views[aten.repeat](func, x, repeats)
    return x.wrap(x.local.repeat(repeats), dim, concatenated((x.placement,) * repeats[dim]))


OPERATOR_RULES.update({aten.select: _select, aten.unbind: _unbind, aten.repeat: _repeat})


def _pad_sequence(
    sequences: Sequence[Any], batch_first: bool = False, padding_value: float = 0.0, padding_side: Any = "right"
) -> Any:
    """Rows of different lengths as one batch, each of which stays where it is."""
    first = next((x for x in sequences if isinstance(x, TokenTensor)), None)
    if first is None or not _are_rows_followed() or not batch_first or len(sequences) != first.axis.size:
        return NotImplemented
    for row, x in enumerate(sequences):
        if not isinstance(x, TokenTensor) or x.shard_dim or x.placement != held_by(row, len(x), first.axis):
            return NotImplemented
    longest, own = max(map(len, sequences)), sequences[first.axis.rank].local
    batch = torch._C._nn.pad_sequence([own, own.new_empty(longest, *own.shape[1:])], True, padding_value, padding_side)
    return first.wrap(batch[:1], 0, even_placement(first.axis.size, first.axis.size))


FUNCTION_RULES[torch._C._nn.pad_sequence] = _pad_sequence
