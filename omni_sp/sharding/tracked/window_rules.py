"""Rules for operators whose results depend on a window of rows: convolutions, poolings, and what shrinks a picture.

Rows are the indices of the sharded dim. Each rank computes a contiguous part of the result, and fetches the rows of
its neighbours that its windows reach. Who computes what, and who fetches what, follows from the lengths of all ranks; a
rank may have no row, before or after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from omni_sp.sharding.tracked.placement import Placement, Range, contiguous_placement, even_placement
from omni_sp.sharding.tracked.tensor import TokenTensor
from omni_sp.sharding.tracked.view_rules import rule

aten = torch.ops.aten

Run = Callable[[torch.Tensor, int], Any]
"""An operator on plain rows, with so many rows of its own padding at both ends."""


@dataclass(frozen=True)
class Window:
    """Which rows a row of the result depends on.

    Attributes:
        reach: the distance between the first and the last of them.
        stride: the distance between the windows of neighbouring results.
        padding: so many rows before the tensor the first window begins; there are as many behind it.
    """

    reach: int
    stride: int = 1
    padding: int = 0

    def rows(self, start: int, stop: int) -> Range:
        """The rows that the results from ``start`` to ``stop`` depend on; those outside the tensor are padding."""
        first = start * self.stride - self.padding
        return first, first + (stop - start - 1) * self.stride + self.reach + 1

    def num_results(self, size: int) -> int:
        """Rows of the result of so many rows."""
        return (size + 2 * self.padding - self.reach - 1) // self.stride + 1


@lru_cache(maxsize=4096)
def _results_of(placement: Placement, window: Window) -> Placement | None:
    """Which rank computes which results of contiguous rows: the middle of each window decides. None for no result."""
    size = window.num_results(placement.size)
    if size < 1 or placement.bounds is None:
        return None
    middle = window.reach // 2 - window.padding
    starts = [-((middle - bound) // window.stride) for bound in placement.bounds]
    return contiguous_between([min(max(start, 0), size) for start in starts], size)


def contiguous_between(bounds: Sequence[int], size: int) -> Placement:
    """Contiguous shards between these bounds, of which the first and the last are the dim's."""
    inner = [0, *bounds[1:-1], size]
    return contiguous_placement([stop - start for start, stop in pairwise(inner)])


def in_order(x: TokenTensor) -> TokenTensor:
    """The tensor in contiguous shards. A collective call where they were others, as all ranks know."""
    if x.placement.bounds is not None:
        return x
    return x.redistribute(even_placement(x.placement.size, x.axis.size))


def on_any_rows(run: Callable[[torch.Tensor], torch.Tensor], local: torch.Tensor, dim: int, num: int) -> torch.Tensor:
    """What an operator makes of rows; of none it would refuse to make anything, so it gets ``num`` of zeros instead."""
    if local.shape[dim]:
        return run(local)
    shape = [num if d == dim else size for d, size in enumerate(local.shape)]
    return run(local.new_zeros(shape)).narrow(dim, 0, 0)


