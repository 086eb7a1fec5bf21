"""The one attention of this house: Ulysses inside, ring outside, any kernel at the bottom."""

from __future__ import annotations

import torch

from omni_sp.attention.kernels import Kernel, KernelCall, attend, select_kernel
from omni_sp.attention.layout import HeadShare, SequenceLayout, head_shares
from omni_sp.attention.overlap import choose_head_groups, pipelined
from omni_sp.attention.ring import ring_attention
from omni_sp.attention.ulysses import UlyssesLayout
from omni_sp.collectives import require_equal
from omni_sp.errors import ShardingError, UnsupportedAttentionError
from omni_sp.mesh import Axis, ParallelMesh

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sequence_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mesh: ParallelMesh,
    key_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: SequenceLayout | None = None,
    kernel: str = "auto",
    head_groups: int | None = None,
) -> torch.Tensor:
    """Attention over tokens that lie in pieces on the ranks of ``mesh``, equal to attention over the whole row.

    All ranks of ``mesh.sequence`` call it at the same point of the program; they may hold different numbers of tokens,
    also none.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's piece.
        key, value: (batch, kv_tokens, kv_heads, head_dim), this rank's piece; heads = n × kv_heads.
        mesh: the ranks.
        key_mask: (batch, kv_tokens) bool, True = attend, this rank's piece. Passed by all ranks or by none. A query
            that no key may attend gets output 0.
        is_causal: each token attends to itself and to what lies before it; query and key are the same tokens. Pieces
            lie in rank order (ring-major), unless the layout is ``SequenceLayout.zigzag(...)``, which gives all ranks
            the same work.
        scale: of the scores; None means 1/sqrt(head_dim).
        layout: how many tokens each rank holds, where the caller knows. None asks the others with one small
            exchange, which also finds out whether all ranks hold tensors that fit together.
        kernel: "auto", or one of ``omni_sp.attention.kernel_names()``.
        head_groups: into how many groups Ulysses cuts each rank's heads, so that one group's exchange hides behind
            another's attention; 1 is the plain path. None chooses by shape and device. The same on all ranks.

    Returns:
        (batch, q_tokens, heads, head_dim), contiguous, for this rank's queries.

    Raises:
        UnsupportedAttentionError: shapes or dtypes that do not fit together, gradients, or no able kernel.
        ShardingError: the ranks hold tensors that do not fit together (looked at where ``layout`` is None, or
            always with ``ParallelMesh(..., check=True)``).
    """
    _check_inputs(query, key, value, key_mask)
    axis = mesh.sequence
    if layout is None or mesh.check:
        agreed = agree_on_layout(query, key, key_mask=key_mask, is_causal=is_causal, axis=axis)
        if layout is not None and (layout.query, layout.key) != (agreed.query, agreed.key):
            raise ShardingError(f"the caller's layout is {layout}, but the ranks hold {agreed}")
        layout = layout or agreed
    _check_layout(query, key, layout, mesh, is_causal)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    able = _select_kernel(kernel, query, key_mask, is_causal)

    return _hybrid_attention(query, key, value, key_mask, mesh, layout, is_causal, scale, able, head_groups)


