"""Ulysses: trade tokens for heads, so that each rank holds all tokens of its Ulysses group for its share of the heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Here one packed all-to-all brings query, key, value (and mask) to the
ranks that compute the heads, and one brings the output back. In a message each token is one vector: its query, key and
value for the receiver's heads. Vectors lie token-major, the messages of the senders behind one another. So where query
and key have the same lengths, what a rank receives *is* query, key and value side by side, and is not copied again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_sp.attention.layout import HeadShare
from omni_sp.attention.packing import mask_elements, pack_mask, unpack_mask
from omni_sp.collectives import exchange
from omni_sp.mesh import Axis


@dataclass(frozen=True)
class UlyssesLayout:
    """The heads that each rank of a Ulysses axis computes, and how many query and key tokens it holds."""

    axis: Axis
    heads: tuple[HeadShare, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]

    @property
    def own_heads(self) -> HeadShare:
        """The heads that this rank computes."""
        return self.heads[self.axis.rank]


@dataclass(frozen=True)
class _PackedTensors:
    """Tensors (batch, tokens, heads, head_dim) of the same tokens, which share one vector a token in a message.

    Attributes:
        head_ranges: for each rank and each tensor, the (start, stop) of the heads that this rank gets.
        lengths: number of tokens that each rank holds.
    """

    tensors: tuple[Tensor, ...]
    head_ranges: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...]

    def width(self, rank: int) -> int:
        """Elements of a token's vector for ``rank``'s heads."""
        head_dim = self.tensors[0].shape[-1]
        return sum(stop - start for start, stop in self.head_ranges[rank]) * head_dim

    def numel(self, source: int, target: int) -> int:
        """Elements that one rank sends to another."""
        return self.lengths[source] * self.tensors[0].shape[0] * self.width(target)

    def write(self, target: int, buffer: Tensor) -> None:
        """Fill a flat buffer with what this rank sends to ``target``."""
        batch, tokens, _, head_dim = self.tensors[0].shape
        vectors = buffer.view(tokens, batch, self.width(target))
        offset = 0
        for tensor, (start, stop) in zip(self.tensors, self.head_ranges[target], strict=True):
            width = (stop - start) * head_dim
            of_tensor = vectors[:, :, offset : offset + width].unflatten(-1, (stop - start, head_dim))
            of_tensor.copy_(tensor[:, :, start:stop].transpose(0, 1))
            offset += width

    def read(self, vectors: Tensor, rank: int) -> list[Tensor]:
        """Views (batch, all tokens, heads, head_dim) of vectors (all tokens, batch, width) for ``rank``'s heads."""
        head_dim = self.tensors[0].shape[-1]
        counts = [stop - start for start, stop in self.head_ranges[rank]]
        per_tensor = vectors.split([count * head_dim for count in counts], dim=-1)
        return [x.unflatten(-1, (count, head_dim)).transpose(0, 1) for x, count in zip(per_tensor, counts, strict=True)]


def _pack_groups(query: Tensor, key: Tensor, value: Tensor, layout: UlyssesLayout) -> list[_PackedTensors]:
    """Query, key and value in one vector a token where every rank holds as many of each, else query by itself.

    The decision looks at all ranks' lengths, never at this rank's alone: all ranks must decide alike.
    """
    if layout.query == layout.key:
        head_ranges = tuple((share.query, share.key, share.key) for share in layout.heads)
        return [_PackedTensors((query, key, value), head_ranges, layout.query)]
    return [
        _PackedTensors((query,), tuple((share.query,) for share in layout.heads), layout.query),
        _PackedTensors((key, value), tuple((share.key, share.key) for share in layout.heads), layout.key),
    ]


