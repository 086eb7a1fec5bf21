"""Who carries out an attention over all ranks: our own core, or another library's on request."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from omni_sp.attention.entry import sequence_parallel_attention
from omni_sp.attention.layout import SequenceLayout
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import ParallelMesh

STRATEGIES = ("omni_sp", "yunchang")


class Strategy(Protocol):
    """Attention over tokens that lie in pieces on the ranks; arguments as of ``sequence_parallel_attention``."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        key_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        layout: SequenceLayout,
    ) -> torch.Tensor:
        """(batch, q_tokens, heads, head_dim) for this rank's queries."""
        ...


def check_strategy(name: str) -> None:
    """Refuse a name that is none of ours.

    Raises:
        UnsupportedAttentionError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise UnsupportedAttentionError(
            f"no attention strategy is called {name!r}; choose from {', '.join(STRATEGIES)}"
        )


def select_strategy(name: str, mesh: ParallelMesh, kernel: str) -> Strategy:
    """The strategy called ``name`` on ``mesh``. All ranks call this at the same point: it may make process groups.

    Raises:
        UnsupportedAttentionError: no such strategy, or its package is not installed.
    """
    check_strategy(name)
    if name == "yunchang" and mesh.sequence.size > 1:
        from omni_sp.attention.yunchang import YunchangAttention

        return YunchangAttention(mesh, kernel)
    return partial(sequence_parallel_attention, mesh=mesh, kernel=kernel)
