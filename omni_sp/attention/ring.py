"""Ring: each rank's queries attend to the keys and values of all ranks along an axis, which come in one of two ways.

Either they pass from rank to rank, and each rank attends to every block that arrives, while the next one is on its way
(Ring Attention, arXiv 2310.01889); or one exchange gathers them all, and each rank attends to them at once. The latter
takes fewer messages, fewer kernels and no merging, but memory for all keys, and nothing hides behind anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from omni_sp.attention.kernels import AttentionArgs, KeyBlock, Rows, attend
from omni_sp.attention.layout import CausalRegion, HeadRun, causal_region
from omni_sp.attention.merge import Merger
from omni_sp.attention.packing import PARTS_DIM, mask_elements, pack, unpack
from omni_sp.collectives import all_gather, shift
from omni_sp.mesh import Axis

_WHOLE_BLOCK = CausalRegion(0, None, False)
_MOST_GATHERED_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
"""Where keys and values of all ranks along the ring are more, they pass from rank to rank.

On a CPU gathered ones took 0.79 to 1.01 of the processor time at 4 and 16 MiB, and 1.00 to 1.03 of it at 64 MiB, on 2
and 4 ranks (`python -m benchmarks.ring`).
On CUDA nothing was measured. It is assumed that each block that passes costs 0.1 ms of launches and merging, the time
in which NVLink moves 32 MiB that nothing hides when they are gathered: 64 MiB in a ring of two.
"""


@dataclass(frozen=True)
class RingLayout:
    """How many keys each rank of one ring axis holds, and the order of tokens as ``SequenceLayout`` describes it.

    Attributes:
        gathers_keys: one exchange brings all keys to every rank; else they pass from rank to rank.
        rows: gives for the keys of the ring ranks from a first to before a last one, in rank order, what ``attend``
            takes as its rows.
    """

    axis: Axis
    key_lengths: tuple[int, ...]
    front_lengths: tuple[int, ...] | None
    gathers_keys: bool
    rows: Callable[[int, int], Sequence[Rows] | None]


def pays_to_gather(device: str, num_bytes: int) -> bool:
    """Whether it pays to gather keys and values. All ranks pass the same and decide alike.

    Args:
        device: the type of the device.
        num_bytes: what a rank would gather, its own part included.
    """
    return num_bytes <= _MOST_GATHERED_BYTES.get(device, _MOST_GATHERED_BYTES["cuda"])


class _Step(NamedTuple):
    """One call of the kernel over gathered keys.

    Attributes:
        query_start: the queries from this one on attend.
        is_causal: as in `CausalRegion`.
        ranges: the (start, stop) of the gathered keys that they attend to.
    """

    query_start: int
    is_causal: bool
    ranges: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def _causal_steps(key_lengths: tuple[int, ...], front_lengths: tuple[int, ...] | None, rank: int) -> tuple[_Step, ...]:
    """Causal attention to gathered keys in as few calls as there are kinds of regions, this rank's own block first."""
    starts = list(accumulate(key_lengths, initial=0))
    steps: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    for origin in sorted(range(len(key_lengths)), key=lambda origin: origin != rank):
        region = causal_region(front_lengths, rank, origin)
        if region is None:
            continue
        ranges = steps.setdefault((region.query_start, region.is_causal), [])
        start = starts[origin]
        stop = starts[origin + 1] if region.key_stop is None else start + region.key_stop
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(_Step(query_start, is_causal, tuple(ranges)) for (query_start, is_causal), ranges in steps.items())