class Rows:
    """This rank's rows, together with those of other ranks that it needs. Making it is a collective call.

    Args:
        x: in contiguous shards.
        needed: for each rank the rows that it needs; those outside the tensor are zeros.
    """

    def __init__(self, x: TokenTensor, needed: Sequence[Range]) -> None:
        size, me = x.placement.size, x.axis.rank
        self._dim, self._size, self._local = x.shard_dim, size, x.local
        within = [(max(start, 0), min(stop, size)) for start, stop in needed]
        missing = [_without(one, ranges) for one, ranges in zip(within, x.placement.ranges_per_rank, strict=True)]
        self._pieces = [(one, x.local) for one in x.placement.ranges_per_rank[me]]
        if any(missing):
            fetched = x.fetch_ranges(missing).split([stop - start for start, stop in missing[me]], x.shard_dim)
            self._pieces = sorted([*self._pieces, *zip(missing[me], fetched, strict=False)], key=lambda piece: piece[0])

    def between(self, start: int, stop: int) -> torch.Tensor:
        """The rows from ``start`` to ``stop``, zeros outside the tensor."""
        found = [] if start >= 0 else [self._zeros(min(0, stop) - start)]
        for (first, last), piece in self._pieces:
            a, b = max(first, start), min(last, stop)
            if a < b:
                found.append(piece.narrow(self._dim, a - first, b - a))
        if stop > self._size:
            found.append(self._zeros(stop - max(self._size, start)))
        if not found:
            return self._local.narrow(self._dim, 0, 0)
        return found[0] if len(found) == 1 else torch.cat(found, self._dim)

    def _zeros(self, num: int) -> torch.Tensor:
        return self._local.new_zeros([num if d == self._dim else size for d, size in enumerate(self._local.shape)])


def _without(one: Range, held: Sequence[Range]) -> list[Range]:
    """The parts of a range that a rank with at most one range does not hold."""
    start, stop = held[0] if held else (one[1], one[1])
    parts = [(one[0], min(one[1], start)), (max(one[0], stop), one[1])]
    return [part for part in parts if part[0] < part[1]]


def over_windows(x: TokenTensor, window: Window, run: Run, num_weights: int = 0) -> Any:
    """An operator whose results depend on windows of rows.

    Args:
        x: any tensor.
        window: which rows a result depends on.
        run: the operator.
        num_weights: numbers that it would read once more for every further call.

    Returns:
        The result; NotImplemented where it has no row.
    """
    x = in_order(x)
    results = _results_of(x.placement, window)
    if results is None or results.bounds is None:
        return NotImplemented
    parts = list(pairwise(results.bounds))
    rows = Rows(x, [window.rows(*part) if part[0] < part[1] else (0, 0) for part in parts])
    start, stop = parts[x.axis.rank]
    if start == stop:
        local = on_any_rows(
            lambda zeros: run(zeros, 0), x.local.narrow(x.shard_dim, 0, 0), x.shard_dim, window.reach + 1
        )
        return x.wrap(local, placement=results)
    return x.wrap(_local_results(x, window, run, rows, (start, stop), num_weights), placement=results)


