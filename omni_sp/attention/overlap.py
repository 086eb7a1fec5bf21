"""Ulysses over groups of heads: while one group is attended to, the next comes in and the one before goes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from omni_sp.attention.layout import HeadShare
from omni_sp.attention.ulysses import GatherHeads, ScatterHeads, UlyssesLayout

AttendGroup = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, HeadShare], torch.Tensor]

_MAX_GROUPS = 4
_MIN_GROUP_BYTES = 4 << 20
"""A smaller exchange costs more to start than it can hide."""


def choose_head_groups(device: str, num_heads: int, degree: int, head_bytes: int) -> int:
    """How many groups pay.

    Args:
        head_bytes: bytes of one head of an average row's queries; the same on all ranks, as the others are.

    On a CPU the exchange takes the cores that the attention runs on, so nothing can hide behind anything: 1.
    """
    per_rank = num_heads // degree
    if device == "cpu" or per_rank < 2:
        return 1
    return max(1, min(_MAX_GROUPS, per_rank, per_rank * head_bytes // _MIN_GROUP_BYTES))


def pipelined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    groups: Sequence[UlyssesLayout],
    attend_group: AttendGroup,
) -> torch.Tensor:
    """Scatter, attend and gather, group by group; one group is the plain path.

    All ranks start the same exchanges in the same order, so none can wait for another's different one.

    Returns:
        (batch, own tokens, heads, head_dim).
    """
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    mask: torch.Tensor | None = None
    returning: list[GatherHeads] = []
    coming = ScatterHeads(query, key, value, key_mask, groups[0])
    for index, layout in enumerate(groups):
        q, k, v, received = coming.wait()
        # The mask comes with the first group and serves them all.
        mask = received if index == 0 else mask
        if index + 1 < len(groups):
            coming = ScatterHeads(query, key, value, None, groups[index + 1])
        returning.append(GatherHeads(attend_group(q, k, v, mask, layout.own_heads), layout))
    for gather in returning:
        gather.write(result)
    return result
