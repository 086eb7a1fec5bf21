"""Ring: keys and values pass from rank to rank, and each rank attends to every block that arrives.

Source: Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

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
    """How many keys each rank of one ring axis holds, and the order of tokens as ``SequenceLayout`` describes it."""

    axis: Axis
    key_lengths: Sequence[int]
    front_lengths: tuple[int, ...] | None


def _packed_sizes(like: KeyBlock, tokens: int) -> list[int]:
    """Number of elements of key, value and mask in a packed block of so many tokens."""
    batch, _, heads, head_dim = like.key.shape
    numel = batch * tokens * heads * head_dim
    return [numel, numel, 0 if like.mask is None else mask_elements(tokens * batch, like.key.dtype)]


def _unpack(packed: Tensor, like: KeyBlock, tokens: int) -> KeyBlock:
    """Key and value as views of a packed block, and its mask."""
    batch, _, heads, head_dim = like.key.shape
    key, value, mask = packed.split(_packed_sizes(like, tokens))
    shape = (batch, tokens, heads, head_dim)
    return KeyBlock(key.view(shape), value.view(shape), None if like.mask is None else unpack_mask(mask, tokens, batch))


def ring_attention(
    query: Tensor, block: KeyBlock, layout: RingLayout, args: AttentionArgs, key_of_query: tuple[int, ...] | None
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks along the ring.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's.
        block: this rank's keys; all ranks have a mask, or none has.
        args: the kernel and how to call it. If causal, queries and keys are the same tokens, in the layout's order.
        key_of_query: for each query head the index of its key/value head; None where they form equal runs.

    Returns:
        (batch, q_tokens, heads, head_dim).
    """
    axis, merger = layout.axis, Merger()
    if axis.size == 1:
        return attend(query, block, args, key_of_query)[0]
    whole_args = replace(args, is_causal=False) if args.is_causal else args
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
            pending = shift(packed, sum(_packed_sizes(block, layout.key_lengths[(origin - 1) % axis.size])), axis)
        region = causal_region(layout.front_lengths, axis.rank, origin) if args.is_causal else _WHOLE_BLOCK
        if region is not None:
            keys = _unpack(packed, block, layout.key_lengths[origin]).tokens(0, region.key_stop)
            region_args = args if region.is_causal else whole_args
            out, lse = attend(query[:, region.query_start :], keys, region_args, key_of_query)
            merger.add(out, lse, region.query_start)
        if pending is not None:
            packed = pending.wait()
    return merger.result(query.dtype)[0]
