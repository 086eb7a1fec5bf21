"""Which indices of one dim each rank holds: arithmetic that every rank does alike, without any exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch

from omni_sp.attention import split_evenly
from omni_sp.mesh import Axis
from omni_sp.sharding.tracked.recording import as_constant

Range = tuple[int, int]
"""Half open: the first index, and the index behind the last."""

_MAX_RANGES = 4096
"""A dim scattered over more ranges than this is better gathered."""


@dataclass(frozen=True)
class Placement:
    """How the indices of a dim are distributed over ranks.

    Attributes:
        ranges_per_rank: for each rank the ranges that it holds, ascending. Together they cover the dim exactly once; a
            rank may hold none. In memory a rank's indices lie in this order.
    """

    size: int
    ranges_per_rank: tuple[tuple[Range, ...], ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of indices that each rank holds."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges_per_rank)

    @cached_property
    def in_rank_order(self) -> bool:
        """True where the ranks' shards, concatenated in rank order, are the full tensor."""
        in_memory = [one for ranges in self.ranges_per_rank for one in ranges]
        return all(before[1] == after[0] for before, after in pairwise(in_memory))

    @cached_property
    def bounds(self) -> tuple[int, ...] | None:
        """Where each rank's shard begins, and the end; None where shards are not one range each, in rank order."""
        if not self.in_rank_order or any(len(ranges) > 1 for ranges in self.ranges_per_rank):
            return None
        return (0, *accumulate(self.lengths))

    def scale(self, factor: int) -> Placement:
        """The placement of a dim that has so many indices for each index of this one."""
        return Placement(
            self.size * factor,
            tuple(tuple((a * factor, b * factor) for a, b in ranges) for ranges in self.ranges_per_rank),
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Placements are keys of caches that are looked up all the time.
        return hash((self.size, self.ranges_per_rank))

    @lru_cache(maxsize=4096)  # noqa: B019 - bounded, and placements are few
    def narrow(self, start: int, stop: int) -> Placement:
        """The indices from ``start`` to ``stop``, counted from ``start``."""
        return _normalized(
            stop - start,
            [[(max(a, start) - start, min(b, stop) - start) for a, b in ranges] for ranges in self.ranges_per_rank],
        )

    def local_offset(self, rank: int, index: int) -> int:
        """How many of a rank's indices lie before ``index``: the offset of ``index`` in the rank's memory."""
        return sum(max(0, min(stop, index) - start) for start, stop in self.ranges_per_rank[rank])

    def select_indices(self, indices: torch.Tensor, rank: int) -> tuple[Placement, torch.Tensor] | None:
        """The placement of selected indices, in any order, each of which stays on its rank.

        The offsets of those that ``rank`` holds in its memory come with it; None where there would be too many ranges.
        """
        positions = gather_order(self)[indices]
        ends = torch.tensor(self.lengths).cumsum(0)
        owners = torch.searchsorted(ends, positions, right=True)
        if owners.numel() and int((owners[1:] != owners[:-1]).sum()) > _MAX_RANGES:
            return None
        runs, counts = torch.unique_consecutive(owners, return_counts=True)
        ranges_per_rank: list[list[Range]] = [[] for _ in self.ranges_per_rank]
        start = 0
        for owner, count in zip(runs.tolist(), counts.tolist(), strict=True):
            ranges_per_rank[owner].append((start, start + count))
            start += count
        return _normalized(start, ranges_per_rank), positions[owners == rank] - int(ends[rank]) + self.lengths[rank]

    def flatten_dims(self, outer: int, inner: int) -> Placement:
        """The placement of the dim flattened with dims of ``outer`` indices before it and ``inner`` behind it."""
        starts = [i * self.size for i in range(outer)]
        return _normalized(
            outer * self.size * inner,
            [
                [((start + a) * inner, (start + b) * inner) for start in starts for a, b in ranges]
                for ranges in self.ranges_per_rank
            ],
        )

    def unflatten_dims(self, outer: int, size: int, inner: int) -> Placement | None:
        """The inverse of `flatten_dims`; None where the shards do not fit these dims."""
        if outer * size * inner != self.size or any(
            bound % inner for ranges in self.ranges_per_rank for one in ranges for bound in one
        ):
            return None
        scaled = [[(a // inner, b // inner) for a, b in ranges] for ranges in self.ranges_per_rank]
        # A range may go beyond the first of the outer indices: only what lies below it is taken.
        first = _normalized(size, [[(max(a, 0), min(b, size)) for a, b in ranges] for ranges in scaled])
        return first if first.flatten_dims(outer, inner) == self else None


@lru_cache(maxsize=4096)
def even_placement(size: int, num_ranks: int) -> Placement:
    """Contiguous shards in rank order, whose lengths differ by at most one."""
    return contiguous_placement(split_evenly(size, num_ranks))


def contiguous_placement(lengths: Sequence[int]) -> Placement:
    """Contiguous shards in rank order, of these lengths."""
    bounds = (0, *accumulate(lengths))
    return _normalized(bounds[-1], [[one] for one in pairwise(bounds)])


@lru_cache(maxsize=4096)
def concatenated(placements: tuple[Placement, ...]) -> Placement:
    """The placement of dims that are concatenated."""
    ranges_per_rank: list[list[Range]] = [[] for _ in placements[0].ranges_per_rank]
    offset = 0
    for placement in placements:
        for ranges, more in zip(ranges_per_rank, placement.ranges_per_rank, strict=True):
            ranges += [(a + offset, b + offset) for a, b in more]
        offset += placement.size
    return _normalized(offset, ranges_per_rank)


def _normalized(size: int, ranges_per_rank: Sequence[Sequence[Range]]) -> Placement:
    """A placement without empty ranges, in which adjacent ranges are one."""
    normalized = []
    for ranges in ranges_per_rank:
        merged: list[Range] = []
        for start, stop in ranges:
            if start >= stop:
                continue
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, stop))
        normalized.append(tuple(merged))
    return Placement(size, tuple(normalized))


@lru_cache(maxsize=256)
def gather_order(placement: Placement) -> torch.Tensor:
    """For each global index its position in the ranks' shards, concatenated in rank order."""
    indices = torch.cat([torch.arange(a, b) for ranges in placement.ranges_per_rank for a, b in ranges])
    return as_constant(torch.argsort(indices))


def intersect(some: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """The indices in both, ascending."""
    both = [(max(a, c), min(b, d)) for a, b in some for c, d in others]
    return sorted((start, stop) for start, stop in both if start < stop)


def local_shard(value: torch.Tensor, dim: int, placement: Placement, axis: Axis) -> torch.Tensor:
    """This rank's shard of a replicated tensor.

    Raises:
        RuntimeError: the dim has another size. One process would raise too; here some ranks could go on without it.
    """
    if value.shape[dim] != placement.size:
        raise RuntimeError(f"dim {dim} of a tensor {tuple(value.shape)} must have the size {placement.size}")
    ranges = placement.ranges_per_rank[axis.rank]
    if len(ranges) == 1:
        return value.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    if not ranges:
        return value.narrow(dim, 0, 0)
    return torch.cat([value.narrow(dim, start, stop - start) for start, stop in ranges], dim=dim)
