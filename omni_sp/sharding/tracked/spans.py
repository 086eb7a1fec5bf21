"""Which indices of one dim each rank holds: arithmetic that every rank does alike, so nobody has to ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from omni_sp.attention import shares

Span = tuple[int, int]

_MOST_SPANS = 4096
"""A dim scattered over more spans than this is better gathered."""


@dataclass(frozen=True)
class Spans:
    """A dim of ``size`` indices, dealt out to ranks.

    Attributes:
        size: of the dim. held: for each rank the half-open spans that it holds, ascending. Together they cover the dim
            exactly once; a rank may hold none. In memory a rank's indices lie in this order.
    """

    size: int
    held: tuple[tuple[Span, ...], ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of indices that each rank holds."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.held)

    @cached_property
    def in_rank_order(self) -> bool:
        """True where the ranks' pieces, one behind the other, are the whole."""
        ends = [span for spans in self.held for span in spans]
        return all(before[1] == after[0] for before, after in pairwise(ends))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Looked up all the time, as a key of what was worked out before.
        return hash((self.size, self.held))

    @lru_cache(maxsize=4096)  # noqa: B019 - bounded, and spans are few
    def narrowed(self, start: int, stop: int) -> Spans:
        """The indices from ``start`` to ``stop``, counted from ``start``."""
        return _dealt(
            stop - start,
            [[(max(a, start) - start, min(b, stop) - start) for a, b in spans] for spans in self.held],
        )

    def before(self, rank: int, index: int) -> int:
        """How many of a rank's indices lie before ``index``: its offset in the rank's memory."""
        return sum(max(0, min(stop, index) - start) for start, stop in self.held[rank])

    def picked(self, indices: torch.Tensor, rank: int) -> tuple[Spans, torch.Tensor] | None:
        """Who holds the picked indices, each staying where it is, and where in this rank's memory they lie.

        None where they lie in too many spans to be kept account of.
        """
        places = order_of(self)[indices]
        ends = torch.tensor(self.lengths).cumsum(0)
        holders = torch.searchsorted(ends, places, right=True)
        if holders.numel() and int((holders[1:] != holders[:-1]).sum()) > _MOST_SPANS:
            return None
        runs = torch.unique_consecutive(holders, return_counts=True)
        held: list[list[Span]] = [[] for _ in self.held]
        start = 0
        for holder, count in zip(*(part.tolist() for part in runs), strict=True):
            held[holder].append((start, start + count))
            start += count
        return _dealt(start, held), places[holders == rank] - int(ends[rank]) + self.lengths[rank]

    def merged(self, outer: int, inner: int) -> Spans:
        """The dim flattened with ``outer`` indices before it and ``inner`` behind it."""
        return _dealt(
            outer * self.size * inner,
            [
                [
                    ((turn * self.size + a) * inner, (turn * self.size + b) * inner)
                    for turn in range(outer)
                    for a, b in s
                ]
                for s in self.held
            ],
        )

    def unmerged(self, outer: int, size: int, inner: int) -> Spans | None:
        """The inverse of :meth:`merged`; None where the pieces do not fit."""
        if outer * size * inner != self.size or any(x % inner for spans in self.held for span in spans for x in span):
            return None
        scaled = [[(a // inner, b // inner) for a, b in spans] for spans in self.held]
        # A span may run over the end of a turn: cut it there.
        first = _dealt(size, [[(max(a, 0), min(b, size)) for a, b in spans] for spans in scaled])
        return first if first.merged(outer, inner) == self else None


def dealt_evenly(size: int, num_ranks: int) -> Spans:
    """Shares that differ by at most one, in rank order."""
    return _evenly(size, num_ranks)


@lru_cache(maxsize=4096)
def _evenly(size: int, num_ranks: int) -> Spans:
    spans, start = [], 0
    for length in shares(size, num_ranks):
        spans.append([(start, start + length)])
        start += length
    return _dealt(size, spans)


@lru_cache(maxsize=4096)
def joined(parts: tuple[Spans, ...]) -> Spans:
    """Dims one behind the other."""
    held: list[list[Span]] = [[] for _ in parts[0].held]
    offset = 0
    for part in parts:
        for spans, more in zip(held, part.held, strict=True):
            spans += [(a + offset, b + offset) for a, b in more]
        offset += part.size
    return _dealt(offset, held)


def _dealt(size: int, held: Sequence[Sequence[Span]]) -> Spans:
    """Spans without empty ones, neighbours made one."""
    tidy = []
    for spans in held:
        mine: list[Span] = []
        for start, stop in spans:
            if start >= stop:
                continue
            if mine and mine[-1][1] == start:
                start = mine.pop()[0]
            mine.append((start, stop))
        tidy.append(tuple(mine))
    return Spans(size, tuple(tidy))


@lru_cache(maxsize=256)
def order_of(spans: Spans) -> torch.Tensor:
    """For each global index, where it lies when the ranks' pieces are put one behind the other."""
    places = torch.cat([torch.arange(a, b) for held in spans.held for a, b in held])
    return torch.argsort(places)


def common(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The indices in both, ascending."""
    both = [(max(a, c), min(b, d)) for a, b in some for c, d in others]
    return sorted((start, stop) for start, stop in both if start < stop)
