"""Who holds which tokens, and who computes which heads: arithmetic, never asked for in steady state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from omni_sp.errors import UnsupportedAttentionError


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Cut ``total`` into ``parts`` shares that differ by at most one, larger first (``torch.tensor_split``'s)."""
    base, surplus = divmod(total, parts)
    return tuple(base + (index < surplus) for index in range(parts))


@dataclass(frozen=True)
class SequenceLayout:
    """How many tokens of one attention each rank of the sequence axis (ring-major) holds.

    Attributes:
        query: query tokens of each rank. key: key/value tokens of each rank. Zeros are fine.

    Ranks hold consecutive pieces in rank order; only causal attention depends on that order.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]


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
def head_shares(num_heads: int, num_kv_heads: int, degree: int) -> tuple[HeadShare, ...]:
    """Give each of ``degree`` ranks its query heads, and the key/value heads that they need.

    Raises:
        UnsupportedAttentionError: the query heads are no multiple of the key/value heads.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UnsupportedAttentionError(
            f"{num_heads} query heads over {num_kv_heads} key/value heads: grouped-query attention needs "
            "query heads = n × key/value heads"
        )
    group = num_heads // num_kv_heads
    result = []
    start = 0
    for count in shares(num_heads, degree):
        stop = start + count
        first, last = start // group, (stop - 1) // group + 1
        if count == 0:
            result.append(HeadShare((start, start), (first, first), None))
            continue
        of_query = tuple(head // group - first for head in range(start, stop))
        run = count // (last - first)
        even = of_query == tuple(index // run for index in range(count))
        result.append(HeadShare((start, stop), (first, last), None if even else of_query))
        start = stop
    return tuple(result)
