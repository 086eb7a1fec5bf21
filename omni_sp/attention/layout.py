"""Which rank holds which tokens and computes which heads: plain arithmetic, so that ranks need not ask each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from omni_sp.errors import UnsupportedAttentionError


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Split a number into shares that differ by at most one, larger ones first, as ``torch.tensor_split`` does.

    Args:
        total: the number, for example of tokens or heads.
        parts: how many shares.
    """
    base, surplus = divmod(total, parts)
    return tuple(base + (index < surplus) for index in range(parts))


@dataclass(frozen=True)
class SequenceLayout:
    """How many tokens of one attention each rank of the sequence axis (ring-major) holds.

    Attributes:
        query: number of query tokens of each rank; zeros are fine.
        key: number of key/value tokens of each rank; zeros are fine.
        front_lengths: None where ranks hold consecutive tokens in rank order. Under zigzag: for each ring rank, how
            many tokens its first chunk has.

    Only causal attention depends on the order of tokens. Where ranks hold consecutive tokens, the first ring rank has
    almost nothing to compute and the last has the most: the imbalance that Striped Attention (arXiv 2311.09431) removes
    by giving tokens to ranks in turn. Zigzag removes it with two chunks a rank: the sequence has 2 × ring chunks, and
    ring rank r holds chunk r and chunk 2 × ring - 1 - r, so that all ring ranks have the same work.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    front_lengths: tuple[int, ...] | None = None

    @classmethod
    def zigzag(cls, total: int, *, ring: int, ulysses: int) -> SequenceLayout:
        """The balanced layout for causal attention.

        Args:
            total: number of tokens of the whole sequence.
            ring: the ring degree.
            ulysses: the Ulysses degree.
        """
        chunks = split_evenly(total, 2 * ring)
        per_group = [chunks[r] + chunks[2 * ring - 1 - r] for r in range(ring)]
        lengths = tuple(length for tokens in per_group for length in split_evenly(tokens, ulysses))
        return cls(lengths, lengths, chunks[:ring])

    def positions(self, rank: int) -> tuple[int, ...]:
        """The positions in the whole sequence of the tokens that a rank holds.

        Args:
            rank: index along the sequence axis.

        Returns:
            One position for each of its query tokens. Under zigzag, keys have the same positions.
        """
        if self.front_lengths is None:
            start = sum(self.query[:rank])
            return tuple(range(start, start + self.query[rank]))
        ring = len(self.front_lengths)
        ulysses = len(self.query) // ring
        ring_rank = rank // ulysses
        per_group = [sum(self.query[r * ulysses : (r + 1) * ulysses]) for r in range(ring)]
        back_lengths = [tokens - front for tokens, front in zip(per_group, self.front_lengths, strict=True)]
        front = sum(self.front_lengths[:ring_rank])
        back = sum(self.front_lengths) + sum(back_lengths[ring_rank + 1 :])
        of_group = [*range(front, front + self.front_lengths[ring_rank]), *range(back, back + back_lengths[ring_rank])]
        start = sum(self.query[ring_rank * ulysses : rank])
        return tuple(of_group[start : start + self.query[rank]])


@dataclass(frozen=True)
class CausalRegion:
    """Which queries of a ring rank attend to which keys of one block.

    Attributes:
        query_start: the queries from this one on attend.
        key_stop: they attend to the keys before this one; None for all keys.
        is_causal: each query attends to its own token and to earlier ones only; else to all these keys.
    """

    query_start: int
    key_stop: int | None
    is_causal: bool


def causal_region(front_lengths: tuple[int, ...] | None, rank: int, origin: int) -> CausalRegion | None:
    """What ring rank ``rank`` attends to in the block of ring rank ``origin``; None where that is nothing."""
    if origin == rank:
        return CausalRegion(0, None, True)
    if front_lengths is None:
        return CausalRegion(0, None, False) if origin < rank else None
    if origin < rank:
        # The second chunk of an earlier rank comes after all tokens of this rank.
        return CausalRegion(0, front_lengths[origin], False)
    # All tokens of a later rank lie between the two chunks of this rank.
    return CausalRegion(front_lengths[rank], None, False)


class HeadShare(NamedTuple):
    """The attention heads that one Ulysses rank computes.

    Attributes:
        query: (start, stop) of its query heads.
        key: (start, stop) of the key/value heads that these use. The shares of neighbouring ranks overlap where a
            key/value head serves query heads on both.
        key_of_query: for each of its query heads the index of its key/value head, counted from ``key[0]``; None where
            they form equal runs, which a kernel with grouped-query attention takes without repeating keys.
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
    """Give each Ulysses rank its query heads, and the key/value heads that they need.

    The heads of a rank are split into groups, for exchanging one while another is computed. The result has for each
    group the heads of each rank.
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
        for group, group_heads in zip(result, split_evenly(count, groups), strict=True):
            group.append(_head_share(start, start + group_heads, repeats))
            start += group_heads
    return tuple(tuple(group) for group in result)


def _head_share(start: int, stop: int, repeats: int) -> HeadShare:
    """The query heads from ``start`` to ``stop``, where each key/value head serves ``repeats`` query heads."""
    if start == stop:
        return HeadShare((start, start), (start // repeats, start // repeats), None)
    first, last = start // repeats, (stop - 1) // repeats + 1
    key_of_query = tuple(head // repeats - first for head in range(start, stop))
    run = (stop - start) // (last - first)
    has_equal_runs = key_of_query == tuple(index // run for index in range(stop - start))
    return HeadShare((start, stop), (first, last), None if has_equal_runs else key_of_query)


class HeadRun(NamedTuple):
    """Neighbouring ranks that get equally many heads of each of some tensors, at equal distances.

    So one strided view of a tensor has the heads of all of them, and evenly split heads are a single run.

    Attributes:
        start: the first rank.
        num_ranks: number of ranks.
        heads: for each tensor the first rank's first head, the distance to the next rank's first head, and the number
            of heads of each rank.
    """

    start: int
    num_ranks: int
    heads: tuple[tuple[int, int, int], ...]


def head_runs(per_rank: Sequence[tuple[tuple[int, int], ...]]) -> tuple[HeadRun, ...]:
    """Join neighbouring ranks to runs.

    Args:
        per_rank: for each rank and each tensor the (start, stop) of its heads.
    """
    runs: list[HeadRun] = []
    for rank, ranges in enumerate(per_rank):
        if runs:
            start, num_ranks, heads = runs[-1]
            steps = tuple(first - before for (first, _), (before, _) in zip(ranges, per_rank[rank - 1], strict=True))
            fits = all(
                stop - first == count and (num_ranks == 1 or here == step)
                for (first, stop), (_, step, count), here in zip(ranges, heads, steps, strict=True)
            )
            if fits:
                joined = tuple((first, here, count) for (first, _, count), here in zip(heads, steps, strict=True))
                runs[-1] = HeadRun(start, num_ranks + 1, joined)
                continue
        runs.append(HeadRun(rank, 1, tuple((first, 0, stop - first) for first, stop in ranges)))
    return tuple(runs)