def ring_attention(
    query: Tensor, block: KeyBlock, layout: RingLayout, args: AttentionArgs, key_of_query: tuple[int, ...] | None
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks along the ring.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's.
        block: this rank's keys; all ranks have a mask, or none has.
        layout: how many keys each rank holds, and in which of the two ways they come.
        args: the kernel and how to call it. If causal, queries and keys are the same tokens, in the layout's order.
        key_of_query: for each query head the index of its key/value head; None where they form equal runs.

    Returns:
        (batch, q_tokens, heads, head_dim).
    """
    if layout.axis.size == 1:
        return attend(query, block, args, key_of_query, layout.rows(0, 1))[0]
    vectors = _KeyVectors(block)
    if not layout.gathers_keys:
        return _attend_passing(query, vectors, layout, args, key_of_query)
    sizes = [vectors.numel(length) for length in layout.key_lengths]
    pending = all_gather(sizes, query.dtype, query.device, layout.axis)
    pending.fill(vectors.parts, PARTS_DIM)
    pending.start()
    keys = vectors.unpack(pending.wait(), sum(layout.key_lengths))
    if not args.is_causal:
        return attend(query, keys, args, key_of_query, layout.rows(0, layout.axis.size))[0]
    merger, whole_args = Merger(), replace(args, is_causal=False)
    for query_start, is_causal, ranges in _causal_steps(layout.key_lengths, layout.front_lengths, layout.axis.rank):
        some_keys = _join([keys.tokens(start, stop) for start, stop in ranges])
        out, lse = attend(query[:, query_start:], some_keys, args if is_causal else whole_args, key_of_query)
        merger.add(out, lse, query_start)
    return merger.result(query.dtype)[0]


def _attend_passing(
    query: Tensor,
    vectors: _KeyVectors,
    layout: RingLayout,
    args: AttentionArgs,
    key_of_query: tuple[int, ...] | None,
) -> Tensor:
    """Attend to every block as it passes."""
    axis, merger = layout.axis, Merger()
    whole_args = replace(args, is_causal=False) if args.is_causal else args
    packed = torch.cat(vectors.parts, PARTS_DIM).view(-1)
    for step in range(axis.size):
        origin = (axis.rank - step) % axis.size
        pending = None
        if step < axis.size - 1:
            # The next block is on its way while this one is attended to; both ends know every length. Under causality a
            # block may hold nothing for this rank's queries; it is passed on all the same.
            pending = shift(packed, vectors.numel(layout.key_lengths[(origin - 1) % axis.size]), axis)
        region = causal_region(layout.front_lengths, axis.rank, origin) if args.is_causal else _WHOLE_BLOCK
        if region is not None:
            keys = vectors.unpack(packed, layout.key_lengths[origin]).tokens(0, region.key_stop)
            region_args = args if region.is_causal else whole_args
            rows = layout.rows(origin, origin + 1)
            out, lse = attend(query[:, region.query_start :], keys, region_args, key_of_query, rows)
            merger.add(out, lse, region.query_start)
        if pending is not None:
            packed = pending.wait()
    return merger.result(query.dtype)[0]


class _KeyVectors:
    """How the keys and values of some tokens, and their mask, lie in a message: a vector a token.

    Attributes:
        parts: this rank's, as `pack` gives them.
    """

    def __init__(self, block: KeyBlock) -> None:
        self._batch, _, num_heads, self._head_dim = block.key.shape
        self._counts = (num_heads, num_heads)
        self._mask_width = mask_elements(block.mask, block.key.dtype)
        self.parts = pack((block.key, block.value), HeadRun(0, 1, ((0, 0, num_heads),) * 2), block.mask)

    def numel(self, tokens: int) -> int:
        """Elements of a message of so many tokens."""
        return tokens * self._batch * (sum(self._counts) * self._head_dim + self._mask_width)

    def unpack(self, message: Tensor, tokens: int) -> KeyBlock:
        """Keys, values and mask of a message."""
        (key, value), mask = unpack(message, tokens, self._batch, self._counts, self._head_dim, self._mask_width)
        return KeyBlock(key, value, mask)


def _join(blocks: Sequence[KeyBlock]) -> KeyBlock:
    """Blocks one behind the other; a single one is not copied."""
    if len(blocks) == 1:
        return blocks[0]
    keys, values, masks = zip(*blocks, strict=True)
    return KeyBlock(torch.cat(keys, 1), torch.cat(values, 1), None if masks[0] is None else torch.cat(masks, 1))
