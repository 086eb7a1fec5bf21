"""Ulysses: trade tokens for heads, so that each rank holds all tokens of its row for its share of the heads.

One packed all-to-all carries query, key, value (and mask) to the head owners, one brings the output back. On the wire a
token is a row (its numbers for the receiver's heads), rows lie token-major, destination after destination:
where query and key share their lengths, what is received *is* query, key and value side by side, and nothing is copied
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni_sp.attention.layout import HeadShare
from omni_sp.attention.packing import mask_elements, pack_mask, unpack_mask
from omni_sp.collectives import exchange
from omni_sp.mesh import Axis


@dataclass(frozen=True)
class UlyssesLayout:
    """Who holds what along one Ulysses axis.

    Attributes:
        axis: the ranks. heads: each rank's share of the heads.
        query, key: tokens that each of these ranks holds.
    """

    axis: Axis
    heads: tuple[HeadShare, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]

    @property
    def own_heads(self) -> HeadShare:
        """This rank's heads."""
        return self.heads[self.axis.rank]


@dataclass(frozen=True)
class _PackedTensors:
    """Tensors (batch, tokens, heads, head_dim) with the same tokens, whose numbers travel side by side in one row.

    ``spans`` gives for each rank and each tensor the (start, stop) of the heads that go there; ``lengths`` the tokens
    that each rank holds.
    """

    tensors: tuple[torch.Tensor, ...]
    head_ranges: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...]

    def width(self, rank: int) -> int:
        """Numbers in a row for ``rank``'s heads."""
        head_dim = self.tensors[0].shape[-1]
        return sum(stop - start for start, stop in self.head_ranges[rank]) * head_dim

    def numel(self, source: int, target: int) -> int:
        """Elements that travel from one rank to another."""
        return self.lengths[source] * self.tensors[0].shape[0] * self.width(target)

    def write(self, target: int, out: torch.Tensor) -> None:
        """Fill ``out`` (flat) with this rank's rows for ``target``."""
        batch, tokens, _, head_dim = self.tensors[0].shape
        rows = out.view(tokens, batch, self.width(target))
        column = 0
        for tensor, (start, stop) in zip(self.tensors, self.head_ranges[target], strict=True):
            width = (stop - start) * head_dim
            piece = rows[:, :, column : column + width].unflatten(-1, (stop - start, head_dim))
            piece.copy_(tensor[:, :, start:stop].transpose(0, 1))
            column += width

    def read(self, rows: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Views (batch, all tokens, heads, head_dim) of rows (all tokens, batch, width) for ``rank``'s heads."""
        head_dim = self.tensors[0].shape[-1]
        counts = [stop - start for start, stop in self.head_ranges[rank]]
        pieces = rows.split([count * head_dim for count in counts], dim=-1)
        return [
            piece.unflatten(-1, (count, head_dim)).transpose(0, 1) for piece, count in zip(pieces, counts, strict=True)
        ]


def _pack_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: UlyssesLayout
) -> list[_PackedTensors]:
    """Query, key and value in one row where they share their lengths on every rank, else query apart.

    The decision looks at all ranks' lengths, never at this rank's alone: everyone must decide alike.
    """
    if layout.query == layout.key:
        head_ranges = tuple((share.query, share.key, share.key) for share in layout.heads)
        return [_PackedTensors((query, key, value), head_ranges, layout.query)]
    return [
        _PackedTensors((query,), tuple((share.query,) for share in layout.heads), layout.query),
        _PackedTensors((key, value), tuple((share.key, share.key) for share in layout.heads), layout.key),
    ]


