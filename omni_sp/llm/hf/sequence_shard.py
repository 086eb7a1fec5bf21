"""A row of tokens in pieces: which are this rank's, and how the whole, or a part of it, comes together again."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.attention import SequenceLayout, split_evenly
from omni_sp.collectives import gather, require_equal
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import Axis, ParallelMesh


def prompt_layout(tokens: int, mesh: ParallelMesh) -> SequenceLayout:
    """Where a prompt's tokens go: zigzag around a ring, so that causality gives all ranks the same work."""
    if mesh.ring.size > 1:
        return SequenceLayout.zigzag(tokens, ring=mesh.ring.size, ulysses=mesh.ulysses.size)
    held = split_evenly(tokens, mesh.sequence.size)
    return SequenceLayout(held, held)


class SequenceShard:
    """One row of tokens, cut as a layout says.

    A rank without a token computes one stand-in row, which no other token attends to and which is never gathered: a
    model's own code cannot tell the shape of nothing.

    Args:
        layout: who holds what. axis: the ranks. device: of the tensors to cut.

    Attributes:
        layout, axis: as given. tokens: how many are this rank's. positions: (tokens,) which they are.
    """

    def __init__(self, layout: SequenceLayout, axis: Axis, device: torch.device) -> None:
        self.layout, self.axis = layout, axis
        held = [torch.tensor(layout.positions(rank), dtype=torch.int64) for rank in range(axis.size)]
        self._order = torch.cat(held).argsort()
        self.tokens = layout.query[axis.rank]
        self.positions = held[axis.rank].to(device)

    def shard_tokens(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of (batch, all tokens, …); also none."""
        return whole.index_select(1, self.positions.to(whole.device))

    def shard_for_model(self, whole: torch.Tensor) -> torch.Tensor:
        """The same, or the stand-in row where there is none."""
        return self.shard_tokens(whole) if self.tokens else torch.zeros_like(whole[:, :1])

    def gather_tokens(self, piece: torch.Tensor) -> torch.Tensor:
        """(batch, own tokens or stand-in, …) of all ranks -> (batch, all tokens, …) on all ranks."""
        if self.axis.size == 1:
            return piece
        joined = gather(piece[:, : self.tokens], self.layout.query, 1, self.axis)
        return joined.index_select(1, self._order.to(piece.device))

    def select(self, piece: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Those of this rank's tokens that are among ``wanted`` positions, in their order there."""
        places, owners = self._find(wanted)
        mine = places[owners == self.axis.rank] - sum(self.layout.query[: self.axis.rank])
        return piece.index_select(1, mine.to(piece.device))

    def gather_selected(self, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """What each rank made of :meth:`own` tokens -> (batch, wanted, …) on all ranks."""
        _, owners = self._find(wanted)
        counts = owners.bincount(minlength=self.axis.size).tolist()
        joined = gather(rows, counts, 1, self.axis)
        return joined.index_select(1, owners.argsort(stable=True).argsort().to(rows.device))

    def _find(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each wanted position its place in the row of all pieces, and the rank that holds it."""
        places = self._order[wanted]
        ends = torch.tensor(self.layout.query).cumsum(0)
        return places, torch.bucketize(places, ends, right=True)


def key_mask(attention_mask: torch.Tensor | None, whole: torch.Tensor) -> torch.Tensor | None:
    """(batch, tokens) bool, True = a real token; None where all are."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != whole.shape[:2]:
        is_tensor = isinstance(attention_mask, torch.Tensor)
        given = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise UnsupportedAttentionError(
            f"attention_mask {given}: give (batch, tokens) = {tuple(whole.shape[:2])}, 0 = padding; causality is there "
            "without it, and other masks are not cut over ranks"
        )
    mask = attention_mask.to(device=whole.device, dtype=torch.bool)
    return None if bool(mask.all()) else mask


def require_same_inputs(axis: Axis, **inputs: Any) -> None:
    """Raise where the ranks were called with different inputs, before anything is computed from them.

    Args:
        axis: the ranks.
        inputs: numbers and tensors that must be equal, by name: the same names on all ranks.

    Raises:
        ShardingError: it names what differs, and how.
    """
    require_equal(
        axis,
        "the ranks were called with different {name} ({name}, or its checksum: {values}): all ranks take the same, "
        "whole prompt; broadcast it from one of them",
        **inputs,
    )
