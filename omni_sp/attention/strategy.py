"""Which library computes an attention over all ranks: this one, or another on request."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor

from omni_sp.attention.entry import sequence_parallel_attention
from omni_sp.attention.key_mask import WholeKeyMask
from omni_sp.attention.layout import SequenceLayout
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import ParallelMesh

STRATEGIES = ("omni_sp", "yunchang")


class Strategy(Protocol):
    """Attention over a sequence whose tokens are spread over the ranks of a mesh."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | WholeKeyMask | None,
        is_causal: bool,
        scale: float | None,
        layout: SequenceLayout,
    ) -> Tensor:
        """Compute one attention. All ranks call it at the same point of the program.

        Args:
            query: (batch, q_tokens, heads, head_dim) of this rank's tokens.
            key: (batch, kv_tokens, kv_heads, head_dim) of this rank's tokens.
            value: (batch, kv_tokens, kv_heads, head_dim) of this rank's tokens.
            key_mask: (batch, kv_tokens) bool of this rank's keys, True = attend, or a mask that all ranks hold whole;
                None on all ranks for no mask.
            is_causal: each token attends to itself and to earlier tokens.
            scale: the scores are multiplied by it; None means 1/sqrt(head_dim).
            layout: how many tokens each rank holds.

        Returns:
            (batch, q_tokens, heads, head_dim) for this rank's queries.
        """
        ...


def check_strategy(name: str) -> None:
    """Raise where there is no strategy of this name.

    Args:
        name: the name, as a user gave it.

    Raises:
        UnsupportedAttentionError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise UnsupportedAttentionError(
            f"no attention strategy is called {name!r}; choose from {', '.join(STRATEGIES)}"
        )


def select_strategy(name: str, mesh: ParallelMesh, kernel: str) -> Strategy:
    """The strategy of a name. All ranks call this at the same point of the program: it may make process groups.

    Args:
        name: one of ``STRATEGIES``.
        mesh: the ranks.
        kernel: "auto", or one of ``omni_sp.attention.kernel_names()``.

    Raises:
        UnsupportedAttentionError: there is no such strategy, or its package is not installed.
    """
    check_strategy(name)
    if name == "yunchang" and mesh.sequence.size > 1:
        from omni_sp.attention.yunchang import YunchangAttention

        return YunchangAttention(mesh, kernel)
    return partial(sequence_parallel_attention, mesh=mesh, kernel=kernel)
