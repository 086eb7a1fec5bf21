"""Who holds which tokens, and who computes which heads: arithmetic, never asked for in steady state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from omni_sp.errors import UnsupportedAttentionError


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Cut ``total`` into ``parts`` shares that differ by at most one, larger first (``torch.tensor_split``'s)."""
    base, surplus = divmod(total, parts)
    return tuple(base + (index < surplus) for index in range(parts))


@dataclass(frozen=True)
class SequenceLayout:
    """How many tokens of one attention each rank of the sequence axis (ring-major) holds.

    Attributes:
        query: query tokens of each rank. key: key/value tokens of each rank. Zeros are fine.
        fronts: None where ranks hold consecutive pieces in rank order. Zigzag: for each ring rank, how many tokens of
            its row belong to its first chunk.

    Only causal attention depends on the order of tokens. Consecutive pieces leave the first ring rank with almost
    nothing to do and the last with everything. Zigzag cuts the row into 2 × ring chunks and gives ring rank r chunk r
    and chunk 2 × ring - 1 - r, so that all have the same work.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    front_lengths: tuple[int, ...] | None = None

    @classmethod
    def zigzag(cls, total: int, *, ring: int, ulysses: int) -> SequenceLayout:
        """The balanced layout of ``total`` tokens for causal attention on ring × ulysses ranks."""
        chunks = split_evenly(total, 2 * ring)
        rows = [chunks[r] + chunks[2 * ring - 1 - r] for r in range(ring)]
        held = tuple(piece for row in rows for piece in split_evenly(row, ulysses))
        return cls(held, held, chunks[:ring])

    def positions(self, rank: int) -> tuple[int, ...]:
        """The global positions of the tokens that a rank holds, for cutting a row (queries and keys alike)."""
        if self.front_lengths is None:
            start = sum(self.query[:rank])
            return tuple(range(start, start + self.query[rank]))
        ring = len(self.front_lengths)
        ulysses = len(self.query) // ring
        row = rank // ulysses
        rows = [sum(self.query[r * ulysses : (r + 1) * ulysses]) for r in range(ring)]
        front_lengths, backs = (
            self.front_lengths,
            [total - front for total, front in zip(rows, self.front_lengths, strict=True)],
        )
        first = sum(front_lengths[:row])
        second = sum(front_lengths) + sum(backs[row + 1 :])
        held = [*range(first, first + front_lengths[row]), *range(second, second + backs[row])]
        start = sum(self.query[row * ulysses : rank])
        return tuple(held[start : start + self.query[rank]])


@dataclass(frozen=True)
class CausalRegion:
    """What of one block of keys a ring rank attends to: queries from ``query_start`` on, keys up to ``key_stop``.

    ``is_causal``: within that part each query sees only what lies before it; otherwise all of it.
    """

    query_start: int
    key_stop: int | None
    is_causal: bool


def causal_region(front_lengths: tuple[int, ...] | None, rank: int, origin: int) -> CausalRegion | None:
    """The part of the block of ring rank ``origin`` that causality lets ``rank`` see; None where there is none."""
    if origin == rank:
        return CausalRegion(0, None, True)
    if front_lengths is None:
        return CausalRegion(0, None, False) if origin < rank else None
    # An earlier rank's second chunk lies behind all that this one holds; of a later rank's block only this one's second
    # chunk sees anything, and that all of it.
    return (
        CausalRegion(0, front_lengths[origin], False)
        if origin < rank
        else CausalRegion(front_lengths[rank], None, False)
    )


@dataclass(frozen=True)
class HeadShare:
    """The attention heads that one Ulysses rank computes.

    Attributes:
        query: (start, stop) of its query heads. key: (start, stop) of the key/value heads those use; shares of
            neighbours overlap where a key/value head serves query heads on both.
        key_of_query: for each of its query heads the index of its key/value head, counted from ``key[0]``; None where
            they form equal runs, which is what a kernel with grouped-query attention takes as it is.
    """

    query: tuple[int, int]
    key: tuple[int, int]
    key_of_query: tuple[int, ...] | None

    @property
    def num_query(self) -> int:
        """Number of query heads."""
        return self.query[1] - self.query[0]

    @property
    def num_key(self) -> int:
        """Number of key/value heads."""
        return self.key[1] - self.key[0]


@lru_cache(maxsize=256)
def head_shares(num_heads: int, num_kv_heads: int, degree: int, groups: int = 1) -> tuple[tuple[HeadShare, ...], ...]:
    """Give each of ``degree`` ranks its query heads, and the key/value heads that they need.

    Args:
        groups: into how many runs of heads each rank's share is cut, for exchanging one while another is computed.

    Returns:
        For each group, each rank's heads.

    Raises:
        UnsupportedAttentionError: the query heads are no multiple of the key/value heads.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UnsupportedAttentionError(
            f"{num_heads} query heads over {num_kv_heads} key/value heads: grouped-query attention needs "
            "query heads = n × key/value heads"
        )
    repeats = num_heads // num_kv_heads
    result: list[list[HeadShare]] = [[] for _ in range(groups)]
    start = 0
    for count in split_evenly(num_heads, degree):
        for group, part in zip(result, split_evenly(count, groups), strict=True):
            group.append(_head_share(start, start + part, repeats))
            start += part
    return tuple(tuple(group) for group in result)


def _head_share(start: int, stop: int, repeats: int) -> HeadShare:
    """The query heads from ``start`` to ``stop``, each key/value head serving ``repeats`` of them."""
    if start == stop:
        return HeadShare((start, start), (start // repeats, start // repeats), None)
    first, last = start // repeats, (stop - 1) // repeats + 1
    of_query = tuple(head // repeats - first for head in range(start, stop))
    run = (stop - start) // (last - first)
    even = of_query == tuple(index // run for index in range(stop - start))
    return HeadShare((start, stop), (first, last), None if even else of_query)