def _hybrid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    mesh: ParallelMesh,
    layout: SequenceLayout,
    is_causal: bool,
    scale: float,
    kernel: Kernel,
    head_groups: int | None,
) -> torch.Tensor:
    """Ulysses inside, ring outside. Every decision follows from layout and head counts: all ranks decide alike."""
    degree, ring = mesh.ulysses.size, mesh.ring
    row = slice(ring.rank * degree, (ring.rank + 1) * degree)
    row_lengths = layout.query[row], layout.key[row]
    key_lengths = [sum(layout.key[start : start + degree]) for start in range(0, mesh.sequence.size, degree)]

    def attend_group(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, share: HeadShare
    ) -> torch.Tensor:
        return ring_attention(
            query,
            key,
            value,
            axis=ring,
            key_lengths=key_lengths,
            key_mask=mask,
            is_causal=is_causal,
            front_lengths=layout.front_lengths,
            scale=scale,
            kernel=kernel,
            key_of_query=share.key_of_query,
        )

    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    if degree == 1:
        return attend_group(query, key, value, key_mask, head_shares(num_heads, num_kv_heads, 1)[0][0]).contiguous()
    if head_groups is None:
        # Of the average row, not of this one: rows of different length must not choose differently, or their ring
        # ranks would pass each other blocks of different groups.
        row_tokens = sum(layout.query) // ring.size
        head_bytes = row_tokens * query.shape[0] * query.shape[3] * query.element_size()
        head_groups = choose_head_groups(query.device.type, num_heads, degree, head_bytes)
    groups = [
        UlyssesLayout(mesh.ulysses, heads, *row_lengths)
        for heads in head_shares(num_heads, num_kv_heads, degree, head_groups)
    ]
    return pipelined(query, key, value, key_mask, groups, attend_group)


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attention to keys that are whole on this rank: nothing is exchanged. Arguments as above."""
    _check_inputs(query, key, value, key_mask)
    share = head_shares(query.shape[2], key.shape[2], 1)[0][0]
    out, _ = attend(
        _select_kernel(kernel, query, key_mask, is_causal),
        query,
        key,
        value,
        key_mask=key_mask,
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        key_of_query=share.key_of_query,
    )
    return out


def _select_kernel(kernel: str, query: torch.Tensor, key_mask: torch.Tensor | None, is_causal: bool) -> Kernel:
    call = KernelCall(query.device.type, query.dtype, query.shape[-1], key_mask is not None, is_causal)
    return select_kernel(kernel, call)


def agree_on_layout(
    query: torch.Tensor, key: torch.Tensor, *, key_mask: torch.Tensor | None, is_causal: bool, axis: Axis
) -> SequenceLayout:
    """Ask all ranks what they hold.

    Raises:
        ShardingError: they hold tensors that do not fit together; names ranks and values.
    """
    lengths = require_equal(
        axis,
        "the ranks disagree about {name} of one attention: {values}",
        gathered=(query.shape[1], key.shape[1]),
        batch=query.shape[0],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        head_dim=query.shape[3],
        dtype=query.dtype,
        key_mask=int(key_mask is not None),
        is_causal=int(is_causal),
    )
    return SequenceLayout(query=tuple(row[0] for row in lengths), key=tuple(row[1] for row in lengths))


def _check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    """Refuse what could not be exact, before anything is sent."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise UnsupportedAttentionError(
            f"{shapes}: all three are (batch, tokens, heads, head_dim), key and value alike"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise UnsupportedAttentionError(f"{shapes}: batch and head_dim must be the same")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in _DTYPES:
        raise UnsupportedAttentionError(
            f"query {query.dtype}, key {key.dtype}, value {value.dtype}: give float32, bfloat16 or "
            "float16 for all three (float64 for reference)"
        )
    if len({query.device, key.device, value.device}) > 1:
        raise UnsupportedAttentionError(f"query on {query.device}, key on {key.device}, value on {value.device}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
        raise UnsupportedAttentionError(
            f"key_mask {tuple(key_mask.shape)} of {key_mask.dtype}: give bool of shape "
            f"{tuple(key.shape[:2])}, True = attend"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise UnsupportedAttentionError(
            "no gradients flow through sequence-parallel attention: run under torch.no_grad()"
        )


def _check_layout(
    query: torch.Tensor, key: torch.Tensor, layout: SequenceLayout, mesh: ParallelMesh, is_causal: bool
) -> None:
    """A layout that is not this rank's own would send the wrong rows: refuse it."""
    axis = mesh.sequence
    if layout.front_lengths is not None and len(layout.front_lengths) != mesh.ring.size:
        raise ShardingError(
            f"{layout} is a zigzag over {len(layout.front_lengths)} ring ranks, the mesh has {mesh.ring.size}"
        )
    if len(layout.query) != axis.size or len(layout.key) != axis.size:
        raise ShardingError(f"{layout} speaks of {len(layout.query)} ranks, the mesh has {axis.size}")
    held = (query.shape[1], key.shape[1])
    told = (layout.query[axis.rank], layout.key[axis.rank])
    if held != told:
        raise ShardingError(f"rank {axis.rank} holds {held} query and key tokens, its layout says {told}")
    if is_causal and layout.query != layout.key:
        raise UnsupportedAttentionError(
            f"causal attention needs queries and keys of the same tokens; the ranks hold {layout.query} "
            f"and {layout.key}"
        )
