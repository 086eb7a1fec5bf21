"""Which indices of one dim each rank holds: arithmetic that every rank does alike, so nobody has to ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from omni_sp.attention import split_evenly

Range = tuple[int, int]

_MAX_RANGES = 4096
"""A dim scattered over more spans than this is better gathered."""


@dataclass(frozen=True)
class Placement:
    """A dim of ``size`` indices, dealt out to ranks.

    Attributes:
        size: of the dim. held: for each rank the half-open spans that it holds, ascending. Together they cover the dim
            exactly once; a rank may hold none. In memory a rank's indices lie in this order.
    """

    size: int
    ranges_per_rank: tuple[tuple[Range, ...], ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of indices that each rank holds."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges_per_rank)

    @cached_property
    def in_rank_order(self) -> bool:
        """True where the ranks' pieces, one behind the other, are the whole."""
        ends = [span for ranges in self.ranges_per_rank for span in ranges]
        return all(before[1] == after[0] for before, after in pairwise(ends))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Looked up all the time, as a key of what was worked out before.
        return hash((self.size, self.ranges_per_rank))

    @lru_cache(maxsize=4096)  # noqa: B019 - bounded, and spans are few
    def narrow(self, start: int, stop: int) -> Placement:
        """The indices from ``start`` to ``stop``, counted from ``start``."""
        return _normalized(
            stop - start,
            [[(max(a, start) - start, min(b, stop) - start) for a, b in ranges] for ranges in self.ranges_per_rank],
        )

    def local_offset(self, rank: int, index: int) -> int:
        """How many of a rank's indices lie before ``index``: its offset in the rank's memory."""
        return sum(max(0, min(stop, index) - start) for start, stop in self.ranges_per_rank[rank])

    def select_indices(self, indices: torch.Tensor, rank: int) -> tuple[Placement, torch.Tensor] | None:
        """Who holds the picked indices, each staying where it is, and where in this rank's memory they lie.

        None where they lie in too many spans to be kept account of.
        """
        places = gather_order(self)[indices]
        ends = torch.tensor(self.lengths).cumsum(0)
        holders = torch.searchsorted(ends, places, right=True)
        if holders.numel() and int((holders[1:] != holders[:-1]).sum()) > _MAX_RANGES:
            return None
        runs = torch.unique_consecutive(holders, return_counts=True)
        ranges_per_rank: list[list[Range]] = [[] for _ in self.ranges_per_rank]
        start = 0
        for holder, count in zip(*(part.tolist() for part in runs), strict=True):
            ranges_per_rank[holder].append((start, start + count))
            start += count
        return _normalized(start, ranges_per_rank), places[holders == rank] - int(ends[rank]) + self.lengths[rank]

    def flatten_dims(self, outer: int, inner: int) -> Placement:
        """The dim flattened with ``outer`` indices before it and ``inner`` behind it."""
        return _normalized(
            outer * self.size * inner,
            [
                [
                    ((turn * self.size + a) * inner, (turn * self.size + b) * inner)
                    for turn in range(outer)
                    for a, b in s
                ]
                for s in self.ranges_per_rank
            ],
        )

    def unflatten_dims(self, outer: int, size: int, inner: int) -> Placement | None:
        """The inverse of :meth:`merged`; None where the pieces do not fit."""
        if outer * size * inner != self.size or any(
            x % inner for ranges in self.ranges_per_rank for span in ranges for x in span
        ):
            return None
        scaled = [[(a // inner, b // inner) for a, b in ranges] for ranges in self.ranges_per_rank]
        # A span may run over the end of a turn: cut it there.
        first = _normalized(size, [[(max(a, 0), min(b, size)) for a, b in ranges] for ranges in scaled])
        return first if first.flatten_dims(outer, inner) == self else None


def even_placement(size: int, num_ranks: int) -> Placement:
    """Shares that differ by at most one, in rank order."""
    return _evenly(size, num_ranks)


@lru_cache(maxsize=4096)
def _evenly(size: int, num_ranks: int) -> Placement:
    ranges, start = [], 0
    for length in split_evenly(size, num_ranks):
        ranges.append([(start, start + length)])
        start += length
    return _normalized(size, ranges)


@lru_cache(maxsize=4096)
def concatenated(parts: tuple[Placement, ...]) -> Placement:
    """Dims one behind the other."""
    ranges_per_rank: list[list[Range]] = [[] for _ in parts[0].ranges_per_rank]
    offset = 0
    for part in parts:
        for ranges, more in zip(ranges_per_rank, part.ranges_per_rank, strict=True):
            ranges += [(a + offset, b + offset) for a, b in more]
        offset += part.size
    return _normalized(offset, ranges_per_rank)


def _normalized(size: int, ranges_per_rank: Sequence[Sequence[Range]]) -> Placement:
    """Spans without empty ones, neighbours made one."""
    tidy = []
    for ranges in ranges_per_rank:
        mine: list[Range] = []
        for start, stop in ranges:
            if start >= stop:
                continue
            if mine and mine[-1][1] == start:
                start = mine.pop()[0]
            mine.append((start, stop))
        tidy.append(tuple(mine))
    return Placement(size, tuple(tidy))


@lru_cache(maxsize=256)
def gather_order(placement: Placement) -> torch.Tensor:
    """For each global index, where it lies when the ranks' pieces are put one behind the other."""
    places = torch.cat([torch.arange(a, b) for ranges in placement.ranges_per_rank for a, b in ranges])
    return torch.argsort(places)


def intersect(some: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """The indices in both, ascending."""
    both = [(max(a, c), min(b, d)) for a, b in some for c, d in others]
    return sorted((start, stop) for start, stop in both if start < stop)
