"""Ulysses over groups of heads: while one group is computed, the next is received and the one before sent back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omni_sp.attention.kernels import KeyBlock
from omni_sp.attention.layout import HeadShare
from omni_sp.attention.ulysses import GatherHeads, ScatterHeads, UlyssesLayout

_MAX_GROUPS = 4
_MIN_GROUP_BYTES = 4 << 20
"""A smaller exchange costs more to start than it can hide."""


def choose_head_groups(device: str, num_heads: int, degree: int, head_bytes: int) -> int:
    """Into how many groups it pays to split the heads of each rank. All ranks pass the same and decide alike.

    On a CPU the exchange takes the cores that the attention runs on, so it cannot hide behind anything: 1.

    Args:
        num_heads: number of query heads of all ranks together.
        head_bytes: bytes that one head's queries have in an average Ulysses group.
    """
    per_rank = num_heads // degree
    if device == "cpu" or per_rank < 2:
        return 1
    return max(1, min(_MAX_GROUPS, per_rank, per_rank * head_bytes // _MIN_GROUP_BYTES))


def ulysses_attention(
    query: Tensor,
    block: KeyBlock,
    groups: Sequence[UlyssesLayout],
    attend_group: Callable[[Tensor, KeyBlock, HeadShare], Tensor],
) -> Tensor:
    """Scatter, attend and gather, group by group; with one group nothing overlaps.

    All ranks start the same exchanges in the same order, so that none waits for an exchange that others do not start.

    Args:
        query: (batch, own tokens, all heads, head_dim).
        block: this rank's keys, of all key/value heads.
        groups: for each group of heads, which rank gets which of them.
        attend_group: computes a group: queries and keys of the Ulysses group's tokens for this rank's heads ->
            (batch, tokens of the Ulysses group, own heads, head_dim).

    Returns:
        (batch, own tokens, all heads, head_dim).
    """
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    mask: Tensor | None = None
    gathers: list[GatherHeads] = []
    scatter = ScatterHeads(query, *block, groups[0])
    for index, layout in enumerate(groups):
        q, k, v, received_mask = scatter.wait()
        # The mask is the same for all groups, and is sent with the first.
        mask = received_mask if index == 0 else mask
        if index + 1 < len(groups):
            scatter = ScatterHeads(query, block.key, block.value, None, groups[index + 1])
        gathers.append(GatherHeads(attend_group(q, KeyBlock(k, v, mask), layout.own_heads), layout))
    for gather in gathers:
        gather.write(result)
    return result
