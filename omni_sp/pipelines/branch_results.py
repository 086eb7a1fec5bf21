"""Results of transformer calls that one group computed and all need: their shapes, and one exchange of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from omni_sp.collectives import all_gather, gather_ints
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
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
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    modules: int


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
class Result:
    """One call of a round.

    Attributes:
        owner: the group that computes it.
        lazies: what all groups get.
        tensors: what the owner computed; empty on other groups.
        error: what the owner's call raised.
    """

    owner: int
    lazies: list[LazyTensor]
    tensors: list[torch.Tensor] = field(default_factory=list)
    error: Exception | None = None


def exchange_results(results: Sequence[Result], axis: Axis) -> None:
    """Give every lazy tensor its numbers, by one exchange of the bytes of all results. A collective call.

    Args:
        results: the same calls on all ranks, in the same order, which is that of each group's message.
        axis: the groups.

    Raises:
        ShardingError: a group raised an error (which is raised there), or its results look otherwise than before.
    """
    own = [result for result in results if result.owner == axis.rank]
    _require_all_well(own, axis)
    sizes = [0] * axis.size
    for result in results:
        sizes[result.owner] += sum(map(_num_bytes, result.lazies))
    device = results[0].lazies[0].device
    pending = all_gather(sizes, torch.uint8, device, axis)
    parts = [part for result in own for x in result.tensors for part in _bytes_of(x)]
    pending.fill(parts or [torch.empty(0, dtype=torch.uint8, device=device)])
    pending.start()
    received = pending.wait()
    starts = [sum(sizes[:group]) for group in range(axis.size)]
    for result in results:
        for index, lazy in enumerate(result.lazies):
            begin = starts[result.owner]
            starts[result.owner] += _num_bytes(lazy)
            # The group that has computed it keeps its own.
            lazy.receive(result.tensors[index] if result.owner == axis.rank else _tensor_in(received, begin, lazy))


def _require_all_well(own: Sequence[Result], axis: Axis) -> None:
    per_group = gather_ints([max(map(_state, own), default=0)], axis)
    if all(of_group == (0,) for of_group in per_group):
        return
    error = next((result.error for result in own if result.error is not None), None)
    if error is not None:
        raise error
    failed = [rank for rank, (state,) in zip(axis.ranks, per_group, strict=True) if state]
    is_error = any(state == _ERROR for (state,) in per_group)
    what = "raised an error in" if is_error else "got results of other shapes from"
    raise ShardingError(f"ranks {failed} {what} a transformer call that they compute for all")


def _state(result: Result) -> int:
    """What to tell the other groups of an own result: 0 where all is well."""
    if result.error is not None:
        return _ERROR
    promised = [(x.shape, x.dtype, x.device) for x in result.lazies]
    return 0 if [(x.shape, x.dtype, x.device) for x in result.tensors] == promised else _OTHER_SHAPES


def _num_bytes(x: torch.Tensor) -> int:
    """The bytes of a tensor in a message, where each begins at a multiple that suits every dtype."""
    return -(-x.numel() * x.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(x: torch.Tensor) -> list[torch.Tensor]:
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    return [flat, flat.new_zeros(_num_bytes(x) - flat.numel())]


def _tensor_in(received: torch.Tensor, begin: int, like: LazyTensor) -> torch.Tensor:
    num_bytes = like.numel() * like.dtype.itemsize
    dense = received[begin : begin + num_bytes].view(like.dtype).view(like.shape)
    if dense.stride() == like.stride():
        return dense
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(dense)
