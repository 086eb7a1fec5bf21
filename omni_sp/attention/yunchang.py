"""yunchang's LongContextAttention as a strategy, for comparing. It takes few shapes, and the others are refused.

Source: https://github.com/feifeibear/long-context-attention (package ``yunchang``, the extra ``yunchang``).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omni_sp.attention.key_mask import WholeKeyMask
from omni_sp.attention.layout import SequenceLayout
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import Axis, ParallelMesh

_WAY_OUT = 'use attention_strategy="omni_sp"'


class YunchangAttention:
    """One LongContextAttention on the groups of a mesh.

    The kernel must be "auto": yunchang has its own kernels, flash-attn on CUDA and plain torch elsewhere.
    """

    def __init__(self, mesh: ParallelMesh, kernel: str) -> None:
        if kernel != "auto":
            raise UnsupportedAttentionError(f"yunchang brings its own kernels, {kernel!r} cannot be used: {_WAY_OUT}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it scripts functions with torch.jit, which is deprecated
                from yunchang import LongContextAttention
                from yunchang.globals import PROCESS_GROUP
                from yunchang.kernels import AttnType
        except ImportError as error:
            raise UnsupportedAttentionError(
                f"attention_strategy='yunchang' needs its package ({error}): pip install '.[yunchang]', or {_WAY_OUT}"
            ) from error
        self._mesh = mesh
        # Its constructor reads the groups from a global of the package, where None means "all ranks".
        before = PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG
        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = _group(mesh, mesh.ulysses), _group(mesh, mesh.ring)
        try:
            on_gpu = torch.cuda.is_available() and mesh.sequence.backends.get("cuda") == "nccl"
            self._attention: Any = LongContextAttention(
                ring_impl_type="basic", attn_type=AttnType.FA if on_gpu else AttnType.TORCH_MATH
            )
        finally:
            PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = before

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
        """One attention, as ``Strategy`` defines it; UnsupportedAttentionError where yunchang cannot do it right."""
        reason = self._unsupported_reason(query, key, key_mask, is_causal, layout)
        if reason is not None:
            raise UnsupportedAttentionError(f"yunchang {reason}: {_WAY_OUT}")
        with torch.no_grad():
            out: Tensor = self._attention(
                query, key, value, softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale, causal=is_causal
            )
        return out

    def _unsupported_reason(
        self,
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | WholeKeyMask | None,
        is_causal: bool,
        layout: SequenceLayout,
    ) -> str | None:
        """Why yunchang cannot serve a call. Looks at what is the same on all ranks, so that all refuse alike."""
        degree, ring = self._mesh.ulysses.size, self._mesh.ring.size
        if len({*layout.query, *layout.key}) > 1:
            return f"needs the same number of tokens on every rank, they hold {layout.query} and {layout.key}"
        if layout.query[0] == 0:
            return "needs tokens on every rank"
        if query.shape[2] != key.shape[2]:
            return f"is not used with grouped heads ({query.shape[2]} and {key.shape[2]})"
        if query.shape[2] % degree:
            return f"needs heads that ulysses_degree divides, {query.shape[2]} over {degree} is not"
        if key_mask is not None:
            return "takes no mask"
        if layout.front_lengths is not None:
            return "is not used with zigzag layouts"
        if query.device.type != "cuda" and ring > 1:
            return "gives wrong results in its plain torch ring (its log-sum-exp is zero)"
        if query.device.type != "cuda" and is_causal:
            return "is not used for causal attention without flash-attn"
        if query.device.type == "cuda" and query.dtype not in (torch.bfloat16, torch.float16):
            return f"takes 16-bit numbers on CUDA, not {query.dtype}"
        return None


def _group(mesh: ParallelMesh, axis: Axis) -> dist.ProcessGroup:
    """The process group of an axis, also where the axis has one rank."""
    if axis.group is not None:
        return axis.group
    # Every rank of the mesh makes the group of this rank alone; no other rank takes part in that.
    group: dist.ProcessGroup = dist.new_group([mesh.ranks[mesh.rank]], use_local_synchronization=True)
    return group
