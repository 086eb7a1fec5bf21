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
from omni_sp.collectives import exchange, starts
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
    def mine(self) -> HeadShare:
        """This rank's heads."""
        return self.heads[self.axis.rank]


@dataclass(frozen=True)
class _Bundle:
    """Tensors (batch, tokens, heads, head_dim) with the same tokens, whose numbers travel side by side in one row.

    ``spans`` gives for each rank and each tensor the (start, stop) of the heads that go there; ``lengths`` the tokens
    that each rank holds.
    """

    tensors: tuple[torch.Tensor, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...]

    def width(self, rank: int) -> int:
        """Numbers in a row for ``rank``'s heads."""
        head_dim = self.tensors[0].shape[-1]
        return sum(stop - start for start, stop in self.spans[rank]) * head_dim

    def numel(self, source: int, target: int) -> int:
        """Elements that travel from one rank to another."""
        return self.lengths[source] * self.tensors[0].shape[0] * self.width(target)

    def write(self, target: int, out: torch.Tensor) -> None:
        """Fill ``out`` (flat) with this rank's rows for ``target``."""
        batch, tokens, _, head_dim = self.tensors[0].shape
        rows = out.view(tokens, batch, self.width(target))
        column = 0
        for tensor, (start, stop) in zip(self.tensors, self.spans[target], strict=True):
            width = (stop - start) * head_dim
            piece = rows[:, :, column : column + width].unflatten(-1, (stop - start, head_dim))
            piece.copy_(tensor[:, :, start:stop].transpose(0, 1))
            column += width

    def read(self, rows: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Views (batch, all tokens, heads, head_dim) of rows (all tokens, batch, width) for ``rank``'s heads."""
        head_dim = self.tensors[0].shape[-1]
        counts = [stop - start for start, stop in self.spans[rank]]
        pieces = rows.split([count * head_dim for count in counts], dim=-1)
        return [
            piece.unflatten(-1, (count, head_dim)).transpose(0, 1) for piece, count in zip(pieces, counts, strict=True)
        ]


def _bundles(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: UlyssesLayout) -> list[_Bundle]:
    """Query, key and value in one row where they share their lengths on every rank, else query apart.

    The decision looks at all ranks' lengths, never at this rank's alone: everyone must decide alike.
    """
    if layout.query == layout.key:
        spans = tuple((share.query, share.key, share.key) for share in layout.heads)
        return [_Bundle((query, key, value), spans, layout.query)]
    return [
        _Bundle((query,), tuple((share.query,) for share in layout.heads), layout.query),
        _Bundle((key, value), tuple((share.key, share.key) for share in layout.heads), layout.key),
    ]


def scatter_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    layout: UlyssesLayout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Give up heads, gain tokens: (batch, own tokens, all heads, …) -> (batch, the row's tokens, own heads, …)."""
    axis = layout.axis
    if axis.size == 1:
        return query, key, value, key_mask
    batch, me = query.shape[0], axis.rank
    bundles = _bundles(query, key, value, layout)
    mask = None if key_mask is None else pack_mask(key_mask, query.dtype)

    def mask_size(source: int) -> int:
        return 0 if mask is None else mask_elements(layout.key[source] * batch, query.dtype)

    def segments(source: int, target: int) -> list[int]:
        return [*(bundle.numel(source, target) for bundle in bundles), mask_size(source)]

    outgoing = [segments(me, target) for target in range(axis.size)]
    incoming = [segments(source, me) for source in range(axis.size)]
    send_sizes, recv_sizes = [sum(sizes) for sizes in outgoing], [sum(sizes) for sizes in incoming]
    send = query.new_empty(sum(send_sizes))
    for target, (part, sizes) in enumerate(zip(send.split(send_sizes), outgoing, strict=True)):
        *places, mask_place = part.split(sizes)
        for bundle, place in zip(bundles, places, strict=True):
            bundle.write(target, place)
        if mask is not None:
            mask_place.copy_(mask)
    received = exchange(send, send_sizes, recv_sizes, axis)

    if len(bundles) == 1 and mask is None:
        tensors = bundles[0].read(received.view(sum(layout.query), batch, bundles[0].width(me)), me)
        return tensors[0], tensors[1], tensors[2], None
    return _sort(received, incoming, bundles, layout, batch, mask is not None)


def _sort(
    received: torch.Tensor,
    sizes: Sequence[Sequence[int]],
    bundles: Sequence[_Bundle],
    layout: UlyssesLayout,
    batch: int,
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Bring together what came from several ranks in several segments each."""
    me = layout.axis.rank
    pieces = [part.split(list(size)) for part, size in zip(received.split([sum(s) for s in sizes]), sizes, strict=True)]
    tensors: list[torch.Tensor] = []
    for index, bundle in enumerate(bundles):
        rows = torch.cat([piece[index] for piece in pieces]).view(sum(bundle.lengths), batch, bundle.width(me))
        tensors += bundle.read(rows, me)
    mask = None
    if masked:
        parts = [unpack_mask(piece[-1], length, batch) for piece, length in zip(pieces, layout.key, strict=True)]
        mask = torch.cat(parts, dim=1)
    return tensors[0], tensors[1], tensors[2], mask


def gather_heads(out: torch.Tensor, layout: UlyssesLayout) -> torch.Tensor:
    """The way back: (batch, the row's tokens, own heads, head_dim) -> (batch, own tokens, all heads, head_dim)."""
    axis = layout.axis
    if axis.size == 1:
        return out
    batch, _, _, head_dim = out.shape
    tokens = layout.query[axis.rank]
    send_sizes = [length * batch * layout.mine.num_query * head_dim for length in layout.query]
    recv_sizes = [tokens * batch * share.num_query * head_dim for share in layout.heads]
    received = exchange(out.transpose(0, 1).reshape(-1), send_sizes, recv_sizes, axis)
    result = out.new_empty(batch, tokens, layout.heads[-1].query[1], head_dim)
    places = starts(recv_sizes)
    for index, share in enumerate(layout.heads):
        piece = received[places[index] : places[index + 1]].view(tokens, batch, share.num_query, head_dim)
        result[:, :, share.query[0] : share.query[1]] = piece.transpose(0, 1)
    return result
