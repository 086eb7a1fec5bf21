"""A key mask that every rank holds whole: keys that nobody attends to are left out, and kernels see no mask.

The fast kernels of GPUs take no mask. So each rank leaves out those of its keys that count in no row of the batch,
before anything is sent. Where the rows of a batch differ, a row leaves out the rest when it is computed. Every rank
knows the numbers of all ranks' masks, so that all know all lengths, and nobody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from omni_sp.attention.kernels import KeyBlock, Rows, select_keys
from omni_sp.errors import UnsupportedAttentionError


class WholeKeyMask:
    """Which keys of all ranks may be attended to, known to every rank.

    Its numbers are read once, here, which waits for the mask's device. So make one, and pass it as ``key_mask`` to all
    attentions under this mask.

    Args:
        mask: (batch, keys of all ranks) bool in rank order, True = attend, the same on all ranks. A batch of 1 is for
            all rows.
        lengths: how many of these keys each rank holds.

    Attributes:
        batch: number of rows.
        lengths: how many keys each rank holds.
        kept_lengths: how many of them count in some row.

    Raises:
        UnsupportedAttentionError: the mask is of another kind, or the lengths are not its lengths.
    """

    def __init__(self, mask: Tensor, lengths: Sequence[int]) -> None:
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != sum(lengths):
            raise UnsupportedAttentionError(
                f"mask {tuple(mask.shape)} of {mask.dtype}: give bool of shape (batch, {sum(lengths)}), True = attend, "
                f"for ranks that hold {tuple(lengths)} keys"
            )
        self.batch, self.lengths = mask.shape[0], tuple(lengths)
        self.numbers = mask.cpu().numpy()
        bounds = np.cumsum([0, *lengths])
        self._parts = [self.numbers[:, start:stop] for start, stop in pairwise(bounds)]
        self._kept = [np.flatnonzero(part.any(axis=0)) for part in self._parts]
        self.kept_lengths = tuple(len(places) for places in self._kept)
        self._selections: dict[tuple[int, torch.device], slice | Tensor] = {}
        self._tensors: dict[tuple[int, torch.device], Tensor] = {}
        self._rows: dict[tuple[int, int, torch.device], tuple[Rows, ...] | None] = {}

    @property
    def masks_nothing(self) -> bool:
        """True where every row may attend to every key."""
        return bool(self.numbers.all())

    def part(self, rank: int, batch: int, device: torch.device) -> Tensor:
        """The mask of one rank's keys, (batch, its keys)."""
        name = (rank, device)
        if name not in self._tensors:
            self._tensors[name] = torch.from_numpy(self._parts[rank]).to(device)
        return self._tensors[name].expand(batch, -1)

    def drop(self, block: KeyBlock, rank: int) -> KeyBlock:
        """The keys of one rank that count in some row; ``kept_lengths`` of them, and without a copy if contiguous."""
        name = (rank, block.key.device)
        if name not in self._selections:
            self._selections[name] = _selection(self._kept[rank], block.key.device)
        keys = self._selections[name]
        return KeyBlock(select_keys(block.key, keys), select_keys(block.value, keys), None)

    def rows(self, start: int, stop: int, device: torch.device) -> tuple[Rows, ...] | None:
        """What each row attends to of the keys that the ranks from ``start`` to ``stop`` have left, in rank order.

        None where all rows attend to all of them.
        """
        name = (start, stop, device)
        if name not in self._rows:
            ranks = range(start, stop)
            kept = np.concatenate([self._parts[rank][:, self._kept[rank]] for rank in ranks], axis=1)
            self._rows[name] = None if kept.all() else tuple(_rows(kept, device))
        return self._rows[name]


def _rows(mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]], device: torch.device) -> list[Rows]:
    """Neighbouring rows with the same mask are one entry, so that they are one call of a kernel."""
    changes = np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1
    bounds = [0, *changes.tolist(), len(mask)]
    return [Rows(start, stop, _selection(np.flatnonzero(mask[start]), device)) for start, stop in pairwise(bounds)]


def _selection(places: np.ndarray[tuple[int], np.dtype[np.intp]], device: torch.device) -> slice | Tensor:
    """Ascending places: a slice where they are consecutive, which needs no copy."""
    if len(places) == 0:
        return slice(0, 0)
    start, stop = int(places[0]), int(places[-1]) + 1
    if stop - start == len(places):
        return slice(start, stop)
    return torch.from_numpy(places).to(device)
