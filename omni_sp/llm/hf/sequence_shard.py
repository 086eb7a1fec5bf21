"""One rank's shard of a sequence of tokens: which tokens it has, and how all or some tokens are gathered again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omni_sp.attention import SequenceLayout, split_evenly
from omni_sp.collectives import gather, require_equal
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import Axis, ParallelMesh


def prompt_layout(tokens: int, mesh: ParallelMesh) -> SequenceLayout:
    """How a prompt's tokens are split: zigzag (arXiv 2311.09431) around a ring, for causal attention of equal work."""
    if mesh.ring.size > 1:
        return SequenceLayout.zigzag(tokens, ring=mesh.ring.size, ulysses=mesh.ulysses.size)
    lengths = split_evenly(tokens, mesh.sequence.size)
    return SequenceLayout(lengths, lengths)


class SequenceShard:
    """One rank's tokens of a sequence.

    A rank without tokens runs the model on one stand-in token, since a model's own code may fail on empty tensors. No
    other token attends to it, and it is never gathered.

    Attributes:
        layout: which rank has which tokens.
        axis: the ranks.
        tokens: number of this rank's tokens.
        positions: (tokens,), their positions in the sequence, on the device of the tensors to split.
    """

    def __init__(self, layout: SequenceLayout, axis: Axis, device: torch.device) -> None:
        self.layout, self.axis = layout, axis
        positions = [torch.tensor(layout.positions(rank), dtype=torch.int64) for rank in range(axis.size)]
        self._order = torch.cat(positions).argsort()
        self.tokens = layout.query[axis.rank]
        self.positions = positions[axis.rank].to(device)

    def shard_tokens(self, whole: Tensor) -> Tensor:
        """This rank's tokens of (batch, all tokens, …), possibly none."""
        return whole.index_select(1, self.positions.to(whole.device))

    def shard_for_model(self, whole: Tensor) -> Tensor:
        """This rank's tokens, or the stand-in token where there are none."""
        return self.shard_tokens(whole) if self.tokens else torch.zeros_like(whole[:, :1])

    def gather_tokens(self, shard: Tensor) -> Tensor:
        """Gather (batch, own tokens or stand-in, …) of all ranks to (batch, all tokens, …) on all ranks."""
        if self.axis.size == 1:
            return shard
        joined = gather(shard[:, : self.tokens], self.layout.query, 1, self.axis)
        return joined.index_select(1, self._order.to(shard.device))

    def select(self, shard: Tensor, wanted: Tensor) -> Tensor:
        """This rank's tokens at the ``wanted`` positions, in the order of ``wanted``."""
        indices, owners = self._find(wanted)
        own = indices[owners == self.axis.rank] - sum(self.layout.query[: self.axis.rank])
        return shard.index_select(1, own.to(shard.device))

    def gather_selected(self, selected: Tensor, wanted: Tensor) -> Tensor:
        """Gather what each rank computed from its `select` tokens to (batch, wanted, …) on all ranks."""
        _, owners = self._find(wanted)
        counts = owners.bincount(minlength=self.axis.size).tolist()
        joined = gather(selected, counts, 1, self.axis)
        return joined.index_select(1, owners.argsort(stable=True).argsort().to(selected.device))

    def _find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """For each wanted position its index in the concatenated shards of all ranks, and the rank that has it."""
        indices = self._order[wanted]
        ends = torch.tensor(self.layout.query).cumsum(0)
        return indices, torch.bucketize(indices, ends, right=True)


def key_mask(attention_mask: Tensor | None, whole: Tensor) -> Tensor | None:
    """The mask of real tokens, (batch, tokens) bool; None where all are real."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != whole.shape[:2]:
        is_tensor = isinstance(attention_mask, Tensor)
        given = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise UnsupportedAttentionError(
            f"attention_mask {given}: give (batch, tokens) = {tuple(whole.shape[:2])}, 0 = padding; causality is there "
            "without it, and other masks are not cut over ranks"
        )
    mask = attention_mask.to(device=whole.device, dtype=torch.bool)
    return None if bool(mask.all()) else mask


def require_same_inputs(axis: Axis, **inputs: Any) -> None:
    """Raise ShardingError, with what differs, where the ranks were called with different numbers or tensors."""
    # The same tokens as int32 and as int64 are the same prompt.
    inputs = {
        name: value.long() if isinstance(value, Tensor) and not value.is_floating_point() else value
        for name, value in inputs.items()
    }
    require_equal(
        axis,
        "the ranks were called with different {name} ({name}, or its checksum: {values}): all ranks take the same, "
        "whole prompt; broadcast it from one of them",
        **inputs,
    )
