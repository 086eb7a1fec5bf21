"""Ring: keys and values travel around, each rank attends to every block as it comes by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni_sp.attention.kernels import Kernel, attend
from omni_sp.attention.layout import CausalRegion, causal_region
from omni_sp.attention.merge import Merger
from omni_sp.attention.packing import mask_elements, pack_mask, unpack_mask
from omni_sp.collectives import shift
from omni_sp.mesh import Axis


@dataclass(frozen=True)
class _BlockShape:
    """The shape of a key/value block but for its number of tokens, which differs from rank to rank."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    masked: bool

    def numel(self, tokens: int) -> int:
        """Elements on the wire for a block of that many tokens."""
        return 2 * self._half(tokens) + (mask_elements(tokens * self.batch, self.dtype) if self.masked else 0)

    def unpack(self, block: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Views of key, value and mask inside a received block."""
        half = self._half(tokens)
        shape = (self.batch, tokens, self.heads, self.head_dim)
        mask = unpack_mask(block[2 * half :], tokens, self.batch) if self.masked else None
        return block[:half].view(shape), block[half : 2 * half].view(shape), mask

    def _half(self, tokens: int) -> int:
        return math.prod((self.batch, tokens, self.heads, self.head_dim))


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    axis: Axis,
    key_lengths: Sequence[int],
    key_mask: torch.Tensor | None,
    is_causal: bool,
    front_lengths: tuple[int, ...] | None,
    scale: float,
    kernel: Kernel,
    key_of_query: tuple[int, ...] | None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks along ``axis``.

    Args:
        query: (batch, q_tokens, heads, head_dim). key, value: (batch, kv_tokens, kv_heads, head_dim); this rank's.
        key_lengths: kv_tokens of every rank; zeros are fine.
        key_mask: (batch, kv_tokens) of this rank's keys; all ranks pass one, or none does.
        is_causal: queries and keys are the same tokens, in the order that ``fronts`` says (see SequenceLayout).

    Returns:
        (batch, q_tokens, heads, head_dim).
    """
    merger = Merger()

    def add(key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, origin: int) -> None:
        part = causal_region(front_lengths, axis.rank, origin) if is_causal else CausalRegion(0, None, False)
        if part is None:
            return
        keys = slice(0, part.key_stop)
        out, lse = attend(
            kernel,
            query[:, part.query_start :],
            key[:, keys],
            value[:, keys],
            key_mask=None if mask is None else mask[:, keys],
            is_causal=part.is_causal,
            scale=scale,
            key_of_query=key_of_query,
        )
        merger.add(out, lse, part.query_start)

    if axis.size == 1:
        add(key, value, key_mask, 0)
        return merger.result(query.dtype)[0]

    shape = _BlockShape(key.shape[0], key.shape[2], key.shape[3], key.dtype, key_mask is not None)
    parts = [key.reshape(-1), value.reshape(-1)]
    if key_mask is not None:
        parts.append(pack_mask(key_mask, key.dtype))
    block = torch.cat(parts)
    for step in range(axis.size):
        origin = (axis.rank - step) % axis.size
        pending = None
        if step < axis.size - 1:
            # The next block is on its way while this one is attended to; both ends know every length. Under causality a
            # block may hold nothing for this rank's queries; it is passed on all the same.
            pending = shift(block, shape.numel(key_lengths[(origin - 1) % axis.size]), axis)
        add(*shape.unpack(block, key_lengths[origin]), origin)
        if pending is not None:
            block = pending.wait()
    return merger.result(query.dtype)[0]