class ScatterHeads:
    """Give up heads, gain tokens: (batch, own tokens, all heads, …) -> (batch, the group's tokens, own heads, …).

    Constructing it starts the exchange.

    Args:
        query: (batch, own query tokens, all heads, head_dim).
        key: (batch, own key tokens, all key/value heads, head_dim).
        value: (batch, own key tokens, all key/value heads, head_dim).
        key_mask: (batch, own key tokens) bool, passed by all ranks or by none.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, layout: UlyssesLayout
    ) -> None:
        self._layout = layout
        axis, rank, self._batch = layout.axis, layout.axis.rank, query.shape[0]
        self._packed_groups = _pack_groups(query, key, value, layout)
        self._masked = key_mask is not None
        mask = None if key_mask is None else pack_mask(key_mask, query.dtype)
        outgoing = [self._segments(rank, target) for target in range(axis.size)]
        self._incoming = [self._segments(source, rank) for source in range(axis.size)]
        send_sizes, recv_sizes = [sum(sizes) for sizes in outgoing], [sum(sizes) for sizes in self._incoming]
        self._exchange = exchange(send_sizes, recv_sizes, query.dtype, query.device, axis)
        for target, (send_buffer, sizes) in enumerate(zip(self._exchange.send_buffers, outgoing, strict=True)):
            *buffers, mask_buffer = send_buffer.split(sizes)
            for packed, buffer in zip(self._packed_groups, buffers, strict=True):
                packed.write(target, buffer)
            if mask is not None:
                mask_buffer.copy_(mask)
        self._exchange.start()

    def wait(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask of the tokens of the Ulysses group, for this rank's heads."""
        received, layout, rank = self._exchange.wait(), self._layout, self._layout.axis.rank
        if len(self._packed_groups) == 1 and not self._masked:
            packed = self._packed_groups[0]
            query, key, value = packed.read(received.view(sum(layout.query), self._batch, packed.width(rank)), rank)
            return query, key, value, None
        return self._unpack(received)

    def _segments(self, source: int, target: int) -> list[int]:
        """Elements of each segment of the message from one rank to another; the mask is the last segment."""
        mask = mask_elements(self._layout.key[source] * self._batch, self._packed_groups[0].tensors[0].dtype)
        return [*(packed.numel(source, target) for packed in self._packed_groups), mask if self._masked else 0]

    def _unpack(self, received: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Concatenate the segments of the messages from all ranks."""
        rank, sizes = self._layout.axis.rank, self._incoming
        messages = received.split([sum(segments) for segments in sizes])
        per_source = [message.split(segments) for message, segments in zip(messages, sizes, strict=True)]
        tensors: list[Tensor] = []
        for index, packed in enumerate(self._packed_groups):
            flat = torch.cat([segments[index] for segments in per_source])
            tensors += packed.read(flat.view(sum(packed.lengths), self._batch, packed.width(rank)), rank)
        mask = None
        if self._masked:
            lengths = zip(per_source, self._layout.key, strict=True)
            mask = torch.cat([unpack_mask(segments[-1], length, self._batch) for segments, length in lengths], dim=1)
        return tensors[0], tensors[1], tensors[2], mask


class GatherHeads:
    """The way back: (batch, the group's tokens, own heads, head_dim) -> (batch, own tokens, all heads, head_dim).

    Constructing it starts the exchange.
    """

    def __init__(self, out: Tensor, layout: UlyssesLayout) -> None:
        self._layout = layout
        batch, _, num_heads, head_dim = out.shape
        axis, rank = layout.axis, layout.axis.rank
        per_rank = out.split(list(layout.query), dim=1)
        self._own = per_rank[rank]  # it is not sent
        send_sizes = [tokens * batch * num_heads * head_dim for tokens in layout.query]
        self._sizes = [layout.query[rank] * batch * share.num_query * head_dim for share in layout.heads]
        send_sizes[rank] = self._sizes[rank] = 0
        self._exchange = exchange(send_sizes, self._sizes, out.dtype, out.device, axis)
        for send_buffer, of_rank in zip(self._exchange.send_buffers, per_rank, strict=True):
            if send_buffer.numel():
                send_buffer.view(-1, batch, num_heads, head_dim).copy_(of_rank.transpose(0, 1))
        self._exchange.start()

    def write(self, result: Tensor) -> None:
        """Wait, and write the heads of this layout into ``result``, (batch, own tokens, all heads, head_dim)."""
        batch, tokens, _, head_dim = result.shape
        messages = self._exchange.wait().split(self._sizes)
        for rank, (share, message) in enumerate(zip(self._layout.heads, messages, strict=True)):
            if rank == self._layout.axis.rank:
                heads = self._own
            else:
                heads = message.view(tokens, batch, share.num_query, head_dim).transpose(0, 1)
            result[:, :, share.query[0] : share.query[1]] = heads