def _local_results(
    x: TokenTensor, window: Window, run: Run, rows: Rows, results: Range, num_weights: int
) -> torch.Tensor:
    """This rank's results, of which there are some.

    Its rows are not copied together with those of its neighbours, which would take as much memory again: the few
    results that depend on these are computed apart, unless that costs more time than the copy.
    """
    (start, stop), stride, padding = results, window.stride, window.padding
    ranges = x.placement.ranges_per_rank[x.axis.rank]
    first, last = ranges[0] if ranges else (0, 0)

    def of_rows(start: int, stop: int) -> torch.Tensor:
        found: torch.Tensor = run(rows.between(*window.rows(start, stop)), 0)
        return found

    # The results of this rank's rows alone.
    inner_start = max(start, -((-first - padding) // stride))
    inner_stop = min(stop, (last - 1 - window.reach + padding) // stride + 1)
    if 2 * (inner_stop - inner_start) < stop - start or x.local.numel() < 4 * num_weights:
        return of_rows(start, stop)
    if first == start * stride and window.num_results(last - first) == stop - start:
        # With the operator's own padding all results have their places, and those at the borders are replaced.
        local: torch.Tensor = run(x.local, padding)
        borders = ((start, inner_start if first else start), (inner_stop if last < x.placement.size else stop, stop))
        for a, b in borders:
            if a < b:
                local.narrow(x.shard_dim, a - start, b - a).copy_(of_rows(a, b))
        return local
    if stride == 1:
        return of_rows(start, stop)
    first_row, last_row = window.rows(inner_start, inner_stop)
    # Where windows overlap, rows behind the last one do not matter; to leave them out would copy the others.
    inner = run(rows.between(first_row, last_row if window.reach < stride else last), 0)
    borders = ((start, inner_start), (inner_stop, stop))
    front, back = ([of_rows(a, b)] if a < b else [] for a, b in borders)
    return torch.cat([*front, inner, *back], x.shard_dim)


@rule(aten.convolution)
def _convolution(func: Any, x: Any, weight: Any, bias: Any, *options: Any) -> Any:
    stride, padding, dilation, transposed, output_padding, groups = options
    if not isinstance(x, TokenTensor) or isinstance(weight, TokenTensor) or isinstance(bias, TokenTensor):
        return NotImplemented
    if x.shard_dim == 0:
        return x.wrap(on_any_rows(lambda rows: func(rows, weight, bias, *options), x.local, 0, 1))
    if x.shard_dim == 1:
        return NotImplemented
    d = x.shard_dim - 2

    def run(rows: torch.Tensor, num_padded: int) -> Any:
        inner, extra = list(padding), list(output_padding)
        inner[d], extra[d] = num_padded, 0
        return func(rows, weight, bias, stride, inner, dilation, transposed, extra, groups)

    window = Window(dilation[d] * (weight.shape[x.shard_dim] - 1), stride[d], padding[d])
    if transposed:
        return _transposed_convolution(x, window, output_padding[d], run)
    return over_windows(x, window, run, weight.numel())


def _transposed_convolution(x: TokenTensor, window: Window, extra: int, run: Run) -> Any:
    """Each row spreads over ``reach + 1`` rows of the result, ``stride`` further for every row."""
    x = in_order(x)
    reach, stride, padding, dim = window.reach, window.stride, window.padding, x.shard_dim
    size = (x.placement.size - 1) * stride - 2 * padding + reach + extra + 1
    if size < 1 or stride > reach + 1 or x.placement.bounds is None:
        return NotImplemented
    middle = (reach + 1 - stride) // 2 - padding
    bounds = [0 if b == 0 else size if b == x.placement.size else b * stride + middle for b in x.placement.bounds]
    results = contiguous_between([min(max(bound, 0), size) for bound in bounds], size)
    assert results.bounds is not None
    # From the first row that spreads to the first result, to the last that spreads to the last one.
    needed = [
        (-((reach - padding - start) // stride), (stop - 1 + padding) // stride + 1) if start < stop else (0, 0)
        for start, stop in pairwise(results.bounds)
    ]
    rows = Rows(x, needed)
    first, last = needed[x.axis.rank]
    start, stop = results.bounds[x.axis.rank : x.axis.rank + 2]
    spread = on_any_rows(lambda part: run(part, 0), rows.between(first, last), dim, 1)
    offset = start - (first * stride - padding) if start < stop else 0
    return x.wrap(spread.narrow(dim, offset, stop - start), placement=results)


_POOLED_DIMS = {aten.avg_pool2d: 2, aten.avg_pool3d: 3}


@rule(*_POOLED_DIMS)
def _avg_pool(
    func: Any,
    x: TokenTensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *others: Any,
) -> Any:
    num_dims = _POOLED_DIMS[func.overloadpacket]
    kernel, stride, padding = (
        list(one) * (num_dims if len(one) == 1 else 1) for one in (kernel, stride or kernel, padding)
    )
    d = x.shard_dim - (x.ndim - num_dims)

    def run(rows: torch.Tensor, num_padded: int) -> Any:
        inner = [num_padded if i == d else amount for i, amount in enumerate(padding)]
        return func(rows, kernel, stride, inner, ceil_mode, count_include_pad, *others)

    if d < 0:
        return x.wrap(on_any_rows(lambda rows: run(rows, 0), x.local, x.shard_dim, 1))
    if ceil_mode or (padding[d] and not count_include_pad):
        return NotImplemented
    return over_windows(x, Window(kernel[d] - 1, stride[d], padding[d]), run)
