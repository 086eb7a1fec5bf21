"""Ring: keys and values pass from rank to rank, and each rank attends to every block that arrives.

Source: Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_sp.attention.kernels import AttentionArgs, KeyBlock, attend
from omni_sp.attention.layout import CausalRegion, causal_region
from omni_sp.attention.merge import Merger
from omni_sp.attention.packing import mask_elements, pack_mask, unpack_mask
from omni_sp.collectives import shift
from omni_sp.mesh import Axis

_WHOLE_BLOCK = CausalRegion(0, None, False)


@dataclass(frozen=True)
class RingLayout:
    """Which rank holds which keys along one ring axis.

    Attributes:
        axis: the ranks.
        key_lengths: number of key tokens of each of these ranks; zeros are fine.
        front_lengths: the order of tokens, for causal attention: see ``SequenceLayout``.
    """

    axis: Axis
    key_lengths: Sequence[int]
    front_lengths: tuple[int, ...] | None


@dataclass(frozen=True)
class _BlockShape:
    """The shape of a packed block but for its number of tokens, which differs from rank to rank."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    is_masked: bool

    def numel(self, tokens: int) -> int:
        """Number of elements of a packed block of so many tokens."""
        return 2 * self._key_numel(tokens) + (mask_elements(tokens * self.batch, self.dtype) if self.is_masked else 0)

    def unpack(self, packed: Tensor, tokens: int) -> KeyBlock:
        """Key and value as views of a packed block, and its mask."""
        key_numel = self._key_numel(tokens)
        shape = (self.batch, tokens, self.heads, self.head_dim)
        mask = unpack_mask(packed[2 * key_numel :], tokens, self.batch) if self.is_masked else None
        return KeyBlock(packed[:key_numel].view(shape), packed[key_numel : 2 * key_numel].view(shape), mask)

    def _key_numel(self, tokens: int) -> int:
        return math.prod((self.batch, tokens, self.heads, self.head_dim))


def ring_attention(
    query: Tensor, block: KeyBlock, layout: RingLayout, args: AttentionArgs, key_of_query: tuple[int, ...] | None
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks along the ring.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's.
        block: this rank's keys; all ranks have a mask, or none has.
        layout: the ranks and what they hold.
        args: the kernel and how to call it. If causal, queries and keys are the same tokens, in the layout's order.
        key_of_query: for each query head the index of its key/value head; None where they form equal runs.

    Returns:
        (batch, q_tokens, heads, head_dim).
    """
    axis, merger = layout.axis, Merger()
    if axis.size == 1:
        return attend(query, block, args, key_of_query)[0]
    whole_args = replace(args, is_causal=False) if args.is_causal else args
    batch, _, heads, head_dim = block.key.shape
    shape = _BlockShape(batch, heads, head_dim, block.key.dtype, block.mask is not None)
    tensors = [block.key.reshape(-1), block.value.reshape(-1)]
    if block.mask is not None:
        tensors.append(pack_mask(block.mask, block.key.dtype))
    packed = torch.cat(tensors)
    for step in range(axis.size):
        origin = (axis.rank - step) % axis.size
        pending = None
        if step < axis.size - 1:
            # The next block is on its way while this one is attended to; both ends know every length. Under causality a
            # block may hold nothing for this rank's queries; it is passed on all the same.
            pending = shift(packed, shape.numel(layout.key_lengths[(origin - 1) % axis.size]), axis)
        region = causal_region(layout.front_lengths, axis.rank, origin) if args.is_causal else _WHOLE_BLOCK
        if region is not None:
            keys = shape.unpack(packed, layout.key_lengths[origin]).tokens(0, region.key_stop)
            region_args = args if region.is_causal else whole_args
            out, lse = attend(query[:, region.query_start :], keys, region_args, key_of_query)
            merger.add(out, lse, region.query_start)
        if pending is not None:
            packed = pending.wait()
    return merger.result(query.dtype)[0]
