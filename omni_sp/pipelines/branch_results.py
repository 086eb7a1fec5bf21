"""Results of calls that groups or ranks computed for all: how many, their shapes, and one exchange of their bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from omni_sp.collectives import all_gather, gather_ints
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.sharding.batch_rows import BatchRows, Item
from omni_sp.sharding.lazy import LazyTensor

_ALIGNMENT = 16  # bytes
_ERROR, _OTHER_SHAPES = 1, 2


@dataclass(frozen=True)
class Output:
    """What a call returns.

    Attributes:
        leaves: a `Shape` for each tensor, and what else there is as it is.
        spec: the structure that they are in.
        modules: the modules that computed it, as of `omni_sp.sharding.call_state.CallState`.
        rows: where the rows of its batch are, which groups may share; or why they may not; None without a batch.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    modules: tuple[Any, ...]
    rows: BatchRows | str | None = None


@dataclass(frozen=True)
class Shape:
    """How a tensor looks."""

    size: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor) -> Shape:
        """The shape of this tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.device)


@dataclass
class BranchCounts:
    """What the groups of the cfg axis shared.

    Attributes:
        steps: steps of schedulers that came after calls of a transformer.
        units: calls of transformers; of a call that groups shared by rows, its rows.
        rounds: how many of them came one after the other; the others ran at the same time.
        rows: how many of them were rows of a batch.
        reasons: why calls were computed by every group, or batches by one -> how many.
    """

    steps: int = 0
    units: int = 0
    rounds: int = 0
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def as_dict(self, size: int) -> dict[str, Any]:
        """The counts as plain values, with a "note" that says why ``size`` groups shared nothing, or None."""
        note = None
        if self.units and self.rounds == self.units:
            reason = "; ".join(self.reasons) or "a step calls the transformer once"
            note = f"cfg_parallel_size {size} found nothing to share: {reason}"
        return {**vars(self), "reasons": dict(self.reasons), "note": note}


@dataclass
class Result:
    """One call of a round.

    Attributes:
        lengths: how many rows of the batch each group computes; of a call that one group computes whole, 1 for it.
        lazies: what all groups get.
        places: for each tensor where its rows are, as of `BatchRows.outputs`; None where one group computes all. The
            groups have the rows in their order.
        reason: why one group computes a batch whole; empty where there is none, or it need not be shared.
        tensors: what this group computed.
        error: what its call raised.
    """

    lengths: Sequence[int]
    lazies: list[LazyTensor]
    places: Sequence[int | Item] | None = None
    reason: str = ""
    tensors: list[torch.Tensor] = field(default_factory=list)
    error: Exception | None = None

    def shapes(self, group: int) -> dict[int, tuple[int, ...]]:
        """The shapes of what a group computes, by the number of the tensor; none where it computes nothing."""
        shapes: dict[int, tuple[int, ...]] = {}
        start, length = sum(self.lengths[:group]), self.lengths[group]
        for index, x in enumerate(self.lazies if length else ()):
            place = None if self.places is None else self.places[index]
            if isinstance(place, int):
                shapes[index] = (*x.shape[:place], length, *x.shape[place + 1 :])
            elif place is None or start <= place.row < start + length:
                shapes[index] = tuple(x.shape)
        return shapes

    def num_bytes(self, group: int) -> int:
        """The bytes of what a group computes, in its message."""
        return sum(_num_bytes(shape, self.lazies[index].dtype) for index, shape in self.shapes(group).items())


def exchange_results(results: Sequence[Result], axis: Axis) -> None:
    """Give every lazy tensor its numbers, by one exchange of the bytes of all results. A collective call.

    Args:
        results: the same calls on all ranks, in the same order, which is that of each group's message.
        axis: the groups.

    Raises:
        ShardingError: a group raised an error (which is raised there), or its results look otherwise than before.
    """
    _require_all_well([result for result in results if result.lengths[axis.rank]], axis)
    exchange_bytes(results, axis)


def exchange_bytes(results: Sequence[Result], axis: Axis) -> None:
    """Give every lazy tensor its numbers, where it is known that all ranks have what they promised.

    Args:
        results: the same calls on all ranks, in the same order, with tensors on one device.
        axis: the groups, or the ranks.
    """
    own = [result for result in results if result.lengths[axis.rank]]
    sizes = [sum(result.num_bytes(group) for result in results) for group in range(axis.size)]
    device = results[0].lazies[0].device
    pending = all_gather(sizes, torch.uint8, device, axis)
    parts = [part for result in own for x in result.tensors for part in _bytes_of(x)]
    pending.fill(parts or [torch.empty(0, dtype=torch.uint8, device=device)])
    pending.start()
    received = pending.wait()
    starts = [sum(sizes[:group]) for group in range(axis.size)]
    for result in results:
        pieces: list[list[torch.Tensor]] = [[] for _ in result.lazies]
        for group in range(axis.size):
            for number, (index, shape) in enumerate(result.shapes(group).items()):
                lazy, begin = result.lazies[index], starts[group]
                starts[group] += _num_bytes(shape, lazy.dtype)
                # The group that has computed it keeps its own.
                piece = result.tensors[number] if group == axis.rank else _tensor_in(received, begin, shape, lazy)
                pieces[index].append(piece)
        for index, lazy in enumerate(result.lazies):
            place = None if result.places is None else result.places[index]
            lazy.receive(
                _with_strides(torch.cat(pieces[index], place), lazy.stride())
                if isinstance(place, int)
                else pieces[index][0]
            )


def _require_all_well(own: Sequence[Result], axis: Axis) -> None:
    per_group = gather_ints([max((_state(result, axis.rank) for result in own), default=0)], axis)
    if all(of_group == (0,) for of_group in per_group):
        return
    error = next((result.error for result in own if result.error is not None), None)
    if error is not None:
        raise error
    failed = [rank for rank, (state,) in zip(axis.ranks, per_group, strict=True) if state]
    is_error = any(state == _ERROR for (state,) in per_group)
    what = "raised an error in" if is_error else "got results of other shapes from"
    raise ShardingError(f"ranks {failed} {what} a transformer call that they compute for all", follows=is_error)


def _state(result: Result, group: int) -> int:
    """What to tell the other groups of an own result: 0 where all is well."""
    if result.error is not None:
        return _ERROR
    promised = [
        (shape, result.lazies[index].dtype, result.lazies[index].device)
        for index, shape in result.shapes(group).items()
    ]
    return 0 if [(tuple(x.shape), x.dtype, x.device) for x in result.tensors] == promised else _OTHER_SHAPES


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of a tensor in a message, where each begins at a multiple that suits every dtype."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(x: torch.Tensor) -> list[torch.Tensor]:
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    return [flat, flat.new_zeros(_num_bytes(x.shape, x.dtype) - flat.numel())]


def _tensor_in(received: torch.Tensor, begin: int, shape: Sequence[int], like: LazyTensor) -> torch.Tensor:
    dense = received[begin : begin + math.prod(shape) * like.dtype.itemsize].view(like.dtype).view(tuple(shape))
    return _with_strides(dense, like.stride()) if dense.shape == like.shape else dense


def _with_strides(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A tensor as the call returns it, of which the strides are seen."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