class ScatterHeads:
    """Give up heads, gain tokens: (batch, own tokens, all heads, …) -> (batch, the row's tokens, own heads, …).

    The exchange is under way once this is made.

    Args:
        query, key, value: (batch, tokens, heads, head_dim), this rank's tokens. key_mask: (batch, kv_tokens) or None.
        layout: who holds what, and which heads go where.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        layout: UlyssesLayout,
    ) -> None:
        self._layout = layout
        axis, me, self._batch = layout.axis, layout.axis.rank, query.shape[0]
        self._packed_groups = _pack_groups(query, key, value, layout)
        self._masked = key_mask is not None
        mask = None if key_mask is None else pack_mask(key_mask, query.dtype)
        outgoing = [self._segments(me, target) for target in range(axis.size)]
        self._incoming = [self._segments(source, me) for source in range(axis.size)]
        send_sizes, recv_sizes = [sum(sizes) for sizes in outgoing], [sum(sizes) for sizes in self._incoming]
        self._exchange = exchange(send_sizes, recv_sizes, query.dtype, query.device, axis)
        for target, (part, sizes) in enumerate(zip(self._exchange.send_buffers, outgoing, strict=True)):
            *places, mask_place = part.split(sizes)
            for packed, place in zip(self._packed_groups, places, strict=True):
                packed.write(target, place)
            if mask is not None:
                mask_place.copy_(mask)
        self._exchange.start()

    def wait(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query, key, value and mask of the row's tokens, for this rank's heads."""
        received, layout, me = self._exchange.wait(), self._layout, self._layout.axis.rank
        if len(self._packed_groups) == 1 and not self._masked:
            packed = self._packed_groups[0]
            query, key, value = packed.read(received.view(sum(layout.query), self._batch, packed.width(me)), me)
            return query, key, value, None
        return _unpack(received, self._incoming, self._packed_groups, layout, self._batch, self._masked)

    def _segments(self, source: int, target: int) -> list[int]:
        """Elements of each part of what travels from one rank to another; the mask is the last."""
        mask = mask_elements(self._layout.key[source] * self._batch, self._packed_groups[0].tensors[0].dtype)
        return [*(packed.numel(source, target) for packed in self._packed_groups), mask if self._masked else 0]


def _unpack(
    received: torch.Tensor,
    sizes: Sequence[Sequence[int]],
    packed_groups: Sequence[_PackedTensors],
    layout: UlyssesLayout,
    batch: int,
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Bring together what came from several ranks in several segments each."""
    me = layout.axis.rank
    pieces = [part.split(list(size)) for part, size in zip(received.split([sum(s) for s in sizes]), sizes, strict=True)]
    tensors: list[torch.Tensor] = []
    for index, packed in enumerate(packed_groups):
        rows = torch.cat([piece[index] for piece in pieces]).view(sum(packed.lengths), batch, packed.width(me))
        tensors += packed.read(rows, me)
    mask = None
    if masked:
        parts = [unpack_mask(piece[-1], length, batch) for piece, length in zip(pieces, layout.key, strict=True)]
        mask = torch.cat(parts, dim=1)
    return tensors[0], tensors[1], tensors[2], mask


class GatherHeads:
    """The way back: (batch, the row's tokens, own heads, head_dim) -> (batch, own tokens, all heads, head_dim).

    The exchange is under way once this is made.
    """

    def __init__(self, out: torch.Tensor, layout: UlyssesLayout) -> None:
        self._layout, self._out = layout, out
        batch, _, _, head_dim = out.shape
        me, mine = layout.axis.rank, layout.own_heads.num_query
        numbers = [batch * share.num_query * head_dim for share in layout.heads]
        # What stays here is not sent.
        send_sizes = [0 if rank == me else tokens * numbers[me] for rank, tokens in enumerate(layout.query)]
        self._sizes = [0 if rank == me else layout.query[me] * number for rank, number in enumerate(numbers)]
        self._exchange = exchange(send_sizes, self._sizes, out.dtype, out.device, layout.axis)
        for place, rows in zip(self._exchange.send_buffers, out.split(list(layout.query), dim=1), strict=True):
            if place.numel():
                place.view(-1, batch, mine, head_dim).copy_(rows.transpose(0, 1))
        self._exchange.start()

    def write(self, result: torch.Tensor) -> None:
        """Wait, and put these heads into their places in (batch, own tokens, all heads, head_dim)."""
        layout, me = self._layout, self._layout.axis.rank
        batch, tokens, _, head_dim = result.shape
        pieces = self._exchange.wait().split(self._sizes)
        for rank, (share, piece) in enumerate(zip(layout.heads, pieces, strict=True)):
            if rank == me:
                rows = self._out.split(list(layout.query), dim=1)[me]
            else:
                rows = piece.view(tokens, batch, share.num_query, head_dim).transpose(0, 1)
            result[:, :, share.query[0] : share.query[1]] = rows
